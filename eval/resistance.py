"""How much harder an arm must be pushed than the base model before it derails: the resistance factor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import eval.statistics as statistics
from eval.calibration import Threshold


@dataclass(frozen=True)
class Resistance:
    """An arm's own thresholds over the base model's, direction by direction.

    A direction whose own threshold lies at the highest strength that was searched enters there, so that `value` is at
    least what is given; one at the lowest strength enters there, too, and makes `value` at most that. The median does
    not feel either, as long as they are fewer than half.

    Args:
        value: geometric mean of the ratios; None without a direction.
        low, high: its 95 % interval, clustered by direction; None for a single one.
        median: of the ratios.
        n: directions, each counted once.
        at_high, at_low: own thresholds at the highest and at the lowest strength searched (of all runs).
    """

    value: float | None
    low: float | None
    high: float | None
    median: float | None
    n: int
    at_high: int
    at_low: int


def resistance(
    pairs: Sequence[tuple[Threshold, Threshold]], bootstrap: int = statistics.RESAMPLES, seed: int = 0
) -> Resistance:
    """The resistance factor from (own, base) thresholds, those of several runs of one direction together.

    Args:
        pairs: of one direction each; where the base's threshold is itself at a bound the pair is left out.
        bootstrap: resamples.
    """
    known = sorted(
        ((own, base) for own, base in pairs if base.bound is None), key=lambda pair: (pair[0].latent, pair[0].norm)
    )
    logs = [math.log(own.norm / base.norm) for own, base in known]
    latents = [own.latent for own, _ in known]
    found = statistics.mean(logs, latents, resamples=bootstrap, seed=seed)
    value, low, high = (None if end is None else math.exp(end) for end in (found.value, found.low, found.high))
    return Resistance(
        value,
        low,
        high,
        math.exp(median(logs)) if logs else None,
        len(set(latents)),
        sum(own.bound == "high" for own, _ in known),
        sum(own.bound == "low" for own, _ in known),
    )


def thresholds_paired(own: Sequence[Threshold], base: Sequence[Threshold]) -> list[tuple[Threshold, Threshold]]:
    """(own, base) of every direction that both have."""
    of_base = {threshold.latent: threshold for threshold in base}
    return [(threshold, of_base[threshold.latent]) for threshold in own if threshold.latent in of_base]
