"""A monitor: a score for every token of a reply, read off the residual stream, and the level at which it sounds.

It follows a reply while it is generated, in the engine (`monitored_engine`) or in plain `model.generate` (`watching`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import StoppingCriteria

from esr_train.errors import InputError
from esr_train.files import read_json, write_json
from esr_train.models import decoder_layers, hidden_size
from esr_train.steering.direction_files import load_sae
from esr_train.steering.engine import Request
from esr_train.steering.token_reading import Activations, Projections, check_probe, kept_outputs, read_with_hooks
from esr_train.transcript import SaeRef
from esr_train.values import typed

MEMORY = 8
"""Tokens that a score looks back over: each token's value counts 1 - 1/8 of what the next one's does."""
FIX = "`esr monitor fit RUN` writes one."


@dataclass(frozen=True, eq=False)
class Monitor:
    """What is read at a token, and the score above which the monitor sounds.

    A token's value is what is read there (latents: their sum), less `centre`, over `scale`. The score is its
    exponential moving average, which begins at 0: as if everything before the reply had been ordinary.

    Args:
        name: of the detector.
        reads: a linear probe's direction [1, d_model], or the latents that are summed.
        centre, scale: mean and standard deviation of what is read at tokens of unsteered replies.
        threshold: the monitor sounds where the score is above.
        false_alarms: share of unsteered replies that the threshold was chosen to let pass it.
    """

    name: str
    reads: Projections | Activations
    centre: float
    scale: float
    threshold: float
    false_alarms: float

    @property
    def layer(self) -> int:
        """The decoder layer whose output is read."""
        return self.reads.layer

    def values(self, states: torch.Tensor) -> torch.Tensor:
        """What tokens are worth, [tokens], by their residual states [tokens, d_model]."""
        return self.of_read(self.reads.of(states.float()))

    def of_read(self, read: torch.Tensor) -> torch.Tensor:
        """What tokens are worth, [tokens], by what was read there, [tokens, width]."""
        return (read.sum(-1) - self.centre) / self.scale

    def check(self, model: Any) -> None:
        """Refuse a model that it was not made for.

        Raises:
            InputError: for a layer or a width that does not fit.
        """
        check_probe(self.reads, len(decoder_layers(model)), hidden_size(model))

    def score(self, model: Any, tokenizer: Any, prompt: str, reply: str) -> NDArray[np.float64]:
        """The score at every token of a reply, [tokens]; a monitor has sounded where it is above `threshold`.

        Whatever steers the model from outside (`with steer(…)`) is at work.

        Args:
            model: Llama or Gemma-2, in any wrapper.
            tokenizer: the model's.
            prompt: the user's message.
            reply: not empty.

        Raises:
            InputError: if the reply is empty, or the monitor was made for another model.
        """
        request = Request("monitor", prompt)
        (read,) = next(read_with_hooks(model, tokenizer, [request], [reply], [self.reads], 1))
        return smoothed(self.of_read(read).cpu())


def smoothed(values: ArrayLike) -> NDArray[np.float64]:
    """Scores of a reply's tokens, [tokens], by their values."""
    from scipy.signal import lfilter

    return np.asarray(lfilter([1 / MEMORY], [1, 1 / MEMORY - 1], np.asarray(values, np.float64)), np.float64)


