"""Which latents may steer rows of which split."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from esr_train.sections.world import SplitSection
from eval.cells import SPLITS, Split, deal_subjects, subject_of

if TYPE_CHECKING:
    from esr_train.steering.sae import Direction

TWINS = 0.8
"""Cosine of decoder rows from which two latents stand for the same thing, whatever their labels say."""


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
    import torch

    if not latents:
        return []
    units = torch.stack([latent.unit for latent in latents])
    alike = (units @ units.T >= twins).tolist()
    subjects = [subject_of(latent) for latent in latents]
    first = list(range(len(latents)))
    for here in range(len(latents)):
        for there in range(here):
            if (alike[here][there] or subjects[here] == subjects[there]) and first[here] != first[there]:
                old, new = max(first[here], first[there]), min(first[here], first[there])
                first = [new if each == old else each for each in first]
    return [[place for place, each in enumerate(first) if each == head] for head in sorted(set(first))]


def _name(group: Sequence["Direction"], topics: Mapping[str, Split]) -> str:
    subjects = [subject_of(latent) for latent in group]
    return next((subject for subject in subjects if subject in topics), subjects[0])
