"""How far judges agree with one another, or with themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa of two judges' yes/no findings.

    Args:
        kappa: agreement beyond chance; None where both always say the same word, so chance explains all.
        agreement: share of items on which they agree.
        prevalence: share of yes over both judges. Kappa is low at extreme prevalence even for good judges
            (Feinstein & Cicchetti 1990), so it is never shown alone.
        n: items both judged.
    """

    kappa: float | None
    agreement: float | None
    prevalence: float | None
    n: int


def kappa(first: Sequence[bool | None], second: Sequence[bool | None]) -> Kappa:
    """Cohen's kappa over the items both judges decided (None: undecided).

    Raises:
        ValueError: if the lengths differ.
    """
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not both:
        return Kappa(None, None, None, 0)
    yes = np.array(both, dtype=float)
    agreement = float((yes[:, 0] == yes[:, 1]).mean())
    p, q = float(yes[:, 0].mean()), float(yes[:, 1].mean())
    chance = p * q + (1 - p) * (1 - q)
    beyond = None if chance >= 1 else (agreement - chance) / (1 - chance)
    return Kappa(beyond, agreement, (p + q) / 2, len(both))


def krippendorff_alpha(ratings: ArrayLike, interval: bool = True) -> float | None:
    """Krippendorff's alpha (2011) for any number of judges, with gaps.

    Args:
        ratings: [judges, items], NaN where a judge gave none.
        interval: scores, where distance is the squared difference; else categories, equal or not.

    Returns:
        1 for full agreement, 0 for chance; None if no item has two ratings or nothing varies.
    """
    table = np.asarray(ratings, dtype=float)
    units = [unit for unit in (column[~np.isnan(column)] for column in table.T) if len(unit) >= 2]
    if not units:
        return None
    distance = _squared if interval else _unequal
    values = np.concatenate(units)
    observed = sum(float(distance(unit).sum()) / (len(unit) - 1) for unit in units) / len(values)
    expected = float(distance(values).sum()) / len(values) / (len(values) - 1)
    return None if expected == 0 else 1 - observed / expected


def _squared(values: np.ndarray) -> np.ndarray:
    return (values[:, None] - values[None, :]) ** 2


def _unequal(values: np.ndarray) -> np.ndarray:
    return (values[:, None] != values[None, :]).astype(float)
