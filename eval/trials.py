"""Run cells through an engine and a judge into a store that a kill cannot corrupt."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from esr_train.errors import RunError
from esr_train.ranks import ALONE, Ranks
from esr_train.restarts import find_cues
from esr_train.steering.directions import Positions
from esr_train.steering.engine import Completion, Request
from esr_train.values import typed
from eval.arms import PLAIN, Arm, Variant
from eval.cells import Cell
from eval.judging.judge import Judge, JudgeItem, Judgement
from eval.store import Trial, TrialCell, TrialStore, TrialVariant, UsedStrength

if TYPE_CHECKING:
    from esr_train.steering.directions import Direction
    from esr_train.transcript import Strength

CHUNK_ROWS = 128
"""Trials between two writes: at most these are lost when a run is killed."""


@dataclass(frozen=True)
class Steerer:
    """Turns a cell's latent and multiple into an intervention.

    Args:
        directions: latent index -> its direction.
        norms: latent index -> its threshold in `norm` units.
        positions: which tokens are steered.
        late: leave the text alone that a cell goes on from, where `generated` positions are steered.
        off: do not steer after all; the strength is then that of the text which a cell goes on from.
        parts: latent index -> directions that steer together in its place, each with the threshold's length over the
            square root of their number.
    """

    directions: Mapping[int, "Direction"]
    norms: Mapping[int, float]
    positions: Positions = "all"
    off: bool = False
    late: bool = False
    parts: Mapping[int, Sequence["Direction"]] = field(default_factory=dict)

    def strength(self, cell: Cell) -> "Strength | None":
        """The cell's strength in both units; None for an unsteered cell.

        Raises:
            KeyError: for a latent without direction or threshold.
        """
        if cell.latent is None:
            return None
        return self.directions[cell.latent].strength(self.norms[cell.latent] * cell.multiple)

    def request(self, cell: Cell, key: str) -> Request:
        """The cell as a request. Its seed is the cell's, so arms draw the same noise."""
        strength = self.strength(cell)
        if cell.latent is None or strength is None or self.off:
            return Request(id=key, prompt=cell.prompt, seed=cell.seed)
        parts = self.parts.get(cell.latent, (self.directions[cell.latent],))
        adds = tuple(part.add(strength.norm / math.sqrt(len(parts)), self.positions) for part in parts)
        return Request(id=key, prompt=cell.prompt, interventions=adds, seed=cell.seed)


@dataclass(frozen=True)
class Readings:
    """What is read off a response beside its judgement; without `count` and `restarts` neither is.

    Args:
        count: tokens of a text.
        restarts: per request and reply, [characters, log-probability that a restart comes next] at sentence ends.
    """

    count: Callable[[str], int] | None = None
    restarts: Callable[[Sequence[Request], Sequence[str]], list[list[list[float]]]] | None = None


@dataclass(frozen=True)
class Plan:
    """What an arm runs under a condition.

    Args:
        prefixes: cell key -> text that the reply goes on from; it is part of the response.
        copies: cell key -> a finished trial of the arm that stands for this one as it is.
    """

    cells: tuple[Cell, ...]
    steerer: Steerer
    prefixes: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, Trial] = field(default_factory=dict)


class Observer:
    """Is told what happens while trials run. This one does nothing."""

    def __call__(self, rows: int, tokens: int) -> None:
        """So many rows are finished, and so many tokens generated, since the last call."""

    def on_trials_finished(self, trials: Sequence[Trial]) -> None:
        """All trials of the arm and condition that are finished so far."""


def run_trials(
    arm: Arm,
    condition: str,
    plan: Plan,
    store: TrialStore,
    *,
    readings: Readings | None = None,
    chunk_rows: int = CHUNK_ROWS,
    observer: Observer | None = None,
    ranks: Ranks = ALONE,
) -> list[Trial]:
    """Run every cell that is not in the store yet; the rows of all cells, in the cells' order.

    A row does not depend on which others ran beside it, so that a run which was killed and started again ends
    with the same rows.

    Args:
        arm: the model under test. The judge sees the cell's own prompt, without the arm's words around it.
        chunk_rows: trials that one process finishes between two writes.
        observer: told of rows and tokens as they are finished, and shown all finished rows after every write.
        ranks: processes that share the cells; each has a store with the same rows, and the main one's writes.

    Raises:
        RunError: if a steered cell was not steered, an unsteered one was, or the judge lost an item. Chunks
            finished before are kept.
    """
    run, observer = ConditionRun(arm, condition, plan, readings or Readings()), observer or Observer()
    keys = {trial_key(arm.name, condition, cell): cell for cell in plan.cells}
    store.add(run.copies(keys, store.keys()))
    finished = {trial.key: trial for trial in store.rows() if trial.key in keys}
    missing = [(key, cell) for key, cell in keys.items() if key not in finished]
    observer(len(finished), 0)
    for start in range(0, len(missing), chunk_rows * ranks.count):
        observer.on_trials_finished(list(finished.values()))
        rows = run.shared_trials(missing[start : start + chunk_rows * ranks.count], observer, ranks)
        store.add(rows)
        ranks.gather(None)  # before the main process has written them, no other one may read the file
        finished |= {row.key: row for row in rows}
    observer.on_trials_finished(list(finished.values()))
    return [finished[key] for key in keys]


