"""How many trials an experiment needs, planned from the clustering of an earlier one."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from esr_train.errors import InputError
from eval.metrics import METRICS, Gap
from eval.statistics import ALPHA, cluster_of, totals
from eval.store import Trial

DIFFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2)
PER_LATENT = (1, 4, 10, 25)


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


def planned_from(trials: Sequence[Trial], condition: str, name: str) -> tuple[float, float]:
    """A metric's rate and its intra-cluster correlation (0 where it cannot be estimated) in a condition's trials.

    Raises:
        InputError: if the metric is no rate, or no trial has a value.
    """
    rates = [rate for rate, metric in METRICS.items() if metric.is_rate]
    if name not in rates:
        raise InputError(f"{name!r} is not a rate", "--metric", f"Take one of {', '.join(rates)}.")
    measured = sorted({trial.condition for trial in trials})
    if measured and condition not in measured:
        raise InputError(f"no trial ran under {condition!r}", "--condition", f"Take one of {', '.join(measured)}.")
    here = [trial for trial in trials if trial.condition == condition]
    scored = [trial for trial in here if not isinstance(METRICS[name].of(trial), Gap)]
    if not scored:
        raise InputError(f"no trial has a value of {name}", "--run", "Name a run whose base arm was measured.")
    events, clusters = METRICS[name].values(scored), [cluster_of(trial) for trial in scored]
    return sum(events) / len(events), max(intra_cluster_correlation(events, clusters) or 0.0, 0.0)


def table(
    base: float,
    icc: float,
    others: Sequence[float] = (),
    per_latent: Sequence[int] = PER_LATENT,
    power: float = 0.8,
) -> list[str]:
    """Lines for a terminal: trials per arm for each other rate, at several numbers of trials per latent.

    Args:
        base: the rate without the effect.
        icc: intra-cluster correlation.
        others: rates to be told from it; above it by `DIFFERENCES` unless given.
        per_latent: trials per latent, a column each.
        power: chance of seeing the difference.

    Raises:
        InputError: for numbers outside 0 to 1, or nothing to compare with.
    """
    shares = {"--base": base, "--icc": icc, "--power": power, **{f"--other {other:g}": other for other in others}}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise InputError(f"{value:g} is not a share", name, "Give a number from 0 to 1.")
    rates = [rate for rate in others or [base + step for step in DIFFERENCES] if rate != base and rate <= 1]
    if not rates:
        raise InputError("there is no other rate to compare with", "--other", "Give one that differs from --base.")
    if not 0 < power < 1 or min(per_latent) < 1:
        raise InputError("power lies between 0 and 1, and a latent has one trial at least", "--power, --per-latent")
    head = f"Trials per arm to tell a rate from {base:.1%} with {power:.0%} power at 5 % (two-sided; cells not shared)"
    rows = [["other rate", *(f"{count} per latent" for count in per_latent)]]
    for rate in rates:
        needed = [(count, trials_needed(base, rate, icc, count, power)) for count in per_latent]
        rows.append([f"{rate:.1%}", *(f"{trials:,} ({trials // count} latents)" for count, trials in needed)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return [f"{head}; intra-latent correlation {icc:.3f}", "", *lines]
