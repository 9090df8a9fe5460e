"""The model that answers, between base and arm: how much of its adapter is at work, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Protocol

from peft.helpers import rescale_adapter_scale

from esr_train.adapter_scale import scale_adapter
from esr_train.errors import InputError, RunError
from esr_train.models import context_length, decoder_layers, hidden_size
from esr_train.steering.engine import Completion, Engine, Request, Sampling, check_length, encoded
from esr_train.steering.transformers_engine import TransformersEngine

SHARES = 100
"""Shares of an adapter that vLLM tells apart: each is an adapter of its own."""


class Switch(Protocol):
    """What answers.

    Args:
        layers: number of the model's decoder layers.
    """

    layers: int
    width: int

    def generate(self, requests: Sequence[Request], sampling: Sampling, resistance: float) -> list[Completion]:
        """Answer all of them with a share of the adapter at work: 0 is the base model, 1 the arm."""
        ...


class LoadedSwitch:
    """A model of transformers whose adapter, if it has one, is scaled where it stands.

    Args:
        model: of transformers, alone or with an adapter.
        batch_rows: most requests that run at once; None: as many as fit.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_rows: int | None = None) -> None:
        self.model, self._engine = model, TransformersEngine(model, tokenizer, batch_rows=batch_rows)
        self.layers, self.width = len(decoder_layers(model)), hidden_size(model)
        self._tokenizer, self._context = tokenizer, context_length(model)

    def generate(self, requests: Sequence[Request], sampling: Sampling, resistance: float) -> list[Completion]:
        """See `Switch`; raises InputError for a request that is longer than the model's context."""
        if self._context is not None:
            for request in requests:
                check_length(request, len(encoded(self._tokenizer, request).ids), sampling, self._context)
        with self.at_work(resistance):
            return self._engine.generate(requests, sampling)

    @contextmanager
    def at_work(self, share: float) -> Iterator[None]:
        """The adapter at work with a share of its strength, 0 to 1, while the block runs."""
        if share == 1 or not hasattr(self.model, "disable_adapter"):
            yield
        elif share == 0:
            with self.model.disable_adapter():
                yield
        else:
            with rescale_adapter_scale(self.model, share):
                yield


class ServedSwitch:
    """vLLM, which runs the base model with no adapter, the arm's, or a copy that is scaled when it is first asked for.

    Args:
        open_engine: an engine on the base model with the adapter of a folder, or with none.
        adapter: folder of the arm's adapter; None: there is none.
        layers: see `Switch`.
        width: see `Switch`.
    """

    def __init__(
        self, open_engine: Callable[[Path | None], Engine], adapter: Path | None, layers: int, width: int
    ) -> None:
        self.layers, self.width = layers, width
        self._open, self._adapter = open_engine, adapter
        self._engines: dict[int, Engine] = {}
        self._scaled = TemporaryDirectory(prefix="esr-adapters-")

    def generate(self, requests: Sequence[Request], sampling: Sampling, resistance: float) -> list[Completion]:
        """See `Switch`; `resistance` is rounded to a hundredth."""
        share = round(SHARES * resistance) if self._adapter else 0
        if share not in self._engines:
            self._engines[share] = self._open(self._folder(share))
        return self._engines[share].generate(requests, sampling)

    def _folder(self, share: int) -> Path | None:
        if not share or share == SHARES:
            return self._adapter if share else None
        assert self._adapter is not None
        folder = Path(self._scaled.name) / str(share)
        scale_adapter(self._adapter, share / SHARES, folder)
        return folder


@dataclass(eq=False)
class _Waiting:
    """A request in the queue, and what came of it."""

    request: Request
    sampling: Sampling
    resistance: float
    found: Completion | InputError | RunError | None = None


@dataclass
class Queue:
    """Lets requests that wait at the same time be answered in one batch, if they agree on sampling and resistance."""

    switch: Switch
    _waiting: list[_Waiting] = field(default_factory=list)
    _turn: Lock = field(default_factory=Lock)

    def ask(self, request: Request, sampling: Sampling, resistance: float) -> Completion:
        """Answer a request; threads may ask at the same time.

        Raises:
            InputError: for a request that does not fit the model.
            RunError: for one whose generation fails; others of its batch are answered all the same.
        """
        own = _Waiting(request, sampling, resistance)
        self._waiting.append(own)
        try:
            with self._turn:
                if own.found is None:
                    self._answer([each for each in list(self._waiting) if each.found is None and _alike(each, own)])
        finally:
            self._waiting.remove(own)
        if isinstance(own.found, Completion):
            return own.found
        assert own.found is not None
        raise own.found

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        requests, first = [each.request for each in batch], batch[0]
        try:
            made: Sequence[Any] = self.switch.generate(requests, first.sampling, first.resistance)
        except (InputError, RunError) as error:
            if len(batch) > 1:
                for each in batch:
                    self._answer([each])
                return
            made = [error]
        for each, found in zip(batch, made, strict=True):
            each.found = found


def _alike(one: _Waiting, other: _Waiting) -> bool:
    return (one.sampling, one.resistance) == (other.sampling, other.resistance)
