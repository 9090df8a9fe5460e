"""Candidates until enough are kept: resumable to the row, and the same rows however often it was interrupted."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from data_gen.sources import Make, Outcome
from esr_train.errors import RunError
from esr_train.ranks import ALONE, Ranks
from esr_train.transcript import Transcript, from_json, to_json
from eval.store import RowStore

KEPT = "kept"
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


def collect(
    source: str,
    wanted: int,
    make: Make,
    path: Path,
    chunk: int,
    again: Callable[[Transcript], str | None] = lambda row: None,
    ranks: Ranks = ALONE,
    meter: Meter = NO_METER,
) -> Collected:
    """Make candidates in order of their numbers until `wanted` are kept.

    Args:
        source: name shown with the progress.
        wanted: rows to keep; always the first ones by number.
        make: makes a chunk of candidates.
        path: file of the finished candidates; an interrupted run goes on from it, with any number of processes.
        chunk: candidates made at once by one process.
        again: why a row is refused in view of the rows before it, which it is shown one by one in their order.
        ranks: processes that share the numbers, a chunk each in turn; the first one writes.
        meter: of the tokens that `make` generates, shown as a rate.

    Raises:
        RunError: when too few candidates pass the filters, with the reasons counted.
    """
    store = RowStore(path, _read, _written)
    sieve = _Sieve(wanted, again)
    for row in store.rows():
        sieve.take(row)
    # A chunk that a kill has torn is made again whole: the last bits of a row's logits depend on who is in its batch.
    torn = len(store.keys()) % chunk
    number, start = len(store.keys()) - torn, perf_counter()
    with tqdm(
        total=wanted,
        initial=len(sieve.kept),
        desc=f"{source} rows",
        unit="row",
        mininterval=1,
        disable=not ranks.first,
    ) as bar:
        while len(sieve.kept) < wanted:
            if number >= CANDIDATES_PER_ROW * wanted + chunk:
                raise RunError(_too_few(source, wanted, len(sieve.kept), dict(sieve.funnel)))
            mine = range(number + ranks.rank * chunk, number + (ranks.rank + 1) * chunk)
            rows = [(f"{number:07d}", outcome) for number, outcome in zip(mine, make(mine), strict=True)]
            parts = ranks.gather((rows, meter.tokens))
            everyone = [row for rows, _ in parts for row in rows][torn:]
            if ranks.first:
                store.append(everyone)
            for _, outcome in everyone:
                sieve.take(outcome)
            number, torn = number + torn + len(everyone), 0
            bar.update(len(sieve.kept) - bar.n)
            bar.set_postfix_str(_pace(sieve, sum(tokens for _, tokens in parts) / (perf_counter() - start)))
    return Collected(sieve.kept, dict(sieve.funnel), dict(sieve.surplus))


class _Sieve:
    """The first `wanted` rows that pass, and what became of the candidates up to the last of them."""

    def __init__(self, wanted: int, again: Callable[[Transcript], str | None]) -> None:
        self.wanted, self.again = wanted, again
        self.kept: list[Transcript] = []
        self.funnel: Counter[str] = Counter()
        self.surplus: Counter[str] = Counter()

    def take(self, outcome: Outcome) -> None:
        if len(self.kept) == self.wanted:
            self.surplus[outcome.reason or KEPT] += 1
            return
        reason = outcome.reason
        if outcome.transcript is not None:
            reason = self.again(outcome.transcript)
            if reason is None:
                self.kept.append(outcome.transcript)
        self.funnel[reason or KEPT] += 1


def _pace(sieve: _Sieve, tokens: float) -> str:
    share = f"kept={len(sieve.kept) / sum(sieve.funnel.values()):.0%}"
    return f"{share}, {tokens:,.0f} tok/s" if tokens else share


def _written(outcome: Outcome) -> dict[str, Any]:
    return {"transcript": to_json(outcome.transcript) if outcome.transcript else None, "reason": outcome.reason}


def _read(row: dict[str, Any]) -> Outcome:
    transcript = row.get("transcript")
    return Outcome(from_json(transcript) if transcript is not None else None, row.get("reason"))


def _too_few(source: str, wanted: int, kept: int, funnel: dict[str, int]) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(funnel.items()) if reason != KEPT)
    return (
        f"data.{source}: only {kept} of the {wanted} rows wanted passed the filters ({reasons}). "
        f"Ask for fewer rows, or change the strengths and score limits under data.{source}."
    )
