"""Candidates until enough are kept: resumable to the row, and the same rows however often it was interrupted."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from tqdm import tqdm

from data_gen.brevity import brevity
from data_gen.filters import Seen, screened
from data_gen.prompted import prompted
from data_gen.sources import SOURCES, TOO_LONG, Context, Make, Outcome, normal
from data_gen.steered import steered
from esr_train.errors import InputError, RunError
from esr_train.ranks import ALONE, Ranks
from esr_train.recipe import SourceSection
from esr_train.transcript import Transcript, from_json, to_json
from eval.store import RowStore

BUILT_IN = (steered, prompted, normal, brevity)
"""Sources that were registered when they were imported here."""
KEPT, TRIMMED = "kept", "kept, answer trimmed"
CANDIDATES_PER_ROW = 20
"""Give up when so many candidates per wanted row were not enough."""


@dataclass(frozen=True)
class Collected:
    """The rows that were kept, and the funnel: how many candidates ended how.

    The funnel ends with the last wanted row. `surplus` counts the candidates behind it in the same way: they were made
    (and, by a writer, paid for) because a chunk is made at once.
    """

    transcripts: list[Transcript]
    funnel: dict[str, int]
    surplus: dict[str, int] = field(compare=False)


@dataclass
class Meter:
    """Tokens that this process has generated; engines call it as their progress."""

    tokens: int = 0

    def __call__(self, rows: int, tokens: int) -> None:
        self.tokens += tokens


NO_METER = Meter()


def generate_rows(name: str, section: SourceSection, context: Context, chunk: int = 16) -> list[Transcript]:
    """Rows of one source, without a recipe.

    Args:
        name: of a registered source, such as `steered`.
        section: how many rows, and what else the source can be told.
        context: model, judge, prompts and latents.
        chunk: candidates made at once.

    Raises:
        InputError: if there is no such source.
        RunError: when too few candidates pass the filters, with the reasons counted.
    """
    if name not in SOURCES:
        raise InputError(f"there is no source {name!r}", None, f"There are {', '.join(sorted(SOURCES))}.")
    make = SOURCES[name].make(context, section)
    with TemporaryDirectory() as folder:
        return collect(name, section.rows, make, Path(folder) / "candidates.jsonl", chunk).transcripts


def collect(
    source: str, wanted: int, make: Make, path: Path, chunk: int, ranks: Ranks = ALONE, meter: Meter = NO_METER
) -> Collected:
    """Make candidates in order of their numbers until `wanted` have passed the filters.

    Args:
        source: name shown with the progress.
        wanted: rows to keep; always the first ones by number.
        make: makes a chunk of candidates.
        path: file of the finished candidates; an interrupted run goes on from it, with any number of processes.
        chunk: candidates made at once by one process.
        ranks: processes that share the numbers, a chunk each in turn; the first one writes.
        meter: of the tokens that `make` generates, shown as a rate.

    Raises:
        RunError: when too few candidates pass the filters, with the reasons counted.
    """
    store, sieve = RowStore(path, _read, _written), _Sieve(wanted)
    for outcome in store.rows():
        sieve.take(outcome)
    chunks, start = _chunks(store, screened(make), chunk, ranks, meter), perf_counter()
    hidden = not ranks.first
    with tqdm(
        total=wanted, initial=len(sieve.kept), desc=f"{source} rows", unit="row", mininterval=1, disable=hidden
    ) as bar:
        while len(sieve.kept) < wanted:
            if sum(sieve.funnel.values()) >= CANDIDATES_PER_ROW * wanted + chunk:
                raise RunError(sieve.too_few(source))
            outcomes, tokens = next(chunks)
            for outcome in outcomes:
                sieve.take(outcome)
            bar.update(len(sieve.kept) - bar.n)
            bar.set_postfix_str(sieve.pace(tokens / (perf_counter() - start)))
    return Collected(sieve.kept, dict(sieve.funnel), dict(sieve.surplus))


def _chunks(
    store: RowStore[Outcome], make: Make, chunk: int, ranks: Ranks, meter: Meter
) -> Iterator[tuple[list[Outcome], int]]:
    """A chunk of every process after the other, written down, and the tokens that all of them have generated."""
    # A chunk that a kill has torn is made again whole: the last bits of a row's logits depend on who is in its batch.
    torn = len(store.keys()) % chunk
    number = len(store.keys()) - torn
    while True:
        mine = range(number + ranks.rank * chunk, number + (ranks.rank + 1) * chunk)
        made = [(f"{i:07d}", outcome) for i, outcome in zip(mine, make(mine), strict=True)]
        parts = ranks.gather((made, meter.tokens))
        everyone = [row for rows, _ in parts for row in rows][torn:]
        if ranks.first:
            store.append(everyone)
        number, torn = number + torn + len(everyone), 0
        yield [outcome for _, outcome in everyone], sum(tokens for _, tokens in parts)


class _Sieve:
    """The first `wanted` rows that pass, and what became of the candidates up to the last of them."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.seen = wanted, Seen()
        self.kept: list[Transcript] = []
        self.funnel: Counter[str] = Counter()
        self.surplus: Counter[str] = Counter()

    def take(self, outcome: Outcome) -> None:
        if len(self.kept) == self.wanted:
            self.surplus[outcome.reason or KEPT] += 1
            return
        reason, kept = outcome.reason, TRIMMED if outcome.trimmed else KEPT
        if outcome.transcript is not None:
            reason = self.seen.again(outcome.transcript)
            if reason is None:
                self.kept.append(outcome.transcript)
        self.funnel[reason or kept] += 1

    def pace(self, tokens: float) -> str:
        share = f"kept={len(self.kept) / sum(self.funnel.values()):.0%}"
        return f"{share}, {tokens:,.0f} tok/s" if tokens else share

    def too_few(self, source: str) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.funnel.items()) if KEPT not in reason)
        longer = "Raise sampling.max_new_tokens or set data.trim_answers; ask" if self.funnel[TOO_LONG] else "Ask"
        return (
            f"data.{source}: only {len(self.kept)} of the {self.wanted} rows wanted passed the filters ({reasons}). "
            f"{longer} for fewer rows, or change data.{source}, data.min_answer_score or data.max_detour_score."
        )


def _written(outcome: Outcome) -> dict[str, Any]:
    written = {"transcript": to_json(outcome.transcript) if outcome.transcript else None, "reason": outcome.reason}
    return written | ({"trimmed": True} if outcome.trimmed else {})


def _read(row: dict[str, Any]) -> Outcome:
    transcript = row.get("transcript")
    trimmed = row.get("trimmed", False) is True
    return Outcome(from_json(transcript) if transcript is not None else None, row.get("reason"), trimmed)
