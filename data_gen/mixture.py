"""Self-correction and normal rows at a ratio, exact to the row."""

from random import Random

from esr_train.errors import InputError
from esr_train.transcript import Transcript


def mix(transcripts: list[Transcript], self_correction: float | None, seed: int) -> list[Transcript]:
    """Shuffle, and thin out whichever kind there is too much of.

    Args:
        transcripts: rows of every source; a row with a cue counts as self-correction, any other as normal.
        self_correction: their share in the result; None keeps every row.
        seed: of the choice and the order.

    Raises:
        InputError: if one kind is missing while the share asks for it.
    """
    rng = Random(seed)
    rows = sorted(transcripts, key=lambda row: row.id)
    rng.shuffle(rows)
    if self_correction is None:
        return rows
    corrections = [row for row in rows if row.corrects]
    normals = [row for row in rows if not row.corrects]
    wanted_corrections, wanted_normals = sizes(len(corrections), len(normals), self_correction)
    result = corrections[:wanted_corrections] + normals[:wanted_normals]
    rng.shuffle(result)
    return result


def sizes(corrections: int, normals: int, share: float) -> tuple[int, int]:
    """The largest mixture with that share of self-correction rows, as (self-correction, normal) row counts."""
    if (share > 0 and not corrections) or (share < 1 and not normals):
        raise InputError(
            f"a share of {share:g} self-correction rows cannot be mixed from {corrections} self-correction and "
            f"{normals} normal rows",
            "data.self_correction",
            "Generate rows of the missing kind, or set the share to 0 or 1.",
        )
    if share <= 0 or (share < 1 and normals * share < corrections * (1 - share)):
        return round(normals * share / (1 - share)), normals
    return corrections, round(corrections * (1 - share) / share)
