"""Self-correction and normal rows at a ratio, exact to the row."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random

from esr_train.errors import InputError
from esr_train.transcript import Transcript

Weigh = Callable[[Transcript], int]
"""What a row counts in the mixture, such as its trained tokens."""


@dataclass(frozen=True)
class Mixture:
    """Rows in the order of the file.

    Args:
        rows: all of them.
        repeated: self-correction rows that are there for a second time or more.
        missing: normal rows that the size asked for beyond those there were.
    """

    rows: list[Transcript]
    repeated: int = 0
    missing: int = 0


def one(row: Transcript) -> int:
    """Every row counts the same."""
    return 1


def mix(
    transcripts: Sequence[Transcript], self_correction: float | None, seed: int, weigh: Weigh = one
) -> list[Transcript]:
    """Shuffle, and thin out whichever kind there is too much of.

    Args:
        transcripts: rows of every source; a row with a cue counts as self-correction, any other as normal.
        self_correction: their share in the result; None keeps every row.
        seed: of the choice and the order.
        weigh: what a row counts towards the share.

    Raises:
        InputError: if one kind is missing while the share asks for it.
    """
    rng = Random(seed)
    rows, corrections, normals = _shuffled(transcripts, rng)
    if self_correction is None:
        return rows
    wanted, others = sizes([*map(weigh, corrections)], [*map(weigh, normals)], self_correction)
    chosen = [*corrections[:wanted], *normals[:others]]
    rng.shuffle(chosen)
    return chosen


def mix_sized(
    transcripts: Sequence[Transcript], self_correction: float, size: int, seed: int, repeat: bool = False
) -> Mixture:
    """A mixture of at most `size` rows, counted as the paper counts: each kind's number is rounded down.

    Normal rows are taken as far as there are any; self-correction rows, whose number the share is about, must suffice.

    Args:
        transcripts: as in `mix`.
        self_correction: the share asked for.
        size: rows asked for.
        seed: of the choice and the order.
        repeat: where self-correction rows are too few, each may come as often as it takes (by one more or less);
            the second one's id ends in `#2`.

    Raises:
        InputError: if they are too few and may not repeat.
    """
    rng = Random(seed)
    _, corrections, normals = _shuffled(transcripts, rng)
    # What a decimal share loses in binary must not cost a row: 0.29 * 100 is below 29.
    wanted, others = int(size * self_correction + 1e-6), int(size * (1 - self_correction) + 1e-6)
    short = max(0, wanted - len(corrections))
    if short and not (repeat and corrections):
        raise InputError(
            f"{self_correction:.0%} of {size} rows are {wanted} self-correction rows, and there are "
            f"{len(corrections)} ({short} too few)",
            "--rows",
            "Name files with more of them, ask for fewer rows, or add --repeat if rows may come more than once."
            if corrections
            else "Name files with some.",
        )
    turns = [divmod(index, len(corrections)) for index in range(wanted)]
    chosen = [
        replace(corrections[index], id=f"{corrections[index].id}#{turn + 1}") if turn else corrections[index]
        for turn, index in turns
    ]
    chosen += normals[:others]
    rng.shuffle(chosen)
    return Mixture(chosen, short, max(0, others - len(normals)))


def sizes(corrections: Sequence[int], normals: Sequence[int], share: float) -> tuple[int, int]:
    """The largest mixture with that share of self-correction rows, as (self-correction, normal) row counts.

    Args:
        corrections, normals: what each row counts, in the order in which rows are taken.
        share: of the self-correction rows in what all rows count, 0 to 1.
    """
    if (share > 0 and not corrections) or (share < 1 and not normals):
        raise InputError(
            f"a share of {share:g} self-correction rows cannot be mixed from {len(corrections)} self-correction and "
            f"{len(normals)} normal rows",
            "data.self_correction",
            "Generate rows of the missing kind, or set the share to 0 or 1.",
        )
    correcting, normal = sum(corrections), sum(normals)
    if share <= 0 or (share < 1 and normal * share < correcting * (1 - share)):
        return _nearest(corrections, normal * share / (1 - share)), len(normals)
    return len(corrections), _nearest(normals, correcting * (1 - share) / share)


def each_once(files: Iterable[Sequence[Transcript]]) -> list[Transcript]:
    """The rows of several files; one that an earlier file holds, too, is taken once.

    Rows are the same if prompt, reply and steering are, whatever their ids. What a file holds twice stays double.

    Raises:
        InputError: if two rows have one id.
    """
    earlier: Counter[object] = Counter()
    ids: set[str] = set()
    rows: list[Transcript] = []
    for file in files:
        own: Counter[object] = Counter()
        for row in file:
            content = (row.prompt.strip(), row.content, row.steering)
            own[content] += 1
            if own[content] <= earlier[content]:
                continue
            if row.id in ids:
                raise InputError(f"the id {row.id!r} stands for two rows", None, "Give every row an id of its own.")
            ids.add(row.id)
            rows.append(row)
        earlier |= own
    return rows


def _shuffled(
    transcripts: Iterable[Transcript], rng: Random
) -> tuple[list[Transcript], list[Transcript], list[Transcript]]:
    """All rows, those that correct themselves, and the others; the order does not depend on the files'."""
    rows = sorted(transcripts, key=lambda row: row.id)
    rng.shuffle(rows)
    return rows, [row for row in rows if row.corrects], [row for row in rows if not row.corrects]


def _nearest(weights: Sequence[int], total: float) -> int:
    """How many of the first rows come nearest to a total of what they count."""
    sums = list(accumulate(weights, initial=0))
    return min(range(len(sums)), key=lambda count: abs(sums[count] - total))
