"""How many trials an experiment needs, planned from the clustering of an earlier one."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from eval.statistics import ALPHA, totals


def intra_cluster_correlation(values: ArrayLike, clusters: Sequence[Hashable]) -> float | None:
    """The ANOVA estimate of the intra-cluster correlation; None where it is undefined."""
    x = np.asarray(values, dtype=float)
    sums, sizes = totals(x, clusters)
    k, n = len(sums), len(x)
    if k < 2 or n <= k:
        return None
    between = float((sizes * (sums / sizes - x.mean()) ** 2).sum()) / (k - 1)
    within = (float((x**2).sum()) - float((sums**2 / sizes).sum())) / (n - k)
    size = (n - float((sizes**2).sum()) / n) / (k - 1)
    spread = between + (size - 1) * within
    return (between - within) / spread if spread > 0 else None


def trials_needed(
    base: float, other: float, icc: float, per_cluster: int, power: float = 0.8, alpha: float = ALPHA
) -> int:
    """Trials per arm to tell rates `base` and `other` apart (two-sided), arms independent.

    Normal approximation for two proportions (Fleiss 1981) times the design effect 1 + (m - 1) icc, rounded
    up to whole clusters. Cells shared by the arms need fewer, so this is on the safe side.

    Raises:
        ValueError: if the rates are equal or outside [0, 1].
    """
    from scipy.stats import norm

    if base == other or not (0 <= base <= 1 and 0 <= other <= 1):
        raise ValueError(f"rates must differ and lie in [0, 1]: {base}, {other}")
    middle = (base + other) / 2
    spread = norm.ppf(1 - alpha / 2) * math.sqrt(2 * middle * (1 - middle))
    spread += norm.ppf(power) * math.sqrt(base * (1 - base) + other * (1 - other))
    independent = (spread / (base - other)) ** 2
    clusters = math.ceil(independent * (1 + (per_cluster - 1) * icc) / per_cluster - 1e-9)
    return clusters * per_cluster
