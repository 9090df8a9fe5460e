"""Which SAE latents tell two kinds of responses apart: ranked, tested, held out, and held against matched random sets.

A response counts by each latent's strongest activation in it, which is above 0 wherever the latent was active.
Matrices are [responses, latents]; they may be memory-mapped, and are read some latents at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esr_train.errors import InputError
from esr_train.files import read_json, write_json
from eval.arms import matched_latents

Floats = NDArray[np.float64]
AT_ONCE = 4096
"""Latents whose ranks are computed at once."""
MOST = 64
"""Latents of a set at most."""
LEAST_AUC = 0.55
"""What a single latent must reach where the set is chosen: a tiny difference may be certain and still of no use."""
FALSE_DISCOVERIES = 0.01
PAPER_SHARE = 0.8
RANDOM_SETS = 20
ALIKE = 0.5
"""Latents are one group where decoder rows or activations correlate by this much on average."""


@dataclass(frozen=True, eq=False)
class Classes:
    """Two kinds of responses: those the latents should be silent on, and those they should be active on.

    Args:
        negative, positive: strongest activations, [responses, latents] each; a row of both is one text, read twice.
    """

    negative: NDArray[Any]
    positive: NDArray[Any]

    def of(self, latents: Sequence[int]) -> tuple[Floats, Floats]:
        """The two matrices of some latents."""
        index = list(latents)
        return np.asarray(self.negative[:, index], np.float64), np.asarray(self.positive[:, index], np.float64)

    def summed(self, latents: Sequence[int]) -> "Classes":
        """The sum of some latents as one column."""
        negative, positive = self.of(latents)
        return Classes(negative.sum(1, keepdims=True), positive.sum(1, keepdims=True))


@dataclass(frozen=True, eq=False)
class Separation:
    """How well each latent tells the two classes apart, [latents] each.

    Args:
        auc: the probability that any positive response has a higher value than any negative one, ties half.
        error: its standard error (DeLong et al. 1988, for pairs: Obuchowski 1997).
        p: one-sided p-value of Wilcoxon's signed-rank test that a text's positive reading is no higher than its
            negative one; what the text itself makes a latent do, which it does in both, plays no part.
        negative_share, positive_share: of the responses on which the latent is active at all.
    """

    auc: Floats
    error: Floats
    p: Floats
    negative_share: Floats
    positive_share: Floats


def separation(classes: Classes) -> Separation:
    """AUC, its standard error and p-value for every latent.

    Raises:
        InputError: with fewer than two responses of a kind.
    """
    if len(classes.negative) < 2:
        what = f"{len(classes.negative)} pairs of responses are too few to tell two kinds apart"
        raise InputError(what, "prompts", "Give more prompts.")
    count = classes.negative.shape[1]
    parts = [_separation(*classes.of(range(start, min(start + AT_ONCE, count)))) for start in range(0, count, AT_ONCE)]
    return Separation(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _separation(negative: Floats, positive: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    from scipy.stats import rankdata

    n = len(negative)
    ranks = rankdata(np.concatenate([negative, positive]), axis=0)
    # DeLong's placements: the share of the other class that a response lies on the right side of.
    above = (ranks[n:] - rankdata(positive, axis=0)) / n
    below = 1 - (ranks[:n] - rankdata(negative, axis=0)) / n
    error = np.sqrt((above + below).var(0, ddof=1) / n)
    return above.mean(0), error, _signed_rank(positive - negative), (negative > 0).mean(0), (positive > 0).mean(0)


def _signed_rank(differences: Floats) -> Floats:
    """One-sided p-values by column, from the mean and variance of the positive ranks under random signs."""
    from scipy.stats import norm, rankdata

    ranks = rankdata(np.abs(differences), axis=0) - (differences == 0).sum(0)
    ranks[differences == 0] = 0
    spread = np.sqrt((ranks**2).sum(0)) / 2
    above = np.where(differences > 0, ranks, 0).sum(0) - ranks.sum(0) / 2
    z = np.divide(above, spread, out=np.zeros_like(above), where=spread > 0)
    return np.where(spread > 0, norm.sf(z), 1.0)


def paper_rule(found: Separation) -> list[int]:
    """The latents active on no negative and on at least 80 % of the positive responses (arXiv 2602.06941)."""
    chosen = (found.negative_share == 0) & (found.positive_share >= PAPER_SHARE)
    return [int(latent) for latent in np.flatnonzero(chosen)]


def discovered(found: Separation) -> Floats:
    """q-values of all latents (Benjamini and Hochberg 1995)."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(found.p), np.float64)


