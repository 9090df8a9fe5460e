"""Directions optimised against an arm, within the base model's thresholds, on prompts that are not the test's."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean

import torch
from safetensors.torch import load_file
from torch.nn import functional

from esr_train.files import read_jsonl, write_json, write_jsonl
from esr_train.provenance import sha256
from esr_train.steering.adaptive import Target, optimise
from esr_train.steering.directions import Direction, SteeringVector
from esr_train.steering.engine import Request
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.steering.vector_files import save_vectors
from esr_train.template import encode_prompt
from esr_train.transcript import Steering, Transcript, VectorRef
from esr_train.values import typed
from eval.arms import Arm, Variant
from eval.cells import Cell, Prompt, Split, derived_seed
from eval.trials import ConditionRun, Observer, Plan, Readings, Steerer
from recipes.experiment import Experiment, base_inputs
from recipes.stages.stage_cache import Stage

PROMPTS = 6
"""Training prompts that a direction is optimised on."""
TOKENS = 32
"""Of a reply that it is to bring about."""
PUSH = 1.2
"""Multiple of the threshold at which the base model wrote these replies."""
STEPS = 20
"""Of Adam, from each start."""
STARTS, MOVES = 2, 4
"""Of a test direction: from how many directions steps are taken, and how many moves (none is one) are compared."""
MOVED = "moved"
"""What the steps from the direction itself lead to; training takes it uncompared."""
DRAWS = 2
"""Replies to each of its prompts by which a direction's candidates are compared."""


@dataclass(frozen=True)
class Reply:
    """What the base model wrote on a training prompt: off-topic under a direction, or when nobody steered it."""

    latent: int
    prompt: str
    reply: str
    steered: bool


@dataclass(frozen=True)
class Attacked:
    """What is attacked.

    Args:
        name: of the arm, and of the vectors' file.
        fingerprint: of what decides its trials.
        split: whose latents are optimised.
        variant: what it does to every request.
    """

    name: str
    fingerprint: str
    variant: Variant
    open: Callable[[], Arm]
    split: Split = "test"


@dataclass(frozen=True)
class Search:
    """What was tried for a direction.

    Args:
        losses: start -> before and after every step, as `Optimised` has them.
        scores: candidate -> mean last score of the arm's own replies on training prompts; None: none was scored.
    """

    losses: Mapping[str, Sequence[float]]
    scores: Mapping[str, float | None]

    @property
    def taken(self) -> str:
        """The candidate under which the arm scores lowest; of equal ones, and where none was compared, the first."""
        return min(self.scores, key=lambda name: (self.scores[name] is None, self.scores[name]), default=MOVED)


@dataclass(frozen=True)
class MovedDirections:
    """Directions of training rows as they were optimised against an arm.

    Args:
        file: with a vector for each, by a name of its own.
        names: latent -> its vector's name.
        fingerprint: of what decides them.
    """

    file: Path
    names: Mapping[int, str]
    fingerprint: str

    def steered(self, rows: Sequence[Transcript]) -> list[Transcript]:
        """The rows, those that are steered along their moved directions, as strongly as before."""
        ref = VectorRef(str(self.file), sha256(self.file))
        return [replace(row, steering=row.steering and self._moved(row.steering, ref)) for row in rows]

    def _moved(self, steering: Steering, ref: VectorRef) -> Steering:
        # Rows that vectors of one's own steer name them by their label alone.
        name = steering.label if steering.latent is None else self.names[steering.latent]
        return Steering(None, steering.layer, None, name, steering.strength, ref)


def adapted_directions(
    experiment: Experiment, attacked: Attacked, steerer: Steerer, latents: Sequence[int]
) -> dict[int, Direction]:
    """Latent -> its direction, moved on the sphere: what the base model wrote when it was steered is to become likely
    for the arm, and what it wrote when nobody steered it unlikely. Of several such moves, and none, the one under
    which the arm's own replies score lowest on training prompts.

    The arm has no edits of its own, and transformers runs it: `preflight` has looked.
    """
    moved = moved_directions(experiment, attacked, steerer, latents)
    vectors = load_file(moved.file)
    units = [functional.normalize(vectors[name].float(), dim=0) for name in moved.names.values()]
    return dict(_steered_along(steerer, moved.names, units).directions)


