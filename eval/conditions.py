"""Conditions: how the same cells are run. Steered or not, how hard, along what, and from which words on.

A condition is one registered function that turns what an arm has (`Setting`) into what it runs (`Plan`).
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from esr_train.errors import InputError
from esr_train.recipe import CONDITION_NAMES, EvalSection
from esr_train.restarts import attempts, find_cues, sentences
from eval.cells import Cell, Prompt, derived_seed, make_cells, unsteered
from eval.store import Trial
from eval.trials import Plan, Steerer

if TYPE_CHECKING:
    from esr_train.steering.directions import Direction

PREFIX_SENTENCES = 2
"""Sentences of a response that another condition goes on from."""
PUSHED_OFF_TOPIC, UNPUSHED_OFF_TOPIC = "steered_continues_steered", "unsteered_continues"
PUSHED_ON_TOPIC, UNPUSHED_ON_TOPIC = "steered_continues", "unsteered_continues_unsteered"
"""Push on or off, and a given beginning that is off-topic or on-topic, on the same cells."""
CORRECTION, MATCHED = "steered_continues_correction", "steered_continues_matched"
"""The matched-prefix control."""
GOALS = "goals"
GOAL_STRENGTH = 0.5
"""Multiple of the threshold at which goals steer: at the threshold itself answers are lost, and good steering leaves
them whole."""


@dataclass(frozen=True)
class Setting:
    """What a condition may draw on.

    Args:
        cells: test latents on test prompts; all of them, or the first `eval.control_trials`.
        steerer: steers at the base model's thresholds.
        response: the finished trial of an arm (by name) under a condition on a cell.
        own_thresholds: measures the arm's own thresholds, if they are not there yet: latent -> `norm` units; latents
            whose threshold lies at a bound are left out.
        stand_ins: latent -> direction of a random latent of like activation frequency and decoder norm.
        value: of a sweep's condition, such as the multiple of `boost_x1.5`.
        adapted: latent -> a direction of equal norm that was optimised against the arm.
        cues: phrases by which a correction begins.
        welcome: a prompt with {label}.
        goals: steers towards styles and refusals that somebody wants; their labels are their names.
    """

    arm: str
    cells: Sequence[Cell]
    steerer: Steerer
    seed: int
    response: Callable[[str, str, Cell], Trial]
    own_thresholds: Callable[[], Mapping[int, float]]
    stand_ins: Callable[[], Mapping[int, "Direction"]]
    value: float = 1.0
    adapted: Callable[[], Mapping[int, "Direction"]] = dict
    cues: Callable[[], Sequence[str]] = tuple
    prompts: Sequence[Prompt] = ()
    welcome: str = "{label}"
    goals: Steerer | None = None


@dataclass(frozen=True)
class Condition:
    """A way to run the cells.

    Args:
        name: as in `eval.conditions` and in trial rows.
        title: in words, for the report.
        goes_on_from: the condition from whose responses its replies go on; it must be measured, too.
        against: the condition that it is compared with, cell by cell, beside `steered`.
        runs_every_cell: whether it runs `eval.trials` cells and not only `eval.control_trials`.
        reads_restarts: whether the log-probability of a restart is read at its responses' sentence ends.
        needs_frequency: whether it needs to know how often the SAE's latents are active.
        for_plain_base: whether it says anything about the base model as it is.
        attacks: whether it tries to derail an answer, at a strength that the base model decides.
        sweep: for a family of conditions, their names and values as the recipe wants them.
    """

    name: str
    title: str
    plan: Callable[[Setting], Plan]
    goes_on_from: str | None = None
    against: str | None = None
    runs_every_cell: bool = False
    reads_restarts: bool = False
    needs_frequency: bool = False
    for_plain_base: bool = True
    attacks: bool = False
    sweep: Callable[[EvalSection], Mapping[str, float]] | None = None


SWEEPS = {"boost_": "Steered", "random_": "Steered along random directions"}
"""How the names of a sweep's members begin, before `x` and a multiple of the threshold, and their titles."""
CONDITIONS: dict[str, Condition] = {}
"""Every condition by its name, in the order in which reports show them."""


def register_condition(condition: Condition) -> None:
    """Make a condition known to recipes, evaluations and reports.

    Raises:
        ValueError: if there is one of this name already.
    """
    if condition.name in CONDITIONS:
        raise ValueError(f"there is a condition {condition.name!r} already")
    CONDITIONS[condition.name] = condition
    CONDITION_NAMES[condition.name] = condition.goes_on_from


@dataclass(frozen=True)
class Measured:
    """A condition as a recipe measures it: the members of a sweep are one each.

    Args:
        value: of a sweep's member.
    """

    name: str
    condition: Condition
    value: float = 1.0


