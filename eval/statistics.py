"""Rates, means and differences with intervals that know trials cluster.

Trials of one latent share its direction, label and threshold, so they are not independent: n trials carry the
information of n / design effect. Every interval here is 95 % and resamples, or discounts for, whole clusters.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from eval.store import Trial

RESAMPLES = 2000
ALPHA = 0.05
UNBOUNDED = (-math.inf, math.inf)
ENOUGH_CLUSTERS = 8
"""With fewer clusters than this with an event no bootstrap is used."""
PRIOR_ICC = 0.05
"""Intra-cluster correlation assumed at least where events are too few to estimate it."""

Floats = NDArray[np.float64]
Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Args:
        value: the rate or mean; None where nothing is defined (n = 0).
        low: lower end; None where one cluster alone says nothing about the spread.
        n: trials that count.
        unscored: trials left out because the judge failed on them.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int = 0


def cluster_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    bounds: tuple[float, float] = UNBOUNDED,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The 95 % interval of the mean of `values` that holds though values of one cluster are alike.

    Args:
        values: one for each trial; all 0 or 1 are a rate (see `rate`), others a mean (see `mean`).
        clusters: what each trial belongs to: its latent where it was steered, else its prompt.
        bounds: the least and the largest value there can be, such as 0 and 100 of scores.
        resamples: of the bootstrap.
        seed: of the resampling; the same values in any order give the same interval.

    Returns:
        Both ends; None where one cluster alone says nothing about the spread, or there is no value.

    Raises:
        ValueError: for values that are not finite (leave out what a judge failed on), or unequal lengths.
    """
    x = np.asarray(values, dtype=float)
    if not np.isfinite(x).all():
        raise ValueError("a value is not finite: leave unscored trials out, with their clusters")
    given = (x, list(clusters), 0, resamples, seed)
    found = rate(*given) if np.isin(x, (0, 1)).all() else mean(*given, bounds=bounds)
    return (None, None) if found.low is None or found.high is None else (float(found.low), float(found.high))


def cluster_of(trial: "Trial") -> Hashable:
    """The cluster a trial belongs to; the only place that decides it.

    A steered trial clusters by its latent: latents are what we sampled and what we generalise to, and the
    trials of one latent share its strength and its label. An unsteered trial has no latent; what its repeats
    share is the prompt, so it clusters by prompt.
    """
    cell = trial.cell
    return ("prompt", cell.prompt) if cell.latent is None else ("latent", cell.latent)


