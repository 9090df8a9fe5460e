"""Steering inside vLLM's workers: `worker_extension_cls` for stock vLLM, one instance on every rank.

What is to be done for a request (`Wanted`) is registered on the workers in one message before it runs; the request
carries its key in `SamplingParams.extra_args["esr"]`.

vLLM packs the tokens of all running requests into one row. Once per step, before the model runs, it is worked out
which token belongs to which request (`_Steps._begin`); the layers' hooks then only add and encode tensors. A decoder
layer of vLLM returns the residual stream in two parts, the block's output and what is yet to be added to it; the first
is steered. Under tensor parallelism both parts are whole on every rank when a layer returns (its last matrix product
ends in an all-reduce), so every rank does the same with its own copy of the vectors and SAEs; tokens are counted on
every rank, the counts must agree, and what goes wrong on any rank fails the request. Pipeline parallelism is refused.

vLLM must run in eager mode (`enforce_eager`), which is asked for and checked: torch.compile traces the layers without
their hooks, and a CUDA graph replays the kernels of the step it was captured from, whatever the hooks would do now. The
price is vLLM's launch overhead at every step, which weighs most on small models and small batches.

Nothing here raises inside a forward pass, which would stop the whole engine: what goes wrong is kept with the
requests it concerns, and they fail when their results are fetched.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from esr_train.errors import InputError
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import LoadedSae
from esr_train.steering.interventions import Intervention, layer_of
from esr_train.steering.layer_edits import Layer, TokenRows
from esr_train.steering.token_reading import Probe
from esr_train.transcript import SaeRef

KEY = "esr"
SUPPORTED = ">=0.32,<0.33"
"""Releases of vLLM on which the extension was held against the transformers engine."""
FAMILIES = ("LlamaForCausalLM", "Gemma2ForCausalLM")
ReadValues = tuple[tuple[int, int], bytes]
"""What a probe read: its shape [tokens fed, width], and the float32 values, which are many."""
Report = tuple[str, list[tuple[int, int]], str | None, list[ReadValues]]
"""A request's key, (layer, steered tokens) pairs, what went wrong, and what each of its probes read."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """What the workers are to do for one request.

    Args:
        reply_start: the index of the first token that belongs to the reply.
        interventions: applied in order.
        probes: what is read at every token.
    """

    reply_start: int
    interventions: tuple[Intervention, ...]
    probes: tuple[Probe, ...] = ()


def packed(wanted: dict[str, Wanted]) -> bytes:
    """What is wanted for requests, by key, for the workers' processes: SAEs by name, not by their weights."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(wanted)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, LoadedSae):
            return value.ref.release, value.ref.id, sae_checksum(value)
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.detach().float().cpu().numpy(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Loads the SAEs that it meets, each once."""

    def __init__(self, message: bytes, saes: dict[SaeRef, LoadedSae], device: Any) -> None:
        super().__init__(io.BytesIO(message))
        self._saes, self._device = saes, device

    def persistent_load(self, name: tuple[str, str, float]) -> LoadedSae:
        release, id, checksum = name
        sae = self._saes.get(SaeRef(release, id)) or load_sae(SaeRef(release, id))
        if abs(sae_checksum(sae) - checksum) > 1e-4 * max(1.0, abs(checksum)):
            raise InputError(f"the SAE {release} / {id} that the worker finds is not the one that was asked for", "sae")
        sae.module.to(self._device)
        self._saes[sae.ref] = sae
        return sae


def sae_checksum(sae: LoadedSae) -> float:
    """Sum of the decoder's absolute values: tells one SAE from another."""
    return float(torch.linalg.vector_norm(sae.module.W_dec.detach(), 1, dtype=torch.float64))


class SteeringExtension:
    """What the engine can call on every worker through `collective_rpc`; answers are plain lists."""

    model_runner: Any
    esr: "_Steps"

    def esr_install(self) -> str | None:
        """Put the hooks in; a sentence if this worker cannot be steered."""
        problem = unsupported(self.model_runner)
        if problem is None and not hasattr(self, "esr"):
            self.esr = _Steps(self.model_runner)
        return problem

    def esr_expect(self, message: bytes) -> str | None:
        """Know what is wanted for the requests that come next (see `packed`); a sentence if an SAE is another one."""
        try:
            self.esr.expected = _Unpickler(message, self.esr.saes, self.model_runner.device).load()
        except InputError as error:
            return str(error)
        return None

    def esr_take(self, keys: list[str]) -> list[Report]:
        """The reports of finished requests; each can be fetched once."""
        return self.esr.take(keys)


def unsupported(runner: Any) -> str | None:
    """Why a model runner cannot be steered, in a sentence; None if it can."""
    config = runner.vllm_config
    # Of the two generations of runners only the first keeps its batch in `input_batch` and `query_start_loc`.
    kinds = {kind.__module__ for kind in type(runner).__mro__}
    if "vllm.v1.worker.gpu_model_runner" not in kinds:
        problem = f"the model runner {type(runner).__name__} ({type(runner).__module__}) is not known"
        return f"{problem}, only the first generation's in vLLM {SUPPORTED}: set VLLM_USE_V2_MODEL_RUNNER=0"
    if type(runner.get_model()).__name__ not in FAMILIES:
        return f"{type(runner.get_model()).__name__} cannot be steered, only {' and '.join(FAMILIES)}"
    if config.cache_config.enable_prefix_caching:
        return "prefix caching must be off: cached keys and values of steered tokens would poison other requests"
    if not config.model_config.enforce_eager:
        return "enforce_eager must be on: hooks do not run inside compiled layers and CUDA graphs"
    if config.speculative_config is not None or config.scheduler_config.async_scheduling:
        return "speculative decoding and asynchronous scheduling must be off"
    if config.parallel_config.pipeline_parallel_size > 1:
        return "pipeline parallelism is not supported; use tensor parallelism"
    return None


@dataclass
class _Running:
    """A request with interventions or a read-out that has not been reported as finished.

    `row` is its row in the layers: free again when the request is done, and no row of vLLM's own batch, which moves.
    """

    key: str
    row: int
    wanted: Wanted
    layers: dict[int, list[Intervention]] = field(default_factory=dict)
    read: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """By the probe's number, in pieces."""
    error: str | None = None

    @property
    def reads_at(self) -> set[int]:
        """The layers at which it is read."""
        return {probe.layer for probe in self.wanted.probes}

    def fail(self, message: str) -> None:
        """Keep what went wrong first."""
        self.error = self.error or f"was not steered as asked: {message}"


class _Steps:
    """Works out before each of vLLM's steps to which request every token belongs, and keeps what the layers count."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.expected: dict[str, Wanted] = {}
        self.saes: dict[SaeRef, LoadedSae] = {}
        self._rows = int(runner.scheduler_config.max_num_seqs)
        self._free = list(range(self._rows))[::-1]
        self._running: dict[str, _Running] = {}
        self._done: dict[str, tuple[_Running, dict[int, torch.Tensor]]] = {}
        self._layers: dict[int, Layer] = {}
        self._next = np.zeros(self._rows, dtype=np.int64)
        # Of the requests in vLLM's batch, in its order: names, keys, rows in the layers (-1: none), starts of replies.
        self._names: list[str] = []
        self._keys: list[str | None] = []
        self._row = np.zeros(0, dtype=np.int64)
        self._reply_start = np.zeros(0, dtype=np.int64)
        # The rows of the last step's tokens, and whether all of them were being generated.
        self._tokens: TokenRows | None = None
        self._generated = False
        self._inside = False
        self._bounds = np.zeros(1, dtype=np.int64)
        # Of every step the keys in the batch, and whether their logits are finite, as tensors: nothing waits for them.
        self._finite: list[tuple[list[str | None], torch.Tensor]] = []
        self._forward, self._sample = runner._model_forward, runner._sample
        runner._model_forward, runner._sample = self._run, self._check_logits

    def _check_logits(self, logits: torch.Tensor | None, *args: Any) -> Any:
        # Under tensor parallelism only the first rank may have them.
        if logits is not None and len(logits) == len(self._keys):
            self._finite.append((self._keys, logits.amax(-1).isfinite()))
        return self._sample(logits, *args)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
            self._begin(int(positions.shape[-1]))  # type: ignore[union-attr]
        except Exception as error:
            for running in self._running.values():
                running.fail(f"the step's tokens could not be told apart: {error!r}")
            self._set_rows(None)
        # vLLM's own dummy runs call the model directly: they are not inside a step.
        self._inside = self._tokens is not None
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._inside = False

    def _begin(self, width: int) -> None:
        """Set the rows of a step of `width` tokens, padding at their end included."""
        batch = self.runner.input_batch
        names = list(batch.req_ids)
        self._bounds = self.runner.query_start_loc.np[: len(names) + 1].astype(np.int64)
        changed = names != self._names
        if changed:
            self._admit(names)
        if not (self._row >= 0).any():
            self._set_rows(None)
            return
        lengths = np.diff(self._bounds)
        starts = batch.num_computed_tokens_cpu[: len(names)].astype(np.int64)
        self._follow(starts, lengths)
        generated = bool((lengths == 1).all() and (starts >= self._reply_start).all())
        same = self._tokens is not None and len(self._tokens.index) == width and not changed
        if same and generated and self._generated:
            for layer in self._layers.values():
                layer.counted = False
            return
        self._set_rows(self._token_rows(starts, lengths, width))
        self._generated = generated

    def _set_rows(self, tokens: TokenRows | None) -> None:
        self._tokens, self._generated = tokens, False
        for layer in self._layers.values():
            layer.set_rows(tokens)

    def _token_rows(self, starts: np.ndarray, lengths: np.ndarray, width: int) -> TokenRows:
        request = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(request)) + (starts - np.cumsum(lengths) + lengths)[request]
        index, reply = np.full(width, -1, dtype=np.int64), np.zeros(width, dtype=bool)
        index[: len(request)] = self._row[request]
        reply[: len(request)] = position >= self._reply_start[request]
        return TokenRows(torch.from_numpy(index), torch.from_numpy(reply)).to(self.runner.device)

    def _follow(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Hold that every request goes on where its last step ended, or begins again after a preemption."""
        mine = self._row >= 0
        rows, starts, ends = self._row[mine], starts[mine], (starts + lengths)[mine]
        wrong = starts != self._next[rows]
        self._next[rows] = ends
        if not wrong.any():
            return
        by_row = {running.row: running for running in self._running.values()}
        for row, start in zip(rows[wrong].tolist(), starts[wrong].tolist(), strict=True):
            running = by_row[row]
            if start:
                running.fail(f"vLLM went on at token {start}, which is not where it had stopped")
            running.read.clear()
            for number in running.layers:
                self._layers[number].restart(row)

    def _admit(self, names: list[str]) -> None:
        """Give newcomers a row; take the rows of requests that vLLM no longer knows."""
        for name in [name for name in self._running if name not in self.runner.requests]:
            self._retire(name)
        params = [self.runner.requests[name].sampling_params for name in names]
        self._names = names
        self._keys = [((given and given.extra_args) or {}).get(KEY, {}).get("key") for given in params]
        for name, key in zip(names, self._keys, strict=True):
            if key in self.expected:
                self._start(name, key, self.expected.pop(key))
        batch = [self._running.get(name) for name in names]
        self._row = np.array([-1 if running is None else running.row for running in batch], dtype=np.int64)
        starts = [0 if running is None else running.wanted.reply_start for running in batch]
        self._reply_start = np.array(starts, dtype=np.int64)

    def _start(self, name: str, key: str, wanted: Wanted) -> None:
        running = self._running[name] = _Running(key, self._free.pop(), wanted)
        self._next[running.row] = 0
        try:
            for intervention in wanted.interventions:
                running.layers.setdefault(layer_of(intervention), []).append(intervention)
            for number, interventions in running.layers.items():
                self._layer(number).assign(running.row, interventions)
            for number in running.reads_at:
                self._layer(number)
        except Exception as error:
            running.fail(f"its interventions could not be set up: {error!r}")

    def _layer(self, number: int) -> Layer:
        if number not in self._layers:
            self._layers[number] = Layer(number, self._rows)
            module = self.runner.get_model().model.layers[number]
            module.register_forward_hook(partial(self._hook, self._layers[number]))
        return self._layers[number]

    def _hook(self, layer: Layer, _: Any, __: Any, output: Any) -> Any:
        if not self._inside:
            return None
        try:
            hidden, residual = output
            steered = layer.steer(hidden, residual)
            for running, first, last in self._readers(layer.number):
                _read(running, layer.number, steered[first:last].float() + residual[first:last].float())
        except Exception as error:
            for running in self._running.values():
                if layer.number in {*running.layers, *running.reads_at}:
                    running.fail(f"layer {layer.number}: {error!r}")
            return None
        return steered, residual

    def _readers(self, layer: int) -> Iterator[tuple[_Running, int, int]]:
        """Who reads at a layer, and from which to which of the step's tokens."""
        for name, first, last in zip(self._names, self._bounds, self._bounds[1:], strict=False):
            running = self._running.get(name)
            if running is not None and layer in running.reads_at:
                yield running, int(first), int(last)

    def _retire(self, name: str) -> None:
        running = self._running.pop(name)
        layers = {number: self._layers[number] for number in running.layers if number in self._layers}
        # Copies on the device: nothing waits for it until the results are fetched.
        self._done[running.key] = (running, {number: layer.count(running.row) for number, layer in layers.items()})
        for layer in layers.values():
            layer.release(running.row)
        self._free.append(running.row)
        self._names = []

    @torch.inference_mode()
    def take(self, keys: list[str]) -> list[Report]:
        """Reports of finished requests, in the order of the keys; what else is done is forgotten.

        A request that was neither steered nor read is reported only if its logits were not finite.
        """
        wanted = set(keys)
        for name in [name for name, running in self._running.items() if running.key in wanted]:
            self._retire(name)
        done, self._done = self._done, {}
        broken = self._take_broken()
        # One transfer for all counts.
        flat = [count for key in keys if key in done for count in done[key][1].values()]
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        reports: list[Report] = []
        for key in keys:
            running, counts = done.get(key, (None, {}))
            error = "got logits that are not finite" if key in broken else running.error if running else None
            read = [_values(running.read[number]) for number in sorted(running.read)] if running else []
            if running or error:
                reports.append((key, [(layer, next(numbers)) for layer in counts], error, read))
        return reports

    def _take_broken(self) -> set[str | None]:
        """The keys of requests whose logits were not finite in some step."""
        steps, self._finite = self._finite, []
        keys = [key for step, _ in steps for key in step]
        finite = torch.cat([values for _, values in steps]).tolist() if steps else []
        return {key for key, value in zip(keys, finite, strict=True) if not value}


def _read(running: _Running, layer: int, states: torch.Tensor) -> None:
    """Read a request's next tokens with the probes at a layer; states are [tokens, d_model] float32."""
    for number, probe in enumerate(running.wanted.probes):
        if probe.layer == layer:
            # A copy: what is read may be the states themselves, which the next layers change.
            running.read.setdefault(number, []).append(probe.of(states).clone())


def _values(pieces: list[torch.Tensor]) -> ReadValues:
    whole = torch.cat(pieces).float().cpu()
    return (whole.shape[0], whole.shape[1]), whole.numpy().tobytes()