def measured_conditions(section: EvalSection, wanted: Sequence[str] | None = None) -> tuple[Measured, ...]:
    """The conditions that a recipe measures, in the order in which they run.

    Args:
        wanted: an arm's own choice among `section.conditions`; None: all of them.
    """
    found: list[Measured] = []
    for name in dict.fromkeys(section.conditions if wanted is None else wanted):
        condition = CONDITIONS[name]
        values = condition.sweep(section) if condition.sweep else {name: 1.0}
        found += [Measured(member, condition, value) for member, value in values.items()]
    # Those that go on from the responses of others run last.
    return tuple(sorted(found, key=lambda measured: measured.condition.goes_on_from is not None))


def title(name: str) -> str:
    """A condition's name in words."""
    family, _, multiple = name.rpartition("x")
    if family in SWEEPS:
        return f"{SWEEPS[family]} at {multiple} × the threshold"
    return CONDITIONS[name].title if name in CONDITIONS else name


def is_attack(name: str) -> bool:
    """Whether a condition tries to derail an answer, at a strength that the base model decides."""
    return name.rpartition("x")[0] in SWEEPS or (name in CONDITIONS and CONDITIONS[name].attacks)


def order(name: str) -> tuple[int, float, str]:
    """Where a condition stands among others: registered ones first, each sweep by strength, then the rest by name."""
    known = list(CONDITIONS)
    family, _, multiple = name.rpartition("x")
    if family in SWEEPS:
        with suppress(ValueError):
            return len(known) + list(SWEEPS).index(family), float(multiple), name
    return (known.index(name) if name in known else len(known) + len(SWEEPS)), 0.0, name


def _steered(setting: Setting) -> Plan:
    return Plan(tuple(setting.cells), setting.steerer)


def _unsteered(setting: Setting) -> Plan:
    return Plan(tuple(unsteered(setting.cells)), setting.steerer)


def _recalibrated(setting: Setting) -> Plan:
    norms = setting.own_thresholds()
    return Plan(tuple(cell for cell in setting.cells if cell.latent in norms), replace(setting.steerer, norms=norms))


def _boosted(setting: Setting) -> Plan:
    cells = tuple(replace(cell, multiple=round(setting.value, 6)) for cell in setting.cells)
    return Plan(cells, setting.steerer)


def _along_random_directions(setting: Setting) -> Plan:
    plan, directions = _boosted(setting), random_directions(setting.steerer.directions, setting.seed)
    return Plan(tuple(unlabelled(plan.cells)), replace(setting.steerer, directions=directions))


def _by_random_latents(setting: Setting) -> Plan:
    stand_ins = setting.stand_ins()
    directions = {direction.latent: direction for direction in stand_ins.values()}
    norms = {direction.latent: setting.steerer.norms[latent] for latent, direction in stand_ins.items()}
    steerer = replace(setting.steerer, directions=directions, norms=norms)
    return Plan(tuple(with_latents(setting.cells, stand_ins)), steerer)


def _generated_only(setting: Setting) -> Plan:
    return Plan(tuple(setting.cells), replace(setting.steerer, positions="generated"))


def _mid_answer(setting: Setting) -> Plan:
    plan = _continued(setting, "unsteered", True, lambda _, reply: first_half(reply))
    return replace(plan, steerer=replace(plan.steerer, positions="generated", late=True))


def _two_directions(setting: Setting) -> Plan:
    """Every latent with the next one: pushes that add up to the threshold's length."""
    directions = setting.steerer.directions
    order = sorted({cell.latent for cell in setting.cells if cell.latent is not None})
    parts = {
        latent: (directions[latent], directions[other])
        for latent, other in zip(order, [*order[1:], *order[:1]], strict=True)
        if other != latent
    }
    return Plan(tuple(setting.cells), replace(setting.steerer, parts=parts))


def _three_layers(setting: Setting) -> Plan:
    """The same direction at its own layer and the two before it, where there are so many."""
    parts = {
        latent: tuple(replace(each, layer=layer) for layer in range(max(0, each.layer - 2), each.layer + 1))
        for latent, each in setting.steerer.directions.items()
    }
    return Plan(tuple(setting.cells), replace(setting.steerer, parts=parts))


def _adaptive(setting: Setting) -> Plan:
    return Plan(tuple(setting.cells), replace(setting.steerer, directions=setting.adapted()))


def _goes_on(setting: Setting, *, pushed: bool, off_topic: bool) -> Plan:
    """From the beginning of a reply of the base model: the push and the text are chosen apart."""
    return _continued(setting, "steered" if off_topic else "unsteered", pushed, _opening)


def _welcomed(setting: Setting) -> Plan:
    return Plan(tuple(welcomed(setting.cells, setting.prompts, setting.welcome)), setting.steerer)


