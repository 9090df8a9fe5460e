"""Which latents may steer rows of which split."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from esr_train.errors import InputError
from esr_train.recipe import LatentsSection, SplitSection
from eval.cells import SPLITS, Split, deal_subjects, derived_seed, subject_of

if TYPE_CHECKING:
    import torch

    from esr_train.steering.directions import Direction

TWINS = 0.8
"""Cosine of decoder rows from which two latents stand for the same thing, whatever their labels say."""
COMPARED_AT_ONCE = 2048
"""Decoder rows compared with all others in one piece: of 65k latents that is half a gigabyte of cosines."""
RELEVANT, TWIN, STRADDLES, SURPLUS = (
    "active on a prompt",
    "twin of an earlier latent",
    "a topic of another split than its twin's",
    "beyond latents.limit",
)


@dataclass(frozen=True)
class Choice:
    """The latents that may steer, by split, and how many of the candidates were left out for which reason."""

    splits: dict[Split, list["Direction"]]
    left_out: dict[str, int]


def choose(
    latents: Sequence["Direction"],
    active: Collection[int],
    topics: Mapping[str, Split],
    splits: SplitSection,
    section: LatentsSection,
) -> Choice:
    """Choose which of the candidates may steer, and deal them to splits.

    **Relevance.** A latent that is active on a prompt is left out altogether, as in the paper, and not only kept from
    that one prompt: every prompt then goes with every latent, so cells, calibration and rows draw from the same
    latents and need no list of forbidden pairs. It costs labels, of which real SAEs have thousands. Where labels
    *are* the prompts' topics it cannot be asked for: each latent is active on its own topic's prompts. There
    `latents.relevant` is `keep`, and the rule that no latent steers a prompt of its own label's topic stands instead.

    **Twins.** Of latents whose decoder rows have a cosine of `TWINS` or more the first is kept.

    **Limit.** Drawn behind the dealing: a latent's split does not depend on how many are drawn, each split that has
    latents keeps one at least, and a larger limit only adds latents.

    Args:
        latents: candidates, in order of preference.
        active: latents that are active on a prompt of the set.
        topics: of the prompts, with their splits.
        splits: shares and seed of the splits.
        section: the recipe's.

    Raises:
        InputError: if none is left.
    """
    fit = [each for each in latents if section.relevant == "keep" or each.latent not in active]
    single = fit if section.twins == "keep" else without_twins(fit)
    dealt = deal_latents(single, topics, splits)
    drawn = limited(dealt, section.limit, splits.seed)
    counts = [len(latents), len(fit), len(single), *(sum(map(len, each.values())) for each in (dealt, drawn))]
    lost = [before - after for before, after in pairwise(counts)]
    left_out = {name: n for name, n in zip((RELEVANT, TWIN, STRADDLES, SURPLUS), lost, strict=True) if n}
    if not counts[-1]:
        found = "; ".join(f"{name}: {n}" for name, n in left_out.items()) or "no label is usable"
        raise InputError(
            f"none of {len(latents)} labelled latents may steer ({found})",
            "latents",
            "Label more latents, or keep some kind (latents.relevant=keep, latents.twins=keep).",
        )
    return Choice(drawn, left_out)


def deal_latents(
    latents: Sequence["Direction"], topics: Mapping[str, Split], section: SplitSection, twins: float = TWINS
) -> dict[Split, list["Direction"]]:
    """Deal latents to splits so that no subject, and no two twins, are on both sides.

    Latents with one label, and latents whose decoder rows are alike, form a family. A family goes where the first
    topic among its labels is, or else by the hash of its first latent's label. A latent whose label is a topic of
    another split than its family's is left out.

    Args:
        latents: those in play; their order does not matter to the families, but to who is first.
        topics: of the prompts, with their splits.
        section: shares and seed of the splits.
        twins: least cosine of two decoder rows that are twins.
    """
    groups = [[latents[place] for place in group] for group in families(latents, twins)]
    names = [_name(group, topics) for group in groups]
    dealt = deal_subjects(names, topics, section)
    placed = {
        id(latent): dealt[name]
        for name, group in zip(names, groups, strict=True)
        for latent in group
        if topics.get(subject_of(latent), dealt[name]) == dealt[name]
    }
    return {split: [latent for latent in latents if placed.get(id(latent)) == split] for split in SPLITS}


def families(latents: Sequence["Direction"], twins: float = TWINS) -> list[list[int]]:
    """Places in `latents` of those that belong together, through others if need be; in order of their first."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not latents:
        return []
    first: dict[str, int] = {}
    named = [(place, first.setdefault(subject_of(latent), place)) for place, latent in enumerate(latents)]
    pairs = np.array([*named, *alike(latents, twins)])
    links = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(len(latents), len(latents)))
    groups: dict[int, list[int]] = {}
    for place, group in enumerate(connected_components(links, directed=False)[1].tolist()):
        groups.setdefault(group, []).append(place)
    return list(groups.values())


def without_twins(latents: Sequence["Direction"], twins: float = TWINS) -> list["Direction"]:
    """The latents without those that are alike to one that was kept before them."""
    earlier: dict[int, list[int]] = {}
    for later, before in alike(latents, twins):
        earlier.setdefault(later, []).append(before)
    dropped: set[int] = set()
    for place in sorted(earlier):
        if not dropped.issuperset(earlier[place]):
            dropped.add(place)
    return [latent for place, latent in enumerate(latents) if place not in dropped]


def alike(latents: Sequence["Direction"], twins: float = TWINS) -> list[tuple[int, int]]:
    """Pairs (later, earlier) of places whose decoder rows have a cosine of `twins` or more."""
    import torch
    from tqdm import tqdm

    if not latents:
        return []
    units = torch.stack([latent.unit for latent in latents])
    found: list[tuple[int, int]] = []
    starts = range(0, len(latents), COMPARED_AT_ONCE)
    for start in tqdm(starts, desc="compare latents", unit="piece", disable=len(starts) < 4, leave=False):
        found += _pairs(units, start, twins)
    return found


def _pairs(units: "torch.Tensor", start: int, twins: float) -> list[tuple[int, int]]:
    import torch

    end = min(start + COMPARED_AT_ONCE, len(units))
    near = torch.tril(units[start:end] @ units[:end].T >= twins, diagonal=start - 1)
    return [(start + later, earlier) for later, earlier in near.nonzero().tolist()]


def limited(
    dealt: Mapping[Split, Sequence["Direction"]], limit: int | None, seed: int
) -> dict[Split, list["Direction"]]:
    """At most `limit` of the latents, from each split its share; drawn by a seeded hash, kept in their order."""
    places: list[tuple[float, Split, int]] = []
    for split, group in dealt.items():
        drawn = sorted(group, key=lambda each: derived_seed("latent", seed, each.latent))
        # Every split's first comes before any split's second, and the others take turns in proportion.
        places += [(rank / len(drawn), split, each.latent) for rank, each in enumerate(drawn)]
    chosen = {(split, latent) for _, split, latent in sorted(places)[:limit]}
    return {split: [each for each in group if (split, each.latent) in chosen] for split, group in dealt.items()}


def _name(group: Sequence["Direction"], topics: Mapping[str, Split]) -> str:
    subjects = [subject_of(latent) for latent in group]
    return next((subject for subject in subjects if subject in topics), subjects[0])
