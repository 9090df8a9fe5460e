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
    transcripts: Sequence[Transcript],
    self_correction: float | None,
    seed: int,
    weigh: Weigh = one,
    size: int | None = None,
    repeat: bool = False,
) -> Mixture:
    """Shuffle rows, and take of each kind what the share asks for: as many as there are, or at most `size`.

    Args:
        transcripts: rows of every source; a row with a cue counts as self-correction, any other as normal.
        self_correction: their share in the result; None keeps every row.
        seed: of the choice and the order, which do not depend on the files' order.
        weigh: what a row counts towards the share, where no size is given.
        size: most rows; each kind's number is rounded down, as in the paper, and normal rows may be fewer.
        repeat: where self-correction rows are too few for a size, they come again, their ids ending in `#2`.

    Raises:
        InputError: if one kind is missing while the share asks for it; if there are too few for the size.
    """
    rng = Random(seed)
    rows = sorted(transcripts, key=lambda row: row.id)
    rng.shuffle(rows)
    if self_correction is None:
        return Mixture(rows)
    corrections, normals = [row for row in rows if row.corrects], [row for row in rows if not row.corrects]
    if size is None:
        wanted, others = sizes([*map(weigh, corrections)], [*map(weigh, normals)], self_correction)
    else:
        # What a decimal share loses in binary must not cost a row: 0.29 * 100 is below 29.
        wanted, others = int(size * self_correction + 1e-6), int(size * (1 - self_correction) + 1e-6)
    repeated = max(0, wanted - len(corrections))
    if repeated and not (repeat and corrections):
        raise _too_few(self_correction, size, wanted, len(corrections))
    chosen = [_repeated(corrections, index) for index in range(wanted)] + normals[:others]
    rng.shuffle(chosen)
    return Mixture(chosen, repeated, max(0, others - len(normals)))


def _too_few(share: float, size: int | None, wanted: int, there: int) -> InputError:
    what = f"{share:.0%} of {size} rows are {wanted} self-correction rows"
    return InputError(
        f"{what}, and there are {there} ({wanted - there} too few)",
        "--rows",
        "Name files with more of them, ask for fewer rows, or add --repeat if rows may come more than once.",
    )


def _repeated(rows: Sequence[Transcript], index: int) -> Transcript:
    turn, index = divmod(index, len(rows))
    return replace(rows[index], id=f"{rows[index].id}#{turn + 1}") if turn else rows[index]


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


def _nearest(weights: Sequence[int], total: float) -> int:
    """How many of the first rows come nearest to a total of what they count."""
    sums = list(accumulate(weights, initial=0))
    return min(range(len(sums)), key=lambda count: abs(sums[count] - total))
