"""Reading what happens inside a model at every token of given replies; both engines implement `Reader`."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from esr_train.errors import InputError
from esr_train.files import read_json, write_json
from esr_train.models import check_layer_number, decoder_layers, hidden_size
from esr_train.steering.directions import ENCODED_AT_ONCE, LoadedSae
from esr_train.steering.engine import Encoding, Request, check_steered, encoded, encoded_with
from esr_train.steering.hook import steering
from esr_train.steering.interventions import layer_of
from esr_train.steering.sampling import filled_up

VALUES = 1 << 24
"""Activations that are known at once: 64 MiB, of an SAE of 131k latents 128 tokens."""
Reply = str | Sequence[int]
"""A reply that is read: its text, or its token ids as they were generated."""


@dataclass(frozen=True, eq=False)
class Activations:
    """Reads activations of an SAE's latents, [tokens, latents], at the output of the SAE's layer.

    Raises:
        InputError: if the SAE has no such latent, or its activations cannot be computed.
    """

    sae: LoadedSae
    latents: tuple[int, ...]

    def __post_init__(self) -> None:
        self.sae.check_use("read", self.latents)

    @property
    def layer(self) -> int:
        """The decoder layer whose output is read."""
        return self.sae.layer

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """What is read from residual states [tokens, d_model]."""
        index = list(self.latents)
        return torch.cat([self.sae.encode(piece)[:, index] for piece in states.split(ENCODED_AT_ONCE)])


@dataclass(frozen=True, eq=False)
class Projections:
    """Reads scalar products with `directions` [k, d_model], [tokens, k], at the output of decoder layer `layer`."""

    layer: int
    directions: torch.Tensor

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """What is read from residual states [tokens, d_model]."""
        return states @ self.directions.to(states).T


@dataclass(frozen=True, eq=False)
class States:
    """Reads the residual states themselves, [tokens, d_model], at the output of decoder layer `layer`."""

    layer: int

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """What is read from residual states [tokens, d_model]."""
        return states


Probe = Activations | Projections | States


@runtime_checkable
class Reader(Protocol):
    """An engine that reads at the tokens of replies, each under its own request's interventions.

    Steering off is a request without interventions. What is read at a layer has passed the interventions there; the
    layers and SAEs that are read need not be those that steer.
    """

    tokenizer: Any

    def read(
        self, requests: Sequence[Request], replies: Sequence[Reply], probes: Sequence[Probe]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """For each request in turn what every probe reads, [tokens of the reply, width] float32.

        A reply stands right behind its request's prefix; neither prompt nor prefix is read. Seeds play no part.

        Raises:
            InputError: a probe or an intervention that does not fit the model, an empty reply.
            RunError: a request that was not steered at exactly the tokens it asked for.
        """
        ...


def with_reply(tokenizer: Any, request: Request, reply: Reply) -> tuple[Encoding, int]:
    """A request's prompt, prefix and reply as the model reads them, and how many of the last tokens are the reply's.

    Raises:
        InputError: if the reply is empty.
    """
    if not len(reply):
        raise InputError(
            f"request {request.id!r} has an empty reply", "read", "Leave it out: there is nothing to read."
        )
    if isinstance(reply, str):
        return encoded_with(tokenizer, request, reply)
    before = encoded(tokenizer, request)
    return Encoding([*before.ids, *reply], before.reply_start), len(reply)


def check_probe(probe: Probe, layers: int, width: int) -> None:
    """Refuse a probe that does not fit a model of `layers` decoder layers and a residual stream of `width`.

    Raises:
        InputError: naming what does not fit.
    """
    check_layer_number(probe.layer, layers, "read")
    read = width if isinstance(probe, States) else None
    if isinstance(probe, Activations):
        read = probe.sae.d_model
    elif isinstance(probe, Projections):
        read = probe.directions.shape[-1] if probe.directions.dim() == 2 else None
    if read != width:
        raise InputError(f"what is to be read does not fit a residual stream {width} wide", "read")


def read_with_hooks(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    replies: Sequence[Reply],
    probes: Sequence[Probe],
    rows: int,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """`Reader.read` on a transformers model, `rows` at once, in order; what is read stays on the model's device."""
    for probe in probes:
        check_probe(probe, len(decoder_layers(model)), hidden_size(model))
    for start in range(0, len(requests), rows):
        batch = requests[start : start + rows]
        pairs = zip(batch, replies[start : start + rows], strict=True)
        texts = [with_reply(tokenizer, request, reply) for request, reply in pairs]
        states = _layer_outputs(model, batch, [whole for whole, _ in texts], {probe.layer for probe in probes})
        for row, (whole, tail) in enumerate(texts):
            last = len(whole.ids)
            yield tuple(probe.of(states[probe.layer][row, last - tail : last].float()) for probe in probes)