def moved_directions(
    experiment: Experiment, attacked: Attacked, steerer: Steerer, latents: Sequence[int]
) -> MovedDirections:
    """The file of such directions, optimised first unless that is done."""
    fingerprint, names = _write_targets(experiment, attacked, steerer, latents), _names(steerer, latents)
    stem = f"attacks/{attacked.name}" + ("" if attacked.split == "test" else f"-{attacked.split}")
    file, record = f"{stem}.safetensors", f"{stem}.json"

    def work() -> None:
        moved, searches = _searched(experiment, attacked, steerer, names)
        save_vectors(experiment.directory / file, moved)
        found = zip(names.values(), searches, strict=True)
        write_json(experiment.directory / record, {name: asdict(each) | {"taken": each.taken} for name, each in found})

    called = [[latent, name] for latent, name in names.items()]
    inputs = {"arm": attacked.fingerprint, "targets": fingerprint, "positions": steerer.positions, "names": called}
    modules = ("esr_train.steering.adaptive", "recipes.using.attacks")
    stage = Stage(f"attack/{stem.removeprefix('attacks/')}", inputs, (file, record), modules)
    return MovedDirections(experiment.directory / file, names, experiment.cache.do(stage, work))


def _names(steerer: Steerer, latents: Sequence[int]) -> dict[int, str]:
    """What the moved directions are called: as what they stand for, where that is not the same for two of them."""
    labels = {latent: steerer.directions[latent].label or str(latent) for latent in latents}
    counts = Counter(labels.values())
    return {latent: label if counts[label] == 1 else f"{label} ({latent})" for latent, label in labels.items()}


def _targets(experiment: Experiment, attacked: Attacked) -> Path:
    return experiment.directory / f"attacks/targets{'' if attacked.split == 'test' else f'-{attacked.split}'}.jsonl"


def _write_targets(experiment: Experiment, attacked: Attacked, steerer: Steerer, latents: Sequence[int]) -> str:
    """Let the base model write what the directions are to bring about, unless that is done; its fingerprint."""
    asked = [
        (latent, prompt.text, steered)
        for latent in latents
        for prompt in _prompts(experiment, steerer.directions[latent].label, latent)
        for steered in (True, False)
    ]
    norms, file = [[latent, steerer.norms[latent]] for latent in latents], _targets(experiment, attacked)
    inputs = {"base": base_inputs(experiment), "norms": norms, "asked": asked, "positions": steerer.positions}

    def work() -> None:
        pushes = {each: steerer.directions[each].add(PUSH * steerer.norms[each], steerer.positions) for each in latents}
        requests = [
            Request(
                f"{latent}: {prompt}",
                prompt,
                interventions=(pushes[latent],) if steered else (),
                seed=derived_seed("attack", experiment.recipe.seed, latent, prompt),
            )
            for latent, prompt, steered in asked
        ]
        sampling = replace(experiment.resources.sampling(), max_new_tokens=TOKENS)
        written = experiment.resources.base().generate(requests, sampling)
        rows = [
            Reply(latent, prompt, done.text, steered)
            for (latent, prompt, steered), done in zip(asked, written, strict=True)
            if done.text.strip()
        ]
        write_jsonl(file, map(asdict, rows))

    name = "attack" if attacked.split == "test" else f"attack-{attacked.split}"
    outputs = (str(file.relative_to(experiment.directory)),)
    return experiment.cache.do(Stage(name, inputs, outputs, ("recipes.using.attacks",)), work)


def _prompts(experiment: Experiment, label: str | None, latent: int) -> list[Prompt]:
    others = [prompt for prompt in experiment.resources.prompts().train if prompt.topic != label]
    Random(derived_seed("attack", experiment.recipe.seed, latent)).shuffle(others)
    return others[:PROMPTS]