def _towards_goals(setting: Setting) -> Plan:
    assert setting.goals is not None  # the recipe asked for the condition
    directions, seed = list(setting.goals.directions.values()), derived_seed(GOALS, setting.seed)
    cells = make_cells(setting.prompts, directions, len(setting.cells), seed, GOAL_STRENGTH)
    return Plan(tuple(cells), setting.goals)


def _corrects(setting: Setting, *, which: int) -> Plan:
    """From the correction, 0, or from the on-topic text that is as long, 1."""
    return _continued(setting, "unsteered", True, lambda cell, reply: matched(reply, _cue(setting, cell))[which])


def _continued(setting: Setting, condition: str, steered: bool, begin: Callable[[Cell, str], str]) -> Plan:
    """The cells, each from what `begin` makes of the base model's response under another condition."""
    sources = setting.cells if condition == "steered" else unsteered(setting.cells)
    prefixes = {
        cell.key: begin(cell, setting.response("base", condition, source).response)
        for cell, source in zip(setting.cells, sources, strict=True)
    }
    return Plan(tuple(setting.cells), replace(setting.steerer, off=not steered), prefixes)


def _opening(_: Cell, reply: str) -> str:
    return opening(reply, PREFIX_SENTENCES)


def _cue(setting: Setting, cell: Cell) -> str:
    cues = setting.cues()
    if not cues:
        raise InputError("no cue does without a subject's name", "data.cues", "Add one without {label}.")
    return cues[derived_seed("correction", setting.seed, cell.key) % len(cues)]


def _switched_off(setting: Setting) -> Plan:
    """Responses without a restart stand as they are: steering was never switched off."""
    prefixes: dict[str, str] = {}
    copies: dict[str, Trial] = {}
    for cell in setting.cells:
        trial = setting.response(setting.arm, "steered", cell)
        begun = through_restart(trial)
        if begun is None:
            copies[cell.key] = trial
        else:
            prefixes[cell.key] = begun
    return Plan(tuple(setting.cells), replace(setting.steerer, off=True), prefixes, copies)


def boosts(section: EvalSection, family: str = "boost_") -> dict[str, float]:
    """The multiples of a sweep by their conditions' names, such as `boost_x1.25`."""
    return {f"{family}x{multiple:g}": multiple for multiple in section.boost}


for _condition in (
    Condition(
        "steered",
        "Steered at the base model's thresholds",
        _steered,
        runs_every_cell=True,
        reads_restarts=True,
        attacks=True,
    ),
    Condition("unsteered", "Unsteered", _unsteered, runs_every_cell=True, reads_restarts=True),
    Condition(
        "steered_recalibrated",
        "Steered at the arm's own thresholds",
        _recalibrated,
        runs_every_cell=True,
        for_plain_base=False,
    ),
    Condition("welcomed", "Steered towards what the prompt asks for", _welcomed),
    Condition(GOALS, "Steered towards a style or a refusal, at half the threshold", _towards_goals),
    Condition(
        "random_direction", "Steered along random directions of equal norm", _along_random_directions, attacks=True
    ),
    Condition(
        "random_latents",
        "Steered by random latents of like frequency and decoder norm",
        _by_random_latents,
        needs_frequency=True,
        attacks=True,
    ),
    Condition("generated_only", "Steered from the reply's first token on", _generated_only, attacks=True),
    Condition(
        "mid_answer",
        "Steered from the middle of the base model's unsteered response on",
        _mid_answer,
        goes_on_from="unsteered",
        attacks=True,
    ),
    Condition(
        "two_directions", "Steered along two directions at once, of equal norm together", _two_directions, attacks=True
    ),
    Condition("three_layers", "Steered at three layers at once, of equal norm together", _three_layers, attacks=True),
    Condition("adaptive", "Steered along directions of equal norm, optimised against the arm", _adaptive, attacks=True),
    Condition(
        UNPUSHED_OFF_TOPIC,
        "Unsteered, going on from the base model's steered beginning",
        partial(_goes_on, pushed=False, off_topic=True),
        goes_on_from="steered",
        against=UNPUSHED_ON_TOPIC,
    ),
    Condition(
        PUSHED_ON_TOPIC,
        "Steered, going on from the base model's unsteered beginning",
        partial(_goes_on, pushed=True, off_topic=False),
        goes_on_from="unsteered",
        against=UNPUSHED_ON_TOPIC,
    ),
    Condition(
        PUSHED_OFF_TOPIC,
        "Steered, going on from the base model's steered beginning",
        partial(_goes_on, pushed=True, off_topic=True),
        goes_on_from="steered",
        against=UNPUSHED_ON_TOPIC,
    ),
    Condition(
        UNPUSHED_ON_TOPIC,
        "Unsteered, going on from the base model's unsteered beginning",
        partial(_goes_on, pushed=False, off_topic=False),
        goes_on_from="unsteered",
    ),
    Condition(
        CORRECTION,
        "Steered, going on from a correction",
        partial(_corrects, which=0),
        goes_on_from="unsteered",
        against=MATCHED,
    ),
    Condition(
        MATCHED,
        "Steered, going on from an on-topic text as long as the correction",
        partial(_corrects, which=1),
        goes_on_from="unsteered",
    ),
    Condition("switched_off", "Steered until the first restart, then unsteered", _switched_off, goes_on_from="steered"),
    Condition("boost", "Steered at other strengths", _boosted, sweep=boosts, attacks=True),
    Condition(
        "random_boost",
        "Steered along random directions at other strengths",
        _along_random_directions,
        sweep=partial(boosts, family="random_"),
        attacks=True,
    ),
):
    register_condition(_condition)