def best(found: Separation, most: int = MOST) -> list[int]:
    """The latents that stand out among all and separate by themselves, by falling AUC; at most `most`."""
    passed = (discovered(found) < FALSE_DISCOVERIES) & (found.auc >= LEAST_AUC)
    order = np.argsort(-found.auc, kind="stable")
    return [int(latent) for latent in order if passed[latent]][:most]


@dataclass(frozen=True)
class Auc:
    """An area under the ROC curve, its standard error and 95 % interval, on so many pairs."""

    value: float
    error: float
    low: float
    high: float
    n: int


def auc_of(classes: Classes) -> Auc:
    """The AUC of a single column."""
    found = separation(classes)
    value, error = float(found.auc[0]), float(found.error[0])
    low, high = max(value - 1.96 * error, 0.0), min(value + 1.96 * error, 1.0)
    return Auc(value, error, low, high, len(classes.positive))


@dataclass(frozen=True)
class Detector:
    """One latent of a set.

    Args:
        name: its label, or a text on which it is most active, the token between << and >>.
        auc, error, p, q: on the responses it was chosen on.
        negative_share, positive_share: of the responses on which it is active at all.
        frequency: share of the tokens of own, unsteered replies at which it is active.
        group: latents of one number are alike.
        place: on the map of the groups.
    """

    latent: int
    name: str
    auc: float
    error: float
    p: float
    q: float
    held_out: float
    negative_share: float
    positive_share: float
    frequency: float
    group: int
    place: tuple[float, float]


@dataclass(frozen=True)
class DetectorSet:
    """The latents found by one contrast.

    Args:
        contrast: `off_topic` (a reply behind another prompt against behind its own) or `steered` (the same text read
            under steering against unsteered).
        detectors: by falling AUC.
        held_out: AUC of their sum on held-out prompts and topics; None where there is no detector.
        random_sets: sets of latents matched to them in frequency and decoder norm.
        random_aucs: AUC of the sum of each, on the same held-out responses.
        paper_rule: the latents that the paper's rule selects.
        latents: of the dictionary, all of which were tested.
        pairs: that they were chosen on.
    """

    contrast: str
    detectors: tuple[Detector, ...]
    held_out: Auc | None
    random_sets: tuple[tuple[int, ...], ...]
    random_aucs: tuple[float, ...]
    paper_rule: tuple[int, ...]
    latents: int
    pairs: int

    @property
    def chosen(self) -> tuple[int, ...]:
        """The detectors' indices."""
        return tuple(detector.latent for detector in self.detectors)


@dataclass(frozen=True, eq=False)
class Dictionary:
    """What is known of an SAE's latents.

    Args:
        frequency: share of the tokens of own, unsteered replies at which each is active, [latents].
        norms: of the decoder rows, [latents].
        rows: decoder rows, as a function of a list of latents, [len, d_model].
    """

    frequency: Floats
    norms: Floats
    rows: Callable[[Sequence[int]], Floats]


def find(contrast: str, search: Classes, held_out: Classes, dictionary: Dictionary, seed: int) -> DetectorSet:
    """Search the whole dictionary on some responses and report on others; detectors are named by their index.

    Args:
        search: responses to choose on.
        held_out: responses to other prompts, of other topics.
        dictionary: for matched sets and groups.
        seed: of the random sets.

    Raises:
        InputError: with too few responses, or too few latents for a random set.
    """
    found = separation(search)
    chosen, q = best(found), discovered(found)
    rule = tuple(paper_rule(found))
    size, pairs = len(found.auc), len(search.positive)
    if not chosen:
        return DetectorSet(contrast, (), None, (), (), rule, size, pairs)
    groups, places = grouped(dictionary.rows(chosen), search.of(chosen)[1])
    alone = separation(Classes(*held_out.of(chosen))).auc
    detectors = tuple(
        Detector(
            latent=latent,
            name=str(latent),
            auc=float(found.auc[latent]),
            error=float(found.error[latent]),
            p=float(found.p[latent]),
            q=float(q[latent]),
            held_out=float(alone[number]),
            negative_share=float(found.negative_share[latent]),
            positive_share=float(found.positive_share[latent]),
            frequency=float(dictionary.frequency[latent]),
            group=groups[number],
            place=places[number],
        )
        for number, latent in enumerate(chosen)
    )
    sets = tuple(matched_sets(chosen, dictionary, seed))
    aucs = tuple(auc_of(held_out.summed(other)).value for other in sets)
    return DetectorSet(contrast, detectors, auc_of(held_out.summed(chosen)), sets, aucs, rule, size, pairs)