def _searched(
    experiment: Experiment, attacked: Attacked, steerer: Steerer, names: Mapping[int, str]
) -> tuple[list[SteeringVector], list[Search]]:
    """The moved directions, and what was tried for each: of those to train on, the first move alone."""
    arm, targets = attacked.open(), _read_targets(experiment, attacked, steerer, list(names))
    assert isinstance(arm.engine, TransformersEngine)
    directions = [steerer.directions[latent] for latent in names]
    units = torch.stack([direction.unit.float() for direction in directions])
    pushes = (direction.add(steerer.norms[latent]) for latent, direction in zip(names, directions, strict=True))
    length = torch.stack([push.vector.float().norm() for push in pushes])
    layer, compares = directions[0].layer, attacked.split == "test"
    starts = {"own": units} | ({"tilted": _tilted(units, experiment.recipe.seed)} if compares else {})
    found = {
        name: optimise(arm.engine.model, layer, targets, begun, length, steps=STEPS) for name, begun in starts.items()
    }
    tried, scores = {MOVED: found["own"].units}, dict[str, dict[int, float]]()
    if compares:
        tried |= {
            "moved from a tilted start": found["tilted"].units,
            "moved halfway": functional.normalize(units + found["own"].units, dim=1),
            "as it was": units,
        }
        cells = _cells(experiment, steerer, list(names))
        scores = {name: _scores(arm, _steered_along(steerer, names, each), cells) for name, each in tried.items()}
    moved, searches = [], []
    for number, (latent, direction) in enumerate(zip(names, directions, strict=True)):
        losses = {start: each.losses[:, number].tolist() for start, each in found.items()}
        search = Search(losses, {name: each.get(latent) for name, each in scores.items()})
        unit = tried[search.taken][number]
        moved.append(SteeringVector(layer, names[latent], unit, direction.length, direction.residual_norm))
        searches.append(search)
    return moved, searches


def _steered_along(steerer: Steerer, latents: Iterable[int], units: Iterable[torch.Tensor]) -> Steerer:
    moved = {
        latent: replace(steerer.directions[latent], unit=unit) for latent, unit in zip(latents, units, strict=True)
    }
    return replace(steerer, directions=moved)


def _tilted(units: torch.Tensor, seed: int) -> torch.Tensor:
    """Halfway between directions and random ones."""
    drawn = torch.randn(units.shape, generator=torch.Generator().manual_seed(derived_seed("attack", seed)))
    return functional.normalize(units + functional.normalize(drawn, dim=1), dim=1)


def _read_targets(experiment: Experiment, attacked: Attacked, steerer: Steerer, latents: Sequence[int]) -> list[Target]:
    """What the base model wrote, as targets of the directions of these latents, in their order."""
    tokenizer, place = experiment.resources.tokenizer(), {latent: number for number, latent in enumerate(latents)}
    targets = []
    for each in read_jsonl(_targets(experiment, attacked), lambda row: typed(Reply, row)):
        request = attacked.variant.apply(Request("", each.prompt), steerer.directions[each.latent].label)
        prompt, _ = encode_prompt(tokenizer, request.prompt)
        whole, start = encode_prompt(tokenizer, request.prompt, None, each.reply)
        steered = start if steerer.positions == "generated" else 0
        targets.append(Target(place[each.latent], tuple(whole), len(prompt), steered, each.steered))
    return targets


def _cells(experiment: Experiment, steerer: Steerer, latents: Sequence[int]) -> list[Cell]:
    """Training prompts on which the candidates for these latents' directions are compared."""
    seed = experiment.recipe.seed
    return [
        Cell(prompt.text, prompt.topic, latent, label, 1.0, derived_seed("attack", seed, latent, prompt.text, draw))
        for latent, label in ((each, steerer.directions[each].label) for each in latents)
        for prompt in _prompts(experiment, label, latent)
        for draw in range(DRAWS)
    ]


def _scores(arm: Arm, steerer: Steerer, cells: Sequence[Cell]) -> dict[int, float]:
    """Latent -> mean last score of the arm's own replies to its cells, where any could be scored."""
    run = ConditionRun(arm, "adaptive", Plan(tuple(cells), steerer), Readings())
    found = defaultdict[int, list[float]](list)
    for trial in run.trials([(cell.key, cell) for cell in cells], Observer()):
        if trial.attempts and (score := trial.attempts[-1].score) is not None and trial.cell.latent is not None:
            found[trial.cell.latent].append(score)
    return {latent: mean(scores) for latent, scores in found.items()}