def unlabelled(cells: Sequence[Cell]) -> list[Cell]:
    """Cells whose direction stands for nothing, so that nothing can be hijacked towards it."""
    return [replace(cell, label=None) for cell in cells]


def welcomed(cells: Sequence[Cell], prompts: Sequence[Prompt], template: str) -> list[Cell]:
    """Cells whose prompt asks for what steers them.

    Args:
        cells: those whose direction stands for nothing are left out.
        prompts: where the label is a topic of theirs, its prompts are taken in turn.
        template: the prompt with {label} for every other label.
    """
    own: dict[str, list[str]] = {}
    for prompt in prompts:
        own.setdefault(prompt.topic, []).append(prompt.text)
    met: Counter[str] = Counter()
    found = []
    for cell in cells:
        if cell.label is not None:
            texts = own.get(cell.label) or [template.replace("{label}", cell.label)]
            found.append(replace(cell, prompt=texts[met[cell.label] % len(texts)], topic=cell.label))
            met[cell.label] += 1
    return found


def random_directions(directions: Mapping[int, "Direction"], seed: int) -> dict[int, "Direction"]:
    """For every latent a direction of the same norm drawn at random (uniform on the sphere), seeded by latent."""
    import torch

    found = {}
    for latent, direction in directions.items():
        generator = torch.Generator().manual_seed(derived_seed("direction", seed, latent))
        drawn = torch.randn(direction.unit.shape, generator=generator)
        found[latent] = replace(direction, unit=drawn / drawn.norm(), label=None)
    return found


def with_latents(cells: Sequence[Cell], instead: Mapping[int, "Direction"]) -> list[Cell]:
    """Cells steered by other latents; `instead` gives each latent's stand-in."""
    return [
        replace(cell, latent=other.latent, label=other.label)
        for cell in cells
        if cell.latent is not None and (other := instead[cell.latent])
    ]


def first_half(response: str) -> str:
    """Half of a response's words, rounded up, with the white space behind them left out."""
    ends = [word.end() for word in re.finditer(r"\S+", response)]
    return response[: ends[(len(ends) - 1) // 2]] if ends else ""


def opening(response: str, count: int) -> str:
    """How a response begins: `count` sentences of its first attempt, or half its words if it has no more than that."""
    first = response[: attempts(response)[0][1]]
    found = sentences(first)
    if len(found) > count:
        return first[: found[count - 1][1]]
    words = first.split(" ")
    return " ".join(words[: (len(words) + 1) // 2]).rstrip()


def matched(reply: str, cue: str) -> tuple[str, str]:
    """A correction, and an on-topic text of as many words, as far as the reply has them.

    The correction is the cue and half as many words of an on-topic reply as `opening` takes; the other text is the
    beginning of the same reply. Both end wherever their last word is, so that neither is helped by a sentence's end.

    Args:
        reply: an on-topic one.
    """
    ends = [word.end() for word in re.finditer(r"\S+", reply)]
    if not ends:
        return cue, reply
    own = max(1, len(opening(reply, PREFIX_SENTENCES).split()) // 2)
    both = min(own + len(cue.split()), max(len(ends) - 1, 1))
    return f"{cue} {reply[: ends[own - 1]].lstrip()}", reply[: ends[both - 1]]


def through_restart(trial: Trial) -> str | None:
    """A response up to the end of its first restart's cue; None if it has no restart."""
    response, judged = trial.response, trial.attempts
    starts = [judged[1].start] if len(judged) > 1 else [start for start, _ in attempts(response)[1:2]]
    if not starts:
        return None
    cue = next((end for start, end in find_cues(response) if start <= starts[0] < end), None)
    if cue is not None:
        return response[:cue]
    sentence = next((end for _, end in sentences(response) if end > starts[0]), len(response))
    return response[:sentence]