@torch.no_grad()
def _layer_outputs(
    model: Any, requests: Sequence[Request], texts: Sequence[Encoding], layers: Collection[int]
) -> dict[int, torch.Tensor]:
    """Outputs [rows, positions, d_model] of some decoder layers in one forward pass; padding is at the right.

    The pass ends behind the last layer that is read or steered: what is deeper would be thrown away.
    """
    device = next(model.parameters()).device
    ids = filled_up([text.ids for text in texts], device)
    ends, starts = torch.tensor([[len(text.ids), text.reply_start] for text in texts], device=device).unbind(1)
    column = torch.arange(ids.shape[1], device=device)
    real = column < ends[:, None]
    steered_layers = {layer_of(each) for request in requests for each in request.interventions}
    last = max(steered_layers.union(layers))
    with (
        steering(model, [request.interventions for request in requests]) as steered,
        kept_outputs(model, layers) as kept,
        _ending_behind(model, last),
    ):
        index = torch.where(real, torch.arange(len(texts), device=device)[:, None], -1)
        steered.set_rows(index, column >= starts[:, None])
        model(input_ids=ids, attention_mask=real.long(), use_cache=False, logits_to_keep=1)
    counts = steered.counts()
    for row, (request, text) in enumerate(zip(requests, texts, strict=True)):
        check_steered(request, text, len(text.ids), {layer: rows[row] for layer, rows in counts.items()})
    return kept


@contextmanager
def kept_outputs(model: Any, layers: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """What some decoder layers return while the context is open, by layer; steered, if it is opened behind that."""
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int, _: nn.Module, __: Any, output: Any) -> None:
        kept[layer] = output[0] if isinstance(output, tuple) else output

    handles = [decoder_layers(model)[layer].register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """Ends a forward pass of which everything is known that was asked for."""


@contextmanager
def _ending_behind(model: Any, layer: int) -> Iterator[None]:
    """A forward pass ends behind a decoder layer, and with it the context; to be opened behind what else hooks in."""

    def end(*_: Any) -> None:
        raise _Enough

    handle = decoder_layers(model)[layer].register_forward_hook(end)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()


@dataclass(frozen=True, eq=False)
class StateFile:
    """Residual states of many replies in one memory-mapped file.

    Args:
        states: [tokens of all replies, d_model] float32.
        starts: [replies + 1], where each reply's tokens begin, and where the last one's end.
    """

    states: NDArray[np.float32]
    starts: tuple[int, ...]

    def of(self, reply: int) -> NDArray[np.float32]:
        """The states of a reply's tokens, [tokens, d_model]."""
        return self.states[self.starts[reply] : self.starts[reply + 1]]


def store_states(
    reader: Reader, requests: Sequence[Request], replies: Sequence[Reply], layer: int, path: Path
) -> StateFile:
    """Read residual states into a file, of which no more than a batch is in memory; `open_states` opens it again.

    Raises:
        InputError, RunError: as `Reader.read`.
    """
    _index_of(path).unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    starts, width = [0], 0
    with path.open("wb") as file:
        for (states,) in reader.read(requests, replies, [States(layer)]):
            starts.append(starts[-1] + len(states))
            width = states.shape[1]
            file.write(states.float().cpu().numpy().tobytes())
    # Last, because the index says that the file is whole.
    write_json(_index_of(path), {"d_model": width, "starts": starts})
    return open_states(path)


def open_states(path: Path) -> StateFile:
    """Open a file that `store_states` wrote.

    Raises:
        InputError: if it was not written to its end.
    """
    index = read_json(_index_of(path))
    starts, width = index["starts"], index["d_model"]
    shape = (starts[-1], width)
    # An empty file cannot be mapped.
    states = np.memmap(path, np.float32, "r", shape=shape) if starts[-1] else np.zeros(shape, np.float32)
    return StateFile(states, tuple(starts))


def _index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def peak_activations(
    reader: Reader,
    requests: Sequence[Request],
    replies: Sequence[Reply],
    sae: LoadedSae,
    peaks: NDArray[np.float32],
    what: str = "replies",
) -> NDArray[np.float64]:
    """Every latent's strongest activation in each reply, in one pass; few tokens' are known at once.

    Args:
        reader: an engine.
        requests, replies: as in `Reader.read`.
        sae: all of whose latents are read.
        peaks: [replies, n_latents], filled in; may be memory-mapped.
        what: the replies are, shown with the progress.

    Returns:
        The share of all tokens at which each latent is active, [n_latents].

    Raises:
        InputError, RunError: as `Reader.read`, and if the SAE's activations cannot be computed.
    """
    sae.check_use("read")
    at_once, tokens = max(1, VALUES // sae.n_latents), 0
    active = torch.zeros(sae.n_latents, dtype=torch.long)
    read = reader.read(requests, replies, [States(sae.layer)])
    with torch.no_grad():
        for number, (states,) in enumerate(tqdm(read, total=len(requests), desc=f"read {what}", unit="reply")):
            peak = torch.zeros(sae.n_latents, device=states.device)
            active = active.to(states.device)
            for piece in states.split(at_once):
                activations = sae.encode(piece)
                peak = torch.maximum(peak, activations.amax(0))
                active += activations.count_nonzero(0)
            peaks[number] = peak.cpu().numpy()
            tokens += len(states)
    return (active.double() / max(tokens, 1)).cpu().numpy()
