"""Conditions: how the same cells are run. Steered or not, how hard, along what, and from which words on."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from esr_train.recipe import BoostSection, EvalSection
from esr_train.restarts import attempts, find_cues, sentences
from eval.cells import Cell, derived_seed
from eval.store import Trial
from eval.trials import Steerer

if TYPE_CHECKING:
    from esr_train.steering.directions import Direction

TITLES = {
    "steered": "Steered at the base model's thresholds",
    "unsteered": "Unsteered",
    "steered_recalibrated": "Steered at the arm's own thresholds",
    "random_direction": "Steered along random directions of equal norm",
    "random_latents": "Steered by random latents of like frequency and decoder norm",
    "unsteered_continues": "Unsteered, going on from the base model's steered beginning",
    "steered_continues": "Steered, going on from the base model's unsteered beginning",
    "switched_off": "Steered until the first restart, then unsteered",
}
LATE = ("unsteered_continues", "steered_continues", "switched_off")
"""Conditions that go on from responses of others; they run last."""


@dataclass(frozen=True)
class Plan:
    """A condition as one arm runs it.

    Args:
        condition: its name, as in trial rows.
        cells: what is run.
        steerer: how a cell is steered.
        prefixes: cell key -> text with which the reply already begins.
    """

    condition: str
    cells: tuple[Cell, ...]
    steerer: Steerer
    prefixes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Boost:
    """A strength beside the threshold: a multiple of it, or standard deviations of its posterior added to it."""

    multiple: float = 1.0
    deviations: float = 0.0


def boosts(section: BoostSection) -> dict[str, Boost]:
    """Every boost of a sweep by its condition's name: `boost_x1.25`, `boost_+1sd`."""
    found = {f"boost_x{multiple:g}": Boost(multiple=multiple) for multiple in section.multiples}
    return found | {f"boost_{count:+g}sd": Boost(deviations=count) for count in section.deviations}


def names(section: EvalSection) -> tuple[str, ...]:
    """The conditions in the order in which they run; a sweep is one condition for each strength."""
    found: list[str] = []
    for condition in dict.fromkeys(section.conditions):
        found += boosts(section.boost) if condition == "boost" else [condition]
    return tuple(sorted(found, key=LATE.__contains__))


def title(condition: str) -> str:
    """A condition's name in words."""
    if condition.startswith("boost_x"):
        return f"Steered at {condition.removeprefix('boost_x')} × the threshold"
    if condition.startswith("boost_"):
        count = condition.removeprefix("boost_").removesuffix("sd").replace("-", "− ").replace("+", "+ ")
        plural = "" if count[2:] == "1" else "s"
        return f"Steered at the threshold {count} standard deviation{plural} of its posterior"
    return TITLES.get(condition, condition)


def order(condition: str) -> tuple[int, float, str]:
    """Where a condition stands among others: the known ones first, each sweep by strength, then the rest by name."""
    known = list(TITLES)
    if condition in known:
        return known.index(condition), 0.0, condition
    for place, (before, after) in enumerate((("boost_x", ""), ("boost_", "sd")), start=len(known)):
        if condition.startswith(before) and condition.endswith(after):
            with suppress(ValueError):
                return place, float(condition.removeprefix(before).removesuffix(after)), condition
    return len(known) + 2, 0.0, condition


def boosted(
    cells: Sequence[Cell], boost: Boost, norms: Mapping[int, float], spreads: Mapping[int, float]
) -> list[Cell]:
    """Cells at another strength; a cell whose strength would not be above 0 is left out.

    Args:
        cells: steered ones.
        boost: the other strength.
        norms: latent -> threshold.
        spreads: latent -> standard deviation of its threshold's posterior.
    """
    found = []
    for cell in cells:
        assert cell.latent is not None
        multiple = boost.multiple + boost.deviations * spreads[cell.latent] / norms[cell.latent]
        if multiple > 0:
            found.append(replace(cell, multiple=round(multiple, 6)))
    return found


def unlabelled(cells: Sequence[Cell]) -> list[Cell]:
    """Cells whose direction stands for nothing, so that nothing can be hijacked towards it."""
    return [replace(cell, label=None) for cell in cells]


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


def opening(response: str, count: int) -> str:
    """How a response begins: `count` sentences of its first attempt, or half its words if it has no more than that."""
    first = response[: attempts(response)[0][1]]
    found = sentences(first)
    if len(found) > count:
        return first[: found[count - 1][1]]
    words = first.split(" ")
    return " ".join(words[: (len(words) + 1) // 2]).rstrip()


def through_restart(trial: Trial) -> str | None:
    """A response up to the end of its first restart's cue; None if it has no restart."""
    response, found = trial.response, trial.attempts
    starts = [found[1].start] if len(found) > 1 else [start for start, _ in attempts(response)[1:2]]
    if not starts:
        return None
    cue = next((end for start, end in find_cues(response) if start <= starts[0] < end), None)
    if cue is not None:
        return str(response[:cue])
    sentence = next((end for _, end in sentences(response) if end > starts[0]), len(response))
    return str(response[:sentence])