def matched_sets(chosen: Sequence[int], dictionary: Dictionary, seed: int) -> Iterator[tuple[int, ...]]:
    """Random sets of latents like the chosen ones in frequency and decoder norm; none holds a chosen one."""
    for number in range(RANDOM_SETS):
        others = matched_latents(chosen, dictionary.frequency, dictionary.norms, (), seed + number)
        yield tuple(others[latent] for latent in chosen)


def grouped(rows: Floats, activations: Floats) -> tuple[list[int], list[tuple[float, float]]]:
    """Groups of latents that point alike or are active together, numbered by their first member; places on a map.

    Two latents are as near as the larger of two numbers says: the cosine of their decoder rows, and the correlation of
    their strongest activations over responses. Groups come from average linkage, places from classical scaling.

    Args:
        rows: decoder rows, [latents, d_model].
        activations: [responses, latents].
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(rows) == 1:
        return [0], [(0.0, 0.0)]
    near = np.maximum(_cosines(rows), _cosines((activations - activations.mean(0)).T))
    distance = np.clip(1 - near, 0, None)
    np.fill_diagonal(distance, 0)
    labels = fcluster(linkage(squareform(distance, checks=False), "average"), 1 - ALIKE, "distance")
    numbers: dict[int, int] = {}
    groups = [numbers.setdefault(int(label), len(numbers)) for label in labels]
    return groups, _places(distance)


def _cosines(rows: Floats) -> Floats:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit.T, np.float64)


def _places(distance: Floats) -> list[tuple[float, float]]:
    """Two coordinates whose distances come near the given ones (classical scaling)."""
    centre = np.eye(len(distance)) - 1 / len(distance)
    values, vectors = np.linalg.eigh(-0.5 * centre @ distance**2 @ centre)
    placed = vectors[:, ::-1][:, :2] * np.sqrt(np.clip(values[::-1][:2], 0, None))
    # The sign of an eigenvector is arbitrary; the first latent lies at the right and above.
    placed *= np.where(placed[0] < 0, -1, 1)
    return [(round(float(x), 4), round(float(y), 4)) for x, y in placed]


@dataclass(frozen=True)
class Detectors:
    """What `detectors.json` holds.

    Args:
        release, id, layer: of the SAE that was read.
        sets: one for each contrast, `off_topic` first.
    """

    release: str
    id: str
    layer: int
    sets: tuple[DetectorSet, ...]

    def of(self, contrast: str) -> DetectorSet:
        """The set of a contrast.

        Raises:
            InputError: if it was not searched.
        """
        for each in self.sets:
            if each.contrast == contrast:
                return each
        raise InputError(f"the contrast {contrast!r} was not searched", "detectors.json")


def write_detectors(path: Path, detectors: Detectors) -> None:
    """Write `detectors.json`."""
    write_json(path, {"schema": 1, **asdict(detectors)})


def read_detectors(path: Path) -> Detectors:
    """Read a `detectors.json`.

    Raises:
        InputError: for a file that is missing or holds something else.
    """
    from esr_train.values import typed

    row = read_json(path)
    if not isinstance(row, dict) or row.pop("schema", None) != 1:
        raise InputError("this is no detectors.json", str(path), "`esr latents search RECIPE` writes one.")
    try:
        return typed(Detectors, row)
    except ValueError as error:
        raise InputError(str(error), str(path), "`esr latents search RECIPE` writes one.") from None
