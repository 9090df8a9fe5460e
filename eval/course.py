"""The course of an episode: what is read token by token around a restart, against replies without one."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esr_train.files import read_jsonl, write_jsonl
from esr_train.values import typed
from eval.statistics import Estimate, mean, paired

Floats = NDArray[np.float64]
REGIONS = ("before", "detour", "cue", "answer")
"""In the order in which they follow one another; a reply may lack some."""
WINDOW = 24
"""Tokens on either side of a restart that replies are aligned over."""


@dataclass(frozen=True, eq=False)
class Course:
    """One reply, token by token.

    Args:
        values: the sum of the latents at each token, [tokens].
        at: the token at which the restart begins; without a restart: that of a reply that has one.
        regions: name -> (first token, one behind the last); empty without a restart.
    """

    key: str
    cluster: Hashable
    values: Floats
    at: int
    regions: Mapping[str, tuple[int, int]]
    tokens: tuple[str, ...] = ()

    def mean_of(self, region: str) -> float | None:
        """The mean over a region's tokens; None if it has none."""
        first, end = self.regions.get(region, (0, 0))
        return float(self.values[first:end].mean()) if end > first else None


@dataclass(frozen=True)
class TokenSums:
    """A reply as a report can colour it: the texts of its tokens, which make up the response, and the sum at each."""

    key: str
    tokens: tuple[str, ...]
    sums: tuple[float, ...]


def write_token_sums(path: Path, courses: Sequence[Course]) -> None:
    """Write a reply a line."""
    rows = (TokenSums(each.key, each.tokens, tuple(round(float(x), 4) for x in each.values)) for each in courses)
    write_jsonl(path, map(asdict, rows))


def read_token_sums(path: Path) -> dict[str, TokenSums]:
    """The replies by their trials' keys; none where there is no file."""
    if not path.is_file():
        return {}
    return {row.key: row for row in read_jsonl(path, lambda value: typed(TokenSums, value))}


@dataclass(frozen=True)
class Contrast:
    """Two regions of the same replies.

    Args:
        first, second: their names; differences are second minus first.
        difference: mean, clustered by direction.
        p: two-sided, of Wilcoxon's signed-rank test, as the paper's; replies count as independent there.
        effect: matched-pairs rank-biserial correlation, -1 to 1 (Kerby 2014).
    """

    first: str
    second: str
    difference: Estimate
    p: float | None
    effect: float | None


def region_means(courses: Sequence[Course]) -> dict[str, Estimate]:
    """The mean of each region over the replies that have it."""
    found = {}
    for region in REGIONS:
        there = [(value, each.cluster) for each in courses if (value := each.mean_of(region)) is not None]
        if there:
            found[region] = mean([value for value, _ in there], [cluster for _, cluster in there])
    return found


def contrasts(courses: Sequence[Course]) -> list[Contrast]:
    """Every two regions, over the replies that have both."""
    found = []
    for first, second in combinations(REGIONS, 2):
        pairs = [(each.mean_of(first), each.mean_of(second), each.cluster) for each in courses]
        both = [(b - a, cluster) for a, b, cluster in pairs if a is not None and b is not None]
        if len(both) > 1:
            differences = np.array([difference for difference, _ in both])
            estimate = paired(differences, [cluster for _, cluster in both])
            found.append(Contrast(first, second, estimate, *signed_rank(differences)))
    return found


def signed_rank(differences: Floats) -> tuple[float | None, float | None]:
    """Wilcoxon's two-sided p-value and the rank-biserial correlation; None where nothing differs."""
    from scipy.stats import rankdata, wilcoxon

    some = differences[differences != 0]
    if not len(some):
        return None, None
    ranks = rankdata(np.abs(some))
    effect = float((ranks * np.sign(some)).sum() / ranks.sum())
    return float(wilcoxon(some).pvalue), effect


def aligned(courses: Sequence[Course]) -> list[tuple[int, Estimate]]:
    """The mean at each token from `WINDOW` before the restart to as many behind it, where two replies reach."""
    found = []
    for offset in range(-WINDOW, WINDOW + 1):
        there = [each for each in courses if 0 <= each.at + offset < len(each.values)]
        if len(there) > 1:
            values = [float(each.values[each.at + offset]) for each in there]
            found.append((offset, mean(values, [each.cluster for each in there])))
    return found


def matched(restarts: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """For replies that restart at these tokens others that reach the same token; each is used once.

    Args:
        restarts: tokens at which replies restart.
        lengths: tokens of the replies that do not.

    Returns:
        (number of the restarting reply, number of the other) wherever one is left; the latest restarts choose first.
    """
    free, pairs = sorted(range(len(lengths)), key=lambda number: lengths[number]), []
    for number in sorted(range(len(restarts)), key=lambda each: -restarts[each]):
        if free and lengths[free[-1]] > restarts[number]:
            pairs.append((number, free.pop()))
    return pairs


@dataclass(frozen=True)
class Rising:
    """A latent whose activation rises before restarts more than at the same tokens of replies without one.

    Args:
        name: its label, or its index.
        auc: of the rise, restarts against others.
        q: of the paired test (Wilcoxon's) over the whole dictionary, adjusted after Benjamini and Hochberg.
        rise: mean activation over the last tokens before the restart less that over the tokens before them.
        other: the same in the replies without a restart.
        by_label: whether its label speaks of taking something back.
    """

    latent: int
    name: str
    auc: float
    q: float
    rise: float
    other: float
    by_label: bool