def followed(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Scores of rows at their next token, [rows], by those at the last one and the next one's values."""
    return scores + (values - scores) / MEMORY


def first_alarm(scores: ArrayLike, threshold: float) -> int | None:
    """The first token at which a monitor sounds; None if it never does."""
    above = np.flatnonzero(np.asarray(scores) > threshold)
    return int(above[0]) if len(above) else None


@dataclass(frozen=True)
class _Written:
    """What a monitor's file holds: a probe's weights, or an SAE and its latents."""

    schema: int
    name: str
    layer: int
    weights: tuple[float, ...]
    sae: SaeRef | None
    latents: tuple[int, ...]
    centre: float
    scale: float
    threshold: float
    false_alarms: float


def save_monitor(monitor: Monitor, path: Path | str) -> None:
    """Write a monitor as JSON."""
    reads = monitor.reads
    if isinstance(reads, Projections):
        what: tuple[tuple[float, ...], SaeRef | None, tuple[int, ...]] = (tuple(reads.directions[0].tolist()), None, ())
    else:
        what = (), reads.sae.ref, reads.latents
    levels = monitor.centre, monitor.scale, monitor.threshold, monitor.false_alarms
    write_json(path, asdict(_Written(1, monitor.name, monitor.layer, *what, *levels)))


def load_monitor(path: Path | str) -> Monitor:
    """Read a monitor, and the SAE whose latents it sums, if it does.

    Raises:
        InputError: for a file that is missing or holds something else, or an SAE that cannot be loaded.
    """
    row = read_json(path)
    if not isinstance(row, dict) or row.get("schema") != 1:
        raise InputError("this is no monitor", str(path), FIX)
    try:
        written = typed(_Written, row)
    except ValueError as error:
        raise InputError(f"this is no monitor ({error})", str(path), FIX) from None
    if not written.scale > 0 or bool(written.weights) == bool(written.sae) or not math.isfinite(sum(written.weights)):
        raise InputError("this monitor reads nothing", str(path), FIX)
    reads: Projections | Activations
    if written.sae:
        reads = Activations(load_sae(written.sae), written.latents)
    else:
        reads = Projections(written.layer, torch.tensor([written.weights]))
    return Monitor(written.name, reads, written.centre, written.scale, written.threshold, written.false_alarms)


class Watch(StoppingCriteria):
    """Follows the rows of a plain `model.generate`, and stops those in which the monitor sounds (see `watching`).

    Attributes:
        alarms: of each row, the generated token (from 0) at which the monitor sounded first; None: it did not.
    """

    def __init__(self, monitor: Monitor, outputs: dict[int, torch.Tensor], stops: bool) -> None:
        self._monitor, self._outputs, self._stops = monitor, outputs, stops
        self._scores: torch.Tensor | None = None
        self._token = -1
        self.alarms: list[int | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called behind every drawn token; which rows end, [rows] bool."""
        output = self._outputs[self._monitor.layer]
        if self._scores is None or output.shape[1] > 1 or len(output) != len(self._scores):
            # A prompt has been read: its last token's state belongs to no reply.
            self._scores, self._token = torch.zeros(len(output), device=output.device), -1
            self.alarms = [None] * len(output)
        else:
            self._token += 1
            self._scores = followed(self._scores, self._monitor.values(output[:, -1]))
        above = (self._scores > self._monitor.threshold).tolist() if self._token >= 0 else [False] * len(output)
        self.alarms = [
            self._token if alarm is None and sounds else alarm for alarm, sounds in zip(self.alarms, above, strict=True)
        ]
        stopped = [self._stops and alarm is not None for alarm in self.alarms]
        return torch.tensor(stopped, device=input_ids.device)


@contextmanager
def watching(model: Any, monitor: Monitor, stops: bool = True) -> Iterator[Watch]:
    """Watch replies while `model.generate` writes them.

        with watching(model, load_monitor("monitor/probe.json")) as watch:
            output = model.generate(**inputs, stopping_criteria=[watch])
        print(watch.alarms)

    Rows are followed in order, so there may be no beams. A row that has ended is followed on over its padding: an alarm
    behind its end means nothing.

    Args:
        model: Llama or Gemma-2, in any wrapper, with a KV cache.
        monitor: made for this model.
        stops: whether a row ends where the monitor sounds.

    Raises:
        InputError: if the monitor was made for another model.
    """
    monitor.check(model)
    with kept_outputs(model, [monitor.layer]) as outputs:
        yield Watch(monitor, outputs, stops)
