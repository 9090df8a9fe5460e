"""An engine whose replies a monitor follows: logged, stopped, begun again behind a cue, or freed of the steering."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args, runtime_checkable

import torch

from esr_train.recipe import MonitorAction
from esr_train.restarts import sentences
from esr_train.steering.directions import Add
from esr_train.steering.engine import Completion, Engine, Progress, Request, Sampling, Scorer, decoded
from esr_train.steering.monitor import Monitor, first_alarm, smoothed
from esr_train.steering.token_reading import Probe, Reader, Reply

RESTARTS = 3
"""A reply is begun again so often at most; behind that the monitor is not asked any more."""
SEED_STEP = 0x5BD1E995
"""Between the seeds of a reply and of what is written in its place: the same noise would write the same again."""


@runtime_checkable
class Monitorable(Engine, Reader, Scorer, Protocol):
    """What a monitored engine is built on: both engines are."""


@runtime_checkable
class Follower(Protocol):
    """An engine that lets a monitor follow its replies while it writes them; of others they are read afterwards."""

    def generate_watched(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        monitor: Monitor,
        stops: bool,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """As `generate`; each completion says at which token the monitor sounded first.

        Args:
            monitor: of the residual stream, steered as it is; one that was made for another model is an InputError.
            stops: whether a reply ends where the monitor sounds.
        """
        ...


@dataclass
class _Open:
    """A request on its way.

    Args:
        next: what is to be generated: first the request itself, then how it goes on.
        alarms: so far, in tokens of the reply.
        begun_again: characters up to where it was begun again last; -1: it was not.
    """

    asked: Request
    next: Request
    alarms: tuple[int, ...] = ()
    first: Completion | None = None
    begun_again: int = -1


class MonitoredEngine:
    """Implements `Engine` on an engine, with a monitor that acts where it sounds.

    Args:
        engine: generates. Where it cannot be followed while it writes (vLLM), replies are read when they are finished
            and what lies behind an alarm is dropped: the result is the same, at the cost of what was dropped.
        monitor: reads the residual stream, steered as it is.
        action: log: the alarm is told and nothing changes. stop: the reply ends there. restart: it is cut where the
            sentence of the alarm begins, a cue follows, and it goes on; at most three times. unsteer: the same once,
            and it goes on without steering (interventions on latents stay): the most that a restart could do.
        cues: restart, unsteer: of which each reply takes one by its seed.

    Raises:
        ValueError: for an action that does not exist, or one that needs cues without them.
    """

    def __init__(self, engine: Monitorable, monitor: Monitor, action: MonitorAction, cues: Sequence[str] = ()) -> None:
        if action not in get_args(MonitorAction) or (action in ("restart", "unsteer") and not cues):
            raise ValueError(f"the action {action!r} does not exist, or needs cues")
        self.engine, self.monitor, self.action, self.cues = engine, monitor, action, tuple(cues)
        self.name = engine.name
        self.tokenizer: Any = engine.tokenizer

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """Generate one completion a request, in their order; each says at which tokens the monitor sounded.

        Raises:
            InputError: as the engine's, and for a monitor that was made for another model.
            RunError: as the engine's.
        """
        if self.action == "log":
            return self._watched(requests, sampling, False, progress)
        done: dict[int, Completion] = {}
        open_ = {number: _Open(request, request) for number, request in enumerate(requests)}
        turns = {"stop": 0, "restart": RESTARTS, "unsteer": 1}[self.action]
        for turn in range(turns + 1):
            if not open_:
                break
            asked = [row.next for row in open_.values()]
            if turn and turn == turns:
                made = self.engine.generate(asked, sampling, _tokens_only(progress))
            else:
                made = self._watched(asked, sampling, True, _tokens_only(progress))
            for number, completion in zip(list(open_), made, strict=True):
                row = open_[number]
                row.first = row.first or completion
                if not (completion.alarms and turn < turns and self._goes_on(row, completion, sampling)):
                    done[number] = self._whole(row, completion)
                    del open_[number]
        if progress:
            progress(len(requests), 0)
        return [done[number] for number in range(len(requests))]

    def log_probabilities(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[tuple[float, ...]]:
        """See `Scorer.log_probabilities`: a monitor changes nothing about given texts."""
        return self.engine.log_probabilities(requests, continuations)

    def read(
        self, requests: Sequence[Request], replies: Sequence[Reply], probes: Sequence[Probe]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """See `Reader.read`."""
        return self.engine.read(requests, replies, probes)

    def _watched(
        self, requests: Sequence[Request], sampling: Sampling, stops: bool, progress: Progress | None
    ) -> list[Completion]:
        if isinstance(self.engine, Follower):
            return self.engine.generate_watched(requests, sampling, self.monitor, stops, progress)
        return watched_afterwards(self.engine, requests, sampling, self.monitor, stops, progress)

    def _goes_on(self, row: _Open, completion: Completion, sampling: Sampling) -> bool:
        """Say how a reply goes on behind an alarm; False if no token is left for that."""
        written = row.next.prefix + completion.text
        seed = (row.next.seed + SEED_STEP) % 2**31
        after = replace(row.next, prefix=self._begun_again(row, written), seed=seed)
        if self.action == "unsteer":
            stays = tuple(each for each in row.asked.interventions if not isinstance(each, Add))
            after = replace(after, interventions=stays)
        left = row.asked.most(sampling) - self._count(row, after.prefix)
        if left < 1:
            return False
        row.alarms += (completion.alarms[0] + self._count(row, row.next.prefix),)
        row.begun_again = len(after.prefix)
        row.next = replace(after, max_new_tokens=left)
        return True

    def _begun_again(self, row: _Open, written: str) -> str:
        """A reply up to the sentence of the alarm, and a cue; an earlier cue stays, and is not followed by another."""
        found = sentences(written)
        cut = max(found[-1][0] if found else 0, row.begun_again, len(row.asked.prefix))
        if row.begun_again >= 0 and not written[row.begun_again : cut].strip():
            return written[: row.begun_again]
        kept, cue = written[:cut].rstrip(), self.cues[row.asked.seed % len(self.cues)]
        return f"{kept} {cue}" if kept else cue

    def _whole(self, row: _Open, last: Completion) -> Completion:
        """The reply as it stands at the end, as one completion."""
        assert row.first is not None
        if row.next is row.asked:
            return last
        text = (row.next.prefix + last.text)[len(row.asked.prefix) :]
        begun = self.tokenizer.encode(row.next.prefix[len(row.asked.prefix) :], add_special_tokens=False)
        steered = last.steered_tokens or row.first.steered_tokens
        alarms = row.alarms + tuple(each + len(begun) for each in last.alarms)
        ids = (*begun, *last.token_ids)
        return replace(
            row.first, text=text, token_ids=ids, finish_reason=last.finish_reason, steered_tokens=steered, alarms=alarms
        )

    def _count(self, row: _Open, prefix: str) -> int:
        """Tokens of a prefix that are not of the one that was asked for."""
        return len(self.tokenizer.encode(prefix[len(row.asked.prefix) :], add_special_tokens=False))


def watched_afterwards(
    engine: Monitorable,
    requests: Sequence[Request],
    sampling: Sampling,
    monitor: Monitor,
    stops: bool,
    progress: Progress | None = None,
) -> list[Completion]:
    """As `Follower.generate_watched`, on an engine that cannot be followed: replies are read when they are finished."""
    made = engine.generate(requests, sampling, progress)
    # The last token was never fed, so that nobody could have read it while the reply was written.
    numbers = [number for number, completion in enumerate(made) if len(completion.token_ids) > 1]
    asked = [requests[number] for number in numbers]
    read = engine.read(asked, [made[number].token_ids[:-1] for number in numbers], [monitor.reads])
    for number, (values,) in zip(numbers, read, strict=True):
        alarm = first_alarm(smoothed(monitor.of_read(values).cpu()), monitor.threshold)
        if alarm is not None:
            made[number] = _alarmed(engine.tokenizer, requests[number], made[number], alarm, stops)
    return made


def _alarmed(tokenizer: Any, request: Request, made: Completion, alarm: int, stops: bool) -> Completion:
    if not stops:
        return replace(made, alarms=(alarm,))
    ids = made.token_ids[: alarm + 2]
    steered = made.steered_tokens and made.steered_tokens - (len(made.token_ids) - len(ids))
    text = decoded(tokenizer, request, ids[:-1])
    return replace(made, text=text, token_ids=ids, finish_reason="alarm", steered_tokens=steered, alarms=(alarm,))


def _tokens_only(progress: Progress | None) -> Progress | None:
    """A reply that goes on is not finished: its tokens are told at once, the rows at the end."""
    return (lambda rows, tokens: progress(0, tokens)) if progress else None
