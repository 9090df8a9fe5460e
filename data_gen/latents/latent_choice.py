"""Which latents may steer rows of which split."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esr_train.errors import InputError
from esr_train.recipe import SplitSection
from eval.cells import Split, derived_seed, split_latents

if TYPE_CHECKING:
    from esr_train.steering.directions import Direction

TWINS = 0.8
"""Cosine of decoder rows from which two latents stand for the same thing, whatever their labels say."""
COMPARED_AT_ONCE = 2048
"""Decoder rows compared with all others in one piece: of 65k latents that is half a gigabyte of cosines."""
ACTIVE, TWIN, SURPLUS = "active on a prompt", "twin of an earlier latent", "beyond latents.limit"
ASKED_AT_ONCE = 200
"""Latents looked at in one piece by what costs something for each."""
Faults = Callable[[Sequence["Direction"]], Sequence[str | None]]
"""Says of each latent why it may not steer, None if it may."""


@dataclass(frozen=True)
class Choice:
    """The latents that may steer, by split, and how many of the candidates were left out for which reason."""

    splits: dict[Split, list["Direction"]]
    left_out: dict[str, int]


def choose(
    latents: Sequence["Direction"],
    active: Collection[int],
    topics: Mapping[str, Split],
    splits: SplitSection | None,
    limit: int | None,
    faults: Faults | None = None,
) -> Choice:
    """Choose which of the candidates may steer, and deal them to splits by their labels.

    A latent that is active on a prompt is left out altogether, as in the paper: every prompt then goes with every
    latent. Where labels *are* the prompts' topics that cannot be asked for, as each latent is active on its own topic's
    prompts: there `active` is empty, and no latent steers a prompt of its topic.

    Of twins the first is kept, so that no direction is on two sides under two labels. The limit is applied after the
    splits were dealt: a latent's split does not depend on how many are drawn, each split that has latents keeps one at
    least, and a larger limit only adds latents.

    Args:
        latents: candidates, in order of preference.
        splits: None: all are for the test.
        faults: asked last, and only of so many latents as it takes to fill the limit.

    Raises:
        InputError: if none is left.
    """
    inactive = [latent for latent in latents if latent.latent not in active]
    single = without_twins(inactive)
    everything: dict[Split, list[Direction]] = {"train": [], "validation": [], "test": single}
    dealt = split_latents(single, topics, splits) if splits else everything
    seed = splits.seed if splits else 0
    refused = refusals(dealt, limit, seed, faults) if faults else {}
    drawn = limited(dealt, limit, seed, refused)
    lost = Counter({ACTIVE: len(latents) - len(inactive), TWIN: len(inactive) - len(single)})
    lost += Counter([*refused.values(), *[SURPLUS] * (len(single) - len(refused) - sum(map(len, drawn.values())))])
    if not any(drawn.values()):
        reasons = "; ".join(f"{reason}: {count}" for reason, count in lost.items()) or "no label is usable"
        what = f"none of {len(latents)} labelled latents may steer ({reasons})"
        raise InputError(what, "sae.labels", "Label more latents.")
    return Choice(drawn, dict(lost))


def without_twins(latents: Sequence["Direction"], cosine: float = TWINS) -> list["Direction"]:
    """The latents without those whose decoder row has a cosine of `cosine` or more to one that was kept before them."""
    import torch
    from tqdm import tqdm

    if not latents:
        return []
    units = torch.stack([latent.unit for latent in latents])
    kept = torch.zeros(len(latents), dtype=torch.bool)
    starts = range(0, len(latents), COMPARED_AT_ONCE)
    for start in tqdm(starts, desc="compare latents", unit="piece", disable=len(starts) < 4, leave=False):
        end = min(start + COMPARED_AT_ONCE, len(latents))
        near = torch.tril(units[start:end] @ units[:end].T >= cosine, diagonal=start - 1)
        for index, twins in enumerate(near, start):
            kept[index] = not bool((twins & kept[:end]).any())
    return [latent for latent, keep in zip(latents, kept.tolist(), strict=True) if keep]


def limited(
    dealt: Mapping[Split, Sequence["Direction"]], limit: int | None, seed: int, refused: Collection[int] = ()
) -> dict[Split, list["Direction"]]:
    """At most `limit` of the latents that are not refused, from each split its share; drawn in turn, kept in order."""
    fit = [latent.latent for latent in in_turn(dealt, seed) if latent.latent not in refused]
    chosen = set(fit[:limit])
    return {split: [latent for latent in group if latent.latent in chosen] for split, group in dealt.items()}


def refusals(
    dealt: Mapping[Split, Sequence["Direction"]], limit: int | None, seed: int, faults: Faults
) -> dict[int, str]:
    """The latents that may not steer, and why; looked at in turn until `limit` others are found."""
    order, refused = in_turn(dealt, seed), dict[int, str]()
    for start in range(0, len(order), ASKED_AT_ONCE):
        if limit is not None and start - len(refused) >= limit:
            break
        piece = order[start : start + ASKED_AT_ONCE]
        refused |= {latent.latent: fault for latent, fault in zip(piece, faults(piece), strict=True) if fault}
    return refused


def in_turn(dealt: Mapping[Split, Sequence["Direction"]], seed: int) -> list["Direction"]:
    """The latents in the order in which they are drawn: by a seeded hash, the splits in turn.

    Every split's first comes before any split's second, and the others take turns in proportion.
    """
    ranked: list[tuple[float, Split, int, Direction]] = []
    for split, group in dealt.items():
        drawn = sorted(group, key=lambda latent: derived_seed("latent", seed, latent.latent))
        ranked += [(rank / len(drawn), split, latent.latent, latent) for rank, latent in enumerate(drawn)]
    return [latent for *_, latent in sorted(ranked, key=lambda each: each[:3])]