@dataclass(frozen=True)
class ConditionRun:
    """An arm under a condition."""

    arm: Arm
    condition: str
    plan: Plan
    readings: Readings

    def copies(self, keys: Mapping[str, Cell], known: Collection[str]) -> Iterator[Trial]:
        """The finished trials that stand for some of the cells, as far as they are not known."""
        for key, cell in keys.items():
            if key not in known and (trial := self.plan.copies.get(cell.key)):
                yield replace(trial, key=key, condition=self.condition, restart_logprobs=())

    def shared_trials(self, chunk: Sequence[tuple[str, Cell]], observer: Observer, ranks: Ranks) -> list[Trial]:
        """The trials of a chunk, of which every process makes its part; all of them on every process, in order."""
        mine = self.trials(chunk[ranks.rank :: ranks.count], observer)
        parts = ranks.gather(mine)
        rows = [parts[index % ranks.count][index // ranks.count] for index in range(len(chunk))]
        if len(mine) < len(rows):
            tokens = sum(row.tokens or 0 for row in rows) - sum(row.tokens or 0 for row in mine)
            observer(len(rows) - len(mine), tokens)
        return rows

    def trials(self, chunk: Sequence[tuple[str, Cell]], observer: Observer) -> list[Trial]:
        """The trials of these keys and cells, in order."""
        if not chunk:
            return []
        arm, plan = self.arm, self.plan
        requests = [
            cell_request(cell, key, plan.steerer, arm.variant, plan.prefixes.get(cell.key, "")) for key, cell in chunk
        ]
        completions = arm.engine.generate(requests, arm.sampling, observer)
        check_steering(arm.name, requests, completions)
        responses = [request.prefix + done.text for request, done in zip(requests, completions, strict=True)]
        judgements = _judged(arm.judge, [cell for _, cell in chunk], responses)
        rows = [
            self._trial(key, cell, request, completion, judgement)
            for (key, cell), request, completion, judgement in zip(
                chunk, requests, completions, judgements, strict=True
            )
        ]
        return _read(rows, requests, self.readings)

    def _trial(self, key: str, cell: Cell, request: Request, completion: Completion, judgement: Judgement) -> Trial:
        response, variant = request.prefix + completion.text, self.arm.variant.to_json()
        return Trial(
            key=key,
            arm=self.arm.name,
            condition=self.condition,
            seed=cell.seed,
            cell=described(cell, self.plan.steerer.strength(cell)),
            variant=typed(TrialVariant, variant, "variant") if variant else None,
            engine=self.arm.engine.name,
            sampling=self.arm.sampling,
            prefix=len(request.prefix),
            response=response,
            finish_reason=completion.finish_reason,
            tokens=len(completion.token_ids),
            steered_tokens=completion.steered_tokens,
            attempts=judgement.attempts,
            cue=bool(find_cues(response)),
            alarms=completion.alarms,
            judge=judgement.judge,
            judge_raw=judgement.raw,
            flags=judgement.flags,
            error=judgement.error,
        )


def trial_key(arm: str, condition: str, cell: Cell) -> str:
    """The key of a trial's row."""
    return f"{arm}/{condition}/{cell.key}"


def cell_request(cell: Cell, key: str, steerer: Steerer, variant: Variant = PLAIN, prefix: str = "") -> Request:
    """A cell as an arm runs it: steered, with the arm's own words and interventions, going on from `prefix`."""
    request = replace(steerer.request(cell, key), prefix=prefix, unsteered=len(prefix) if steerer.late else 0)
    return variant.apply(request, cell.label)


def described(cell: Cell, strength: "Strength | None") -> TrialCell:
    """A cell as it stands in a trial."""
    used = UsedStrength(strength.raw, strength.norm) if strength else None
    return TrialCell(cell.prompt, cell.topic, cell.latent, cell.label, used, cell.seed)


def check_steering(arm: str, requests: Sequence[Request], completions: Sequence[Completion]) -> None:
    """Refuse completions that are missing, or steered otherwise than asked for.

    Raises:
        RunError: naming the trial.
    """
    if len(completions) != len(requests):
        raise RunError(f"{arm}: the engine returned {len(completions)} completions for {len(requests)} requests.")
    for request, completion in zip(requests, completions, strict=True):
        if (completion.steered_tokens > 0) != request.steers(completion):
            wanted = "steered" if request.interventions else "unsteered"
            found = f"{completion.steered_tokens} tokens were steered"
            raise RunError(f"the trial {request.id} should have been {wanted}, but {found}.")


def _judged(judge: Judge, cells: Sequence[Cell], responses: Sequence[str]) -> list[Judgement]:
    items = [
        JudgeItem(cell.prompt, response, cell.label, recovery=True)
        for cell, response in zip(cells, responses, strict=True)
    ]
    judgements = judge.judge(items)
    if len(judgements) != len(items):
        raise RunError(f"{judge.name} returned {len(judgements)} judgements for {len(items)} responses.")
    return judgements


def _read(rows: Sequence[Trial], requests: Sequence[Request], readings: Readings) -> list[Trial]:
    """Rows with the place of the first restart in tokens, and how likely restarts were."""
    read = list(rows)
    if readings.count:
        for index, row in enumerate(read):
            if len(row.attempts) > 1:
                read[index] = replace(row, restart_token=readings.count(row.response[: row.attempts[1].start]))
    if readings.restarts:
        firsts = [row.response[: row.attempts[0].end] if row.attempts else row.response for row in read]
        found = readings.restarts(requests, firsts)
        read = [
            replace(row, restart_logprobs=tuple((int(end), value) for end, value in ends))
            for row, ends in zip(read, found, strict=True)
        ]
    return read
