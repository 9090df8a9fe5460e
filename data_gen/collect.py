"""Candidates until enough are kept: resumable to the row, and the same rows however often it was interrupted."""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tqdm import tqdm

from esr_train.errors import RunError
from esr_train.transcript import Transcript, from_json, to_json
from eval.store import TrialStore

CANDIDATES_PER_ROW = 20
"""Give up when so many candidates per wanted row were not enough."""


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: a transcript, or the reason why there is none."""

    transcript: Transcript | None
    reason: str | None = None


@dataclass(frozen=True)
class Collected:
    """The rows that were kept, and the funnel: how many candidates ended how."""

    transcripts: list[Transcript]
    funnel: dict[str, int]


Make = Callable[[Sequence[int]], list[Outcome]]
"""Makes the candidates with these numbers; what number i becomes depends on i alone."""


def candidate_rng(seed: int, source: str, number: int) -> Random:
    """The random numbers of one candidate, whoever makes it and when."""
    return Random(zlib.crc32(f"{seed}/{source}".encode()) << 32 | number)


def collect(source: str, wanted: int, make: Make, path: Path, chunk: int) -> Collected:
    """Make candidates in order of their numbers until `wanted` are kept.

    Args:
        source: name shown with the progress.
        wanted: rows to keep; always the first ones by number.
        make: makes a chunk of candidates.
        path: file of the finished candidates; an interrupted run goes on from it.
        chunk: candidates made at once.

    Raises:
        RunError: when too few candidates pass the filters, with the reasons counted.
    """
    store = TrialStore(path)
    kept = sum(row["transcript"] is not None for row in store.rows())
    number = len(store.keys())
    with tqdm(total=wanted, initial=min(kept, wanted), desc=f"{source} rows", unit="row", mininterval=1) as bar:
        while kept < wanted:
            if number >= CANDIDATES_PER_ROW * wanted + chunk:
                raise RunError(_too_few(source, wanted, kept, _funnel(store)))
            numbers = range(number, number + chunk)
            outcomes = make(numbers)
            store.append(_row(i, outcome) for i, outcome in zip(numbers, outcomes, strict=True))
            found = sum(outcome.transcript is not None for outcome in outcomes)
            number, kept = number + chunk, kept + found
            bar.update(min(found, max(wanted - bar.n, 0)))
            bar.set_postfix(kept=f"{kept / number:.0%}")
    rows = [from_json(row["transcript"]) for row in store.rows() if row["transcript"] is not None]
    return Collected(rows[:wanted], _funnel(store))


def _row(number: int, outcome: Outcome) -> dict[str, object]:
    transcript = to_json(outcome.transcript) if outcome.transcript else None
    return {"key": f"{number:07d}", "transcript": transcript, "reason": outcome.reason}


def _funnel(store: TrialStore) -> dict[str, int]:
    return dict(Counter(row["reason"] or "kept" for row in store.rows()))


def _too_few(source: str, wanted: int, kept: int, funnel: dict[str, int]) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(funnel.items()) if reason != "kept")
    return (
        f"data.{source}: only {kept} of the {wanted} rows wanted passed the filters ({reasons}). "
        f"Ask for fewer rows, or change the strengths and score limits under data.{source}."
    )