def rate(
    events: ArrayLike,
    clusters: Sequence[Hashable],
    unscored: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The share of `events` (0/1, [trials]) with an interval that holds at 1 % as well as at 50 %.

    Studentised cluster bootstrap on the arcsine scale (Efron & Tibshirani 1993, ch. 12) where at least
    `ENOUGH_CLUSTERS` clusters have an event and as many a non-event; otherwise Wilson with the design effect,
    which stays honest down to no event at all. The percentile bootstrap covers only 60-90 % there.
    """
    x = np.asarray(events, dtype=float)
    if not len(x):
        return Estimate(None, None, None, 0, unscored)
    p = float(x.mean())
    sums, sizes = totals(x, clusters)
    if min((sums > 0).sum(), (sums < sizes).sum()) >= ENOUGH_CLUSTERS:
        low, high = _arcsine_interval(sums, sizes, resamples, seed)
    else:
        low, high = wilson(p * len(x), len(x), design_effect(x, clusters, PRIOR_ICC), len(sums))
    return Estimate(p, min(low, p), max(high, p), len(x), unscored)


def mean(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    unscored: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Estimate:
    """The mean over trials, with a studentised cluster bootstrap (Student's t over few clusters).

    `bounds` are the least and the largest value there can be; the interval does not pass them.
    """
    x = np.asarray(values, dtype=float)
    if not len(x):
        return Estimate(None, None, None, 0, unscored)
    ends = _mean_interval(*totals(x, clusters), resamples, seed)
    low, high = (None if end is None else float(np.clip(end, *bounds)) for end in ends)
    return Estimate(float(x.mean()), low, high, len(x), unscored)


def ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    clusters: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """sum(numerators) / sum(denominators), [observations] each, with the interval of `mean`; n counts observations."""
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if not below.sum():
        return Estimate(None, None, None, 0)
    sums, sizes = totals(above, clusters)[0], totals(below, clusters)[0]
    low, high = _mean_interval(sums, sizes, resamples, seed)
    return Estimate(float(above.sum() / below.sum()), low, high, len(above))


def paired(
    differences: ArrayLike,
    clusters: Sequence[Hashable],
    unscored: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
    of_rates: bool = False,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Estimate:
    """The mean of per-cell differences, clustered like the cells; its interval stays within `bounds`.

    With `of_rates` and no cell that differs, the interval is what no event in n cells still allows on either
    side, instead of [0, 0].
    """
    estimate = mean(differences, clusters, unscored, resamples, seed, bounds)
    x = np.asarray(differences, dtype=float)
    if not of_rates or not len(x) or x.any():
        return estimate
    bound = rate(x, clusters).high
    return Estimate(0.0, None if bound is None else -bound, bound, len(x), unscored)


def two_way_interval(
    values: ArrayLike,
    latents: Sequence[Hashable],
    prompts: Sequence[Hashable],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A sensitivity check that resamples latents and prompts at once (pigeonhole bootstrap, Owen 2007).

    Percentile interval; conservative, because noise within a cell is counted in both directions.
    """
    x = np.asarray(values, dtype=float)
    rows, columns = _codes(latents), _codes(prompts)
    shape = int(rows.max(initial=-1)) + 1, int(columns.max(initial=-1)) + 1
    if min(shape) < 2:
        return None, None
    by_latent, by_prompt = _resamples(shape[0], resamples, seed), _resamples(shape[1], resamples, seed + 1)
    # Summed per latent and prompt first, so that the work does not grow with the number of trials.
    sums, sizes = (_table(rows, columns, shape, weights) for weights in (x, np.ones(len(x))))
    drawn = ((by_latent @ sizes) * by_prompt).sum(axis=1)
    means = ((by_latent @ sums) * by_prompt).sum(axis=1)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def _table(rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int], values: Floats) -> Floats:
    """Sums of `values` [trials] in each row and column, [rows, columns]."""
    flat = np.bincount(rows * shape[1] + columns, weights=values, minlength=shape[0] * shape[1])
    return flat.reshape(shape).astype(np.float64)


def sign_flip(differences: ArrayLike, clusters: Sequence[Hashable], draws: int = 10_000, seed: int = 0) -> float | None:
    """Two-sided p-value that arms do not differ: each cluster's summed difference is as likely
    to have the other sign.

    Exact (all sign patterns) up to 12 clusters, else `draws` random patterns with the add-one correction.
    None for fewer than two clusters, where no pattern is unlikely.
    """
    sums, _ = totals(np.asarray(differences, dtype=float), clusters)
    if len(sums) < 2:
        return None
    observed = abs(sums.sum()) - 1e-9
    if len(sums) <= 12:
        patterns = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        return float((np.abs((2 * patterns - 1) @ sums) >= observed).mean())
    reached = np.abs(_signs(len(sums), draws, seed) @ sums) >= observed
    return float((1 + reached.sum()) / (1 + draws))


@lru_cache(maxsize=16)
def _signs(clusters: int, draws: int, seed: int) -> Floats:
    """Random signs, [draws, clusters]."""
    heads = np.random.default_rng(seed).integers(0, 2, size=(draws, clusters))
    return 2 * heads.astype(np.float64) - 1


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def wilson(events: float, n: int, deff: float = 1.0, clusters: int | None = None) -> tuple[float, float]:
    """Wilson's score interval for `events` of `n`, at the effective sample size n / `deff`.

    With `clusters`, Student's t with clusters - 1 degrees of freedom takes the normal quantile's place.
    """
    size, z = n / deff, _quantile(clusters)
    p = events / n
    centre = (p + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
    return max(0.0, centre - half), min(1.0, centre + half)


def design_effect(events: ArrayLike, clusters: Sequence[Hashable], least_icc: float = 0.0) -> float:
    """How many times larger the variance of a clustered rate is than that of independent trials.

    At least 1 + (m - 1) * `least_icc` with m the trials per cluster (size-weighted), and at least 1. One
    cluster alone counts as one observation.
    """
    x = np.asarray(events, dtype=float)
    sums, sizes = totals(x, clusters)
    if len(sums) < 2:
        return float(len(x))
    p = x.mean()
    floor = 1 + (float((sizes**2).sum()) / len(x) - 1) * least_icc
    if p in (0, 1):
        return floor
    return max(floor, _variance(sums, sizes) / (p * (1 - p) / len(x)), 1.0)


def _codes(labels: Sequence[Hashable]) -> NDArray[np.int64]:
    """Labels as numbers 0 … k - 1, in sorted order so that the order of the rows does not matter."""
    order = {label: code for code, label in enumerate(sorted(set(labels), key=repr))}
    return np.array([order[label] for label in labels], dtype=np.int64)


def totals(values: Floats, clusters: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """Sum and size of every cluster, [clusters] each."""
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} cluster labels")
    codes = _codes(clusters)
    sums = np.bincount(codes, weights=values).astype(np.float64)
    return sums, np.bincount(codes).astype(np.float64)


@lru_cache(maxsize=16)
def _resamples(clusters: int, resamples: int, seed: int) -> Floats:
    """How often each cluster is drawn in each resample, [resamples, clusters]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(float)


def _variance(sums: Floats, sizes: Floats) -> float:
    """Linearised variance of the ratio sum(sums) / sum(sizes) (Cochran 1977, 11.8)."""
    k, n = len(sums), sizes.sum()
    residuals = sums - sums.sum() / n * sizes
    return float(k / (k - 1) * (residuals**2).sum() / n**2)


def _resampled(sums: Floats, sizes: Floats, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """The ratio and its linearised variance in every resample, [resamples] each."""
    weights = _resamples(len(sums), resamples, seed)
    n = weights @ sizes
    ratio = (weights @ sums) / n
    residuals = weights @ sums**2 - 2 * ratio * (weights @ (sums * sizes)) + ratio**2 * (weights @ sizes**2)
    return ratio, np.maximum(residuals, 0) * len(sums) / (len(sums) - 1) / n**2


def _arcsine_interval(sums: Floats, sizes: Floats, resamples: int, seed: int) -> tuple[float, float]:
    p = sums.sum() / sizes.sum()
    ratio, variance = _resampled(sums, sizes, resamples, seed)
    # A resample without an event, or with nothing else, has no spread of its own: the tiny numbers let it
    # count as an extreme draw instead of dividing zero by zero.
    ratio = np.clip(ratio, 1e-12, 1 - 1e-12)
    error = np.sqrt(np.maximum(variance, 1e-16)) * 0.5 / np.sqrt(ratio * (1 - ratio))
    centre = math.asin(math.sqrt(p))
    studentised = (np.arcsin(np.sqrt(ratio)) - centre) / error
    below, above = np.quantile(studentised, [1 - ALPHA / 2, ALPHA / 2])
    scale = math.sqrt(_variance(sums, sizes)) * 0.5 / math.sqrt(p * (1 - p))
    low, high = np.clip([centre - below * scale, centre - above * scale], 0, math.pi / 2)
    return math.sin(low) ** 2, math.sin(high) ** 2


def _mean_interval(sums: Floats, sizes: Floats, resamples: int, seed: int) -> Interval:
    if len(sums) < 2:
        return None, None
    centre, error = float(sums.sum() / sizes.sum()), math.sqrt(_variance(sums, sizes))
    below, above = _quantile(len(sums)), -_quantile(len(sums))
    if len(sums) >= ENOUGH_CLUSTERS and error > 0:
        ratio, variance = _resampled(sums, sizes, resamples, seed)
        with np.errstate(divide="ignore", invalid="ignore"):
            studentised = np.nan_to_num((ratio - centre) / np.sqrt(variance), nan=0, posinf=1e9, neginf=-1e9)
        quantiles = np.quantile(studentised, [1 - ALPHA / 2, ALPHA / 2])
        # Beyond the quantile of two clusters, many resamples miss the few clusters that vary: Student's t stays.
        if np.abs(quantiles).max() < _quantile(2):
            below, above = quantiles
    return float(centre - below * error), float(centre - above * error)


@lru_cache(maxsize=1024)
def _quantile(clusters: int | None) -> float:
    """The 97.5 % point: normal, or Student's t with clusters - 1 degrees of freedom."""
    from scipy.stats import norm, t

    point: Callable[[float], float] = norm.ppf if clusters is None else t(max(clusters - 1, 1)).ppf
    return float(point(1 - ALPHA / 2))
