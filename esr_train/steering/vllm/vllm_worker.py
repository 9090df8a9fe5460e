"""Steering inside vLLM's workers: `worker_extension_cls` for stock vLLM, one instance on every rank.

A request names its interventions in `SamplingParams.extra_args["esr"]`, by reference to directions and SAEs that
were registered on the workers beforehand:

    {"key": "7", "reply_start": 31, "interventions": [
        {"kind": "add", "layer": 26, "direction": "d0", "scale": 210.0, "positions": "all"},
        {"kind": "clamp", "sae": "s0", "latents": [5], "value": 4.0, "positions": "generated"},
        {"kind": "ablate", "sae": "s0", "latents": [7, 9], "value": 0.0, "positions": "all"}],
     "read": {"sae": "s0", "latents": [5]}}

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

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import ENCODED_AT_ONCE, Add, LoadedSae
from esr_train.steering.interventions import Ablate, Clamp, Intervention, layer_of
from esr_train.steering.layer_edits import Layer, TokenRows
from esr_train.transcript import SaeRef

KEY = "esr"
SUPPORTED = ">=0.32,<0.33"
"""Releases of vLLM on which the extension was held against the transformers engine."""
FAMILIES = ("LlamaForCausalLM", "Gemma2ForCausalLM")
Report = tuple[str, list[tuple[int, int]], str | None, list[list[float]] | None]
"""A request's key, (layer, steered tokens) pairs, what went wrong, and its activations [positions][latents]."""


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

    def esr_direction(self, name: str, values: bytes) -> None:
        """Register a direction, [d_model] float32 as bytes."""
        vector = torch.frombuffer(bytearray(values), dtype=torch.float32)
        self.esr.directions[name] = vector.to(self.model_runner.device)

    def esr_sae(self, name: str, release: str, id: str, checksum: float) -> str | None:
        """Load and register an SAE; a sentence if it is not the one the engine has."""
        sae = load_sae(SaeRef(release, id))
        if abs(sae_checksum(sae) - checksum) > 1e-4 * max(1.0, abs(checksum)):
            return f"the SAE {release} / {id} that the worker finds is not the one that was asked for"
        sae.module.to(self.model_runner.device)
        self.esr.saes[name] = sae
        return None

    def esr_forget(self, names: list[str]) -> None:
        """Drop directions that no request uses any more."""
        for name in names:
            self.esr.directions.pop(name, None)

    def esr_take(self, keys: list[str]) -> list[Report]:
        """The reports of finished requests; each can be fetched once."""
        return self.esr.take(keys)


def sae_checksum(sae: LoadedSae) -> float:
    """Sum of the decoder's absolute values: tells one SAE from another."""
    return float(sae.module.W_dec.detach().double().abs().sum())


def unsupported(runner: Any) -> str | None:
    """Why a model runner cannot be steered, in a sentence; None if it can."""
    config = runner.vllm_config
    # Of the two generations of runners only the first keeps its batch in `input_batch` and `query_start_loc`.
    kinds = {kind.__module__ for kind in type(runner).__mro__}
    if "vllm.v1.worker.gpu_model_runner" not in kinds:
        found = f"the model runner {type(runner).__name__} ({type(runner).__module__}) is not known"
        return f"{found}, only the first generation's in vLLM {SUPPORTED}: set VLLM_USE_V2_MODEL_RUNNER=0"
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
    reply_start: int
    layers: dict[int, list[Intervention]] = field(default_factory=dict)
    sae: LoadedSae | None = None
    latents: list[int] = field(default_factory=list)
    activations: list[torch.Tensor] = field(default_factory=list)
    error: str | None = None

    def uses(self, layer: int) -> bool:
        """Whether it is steered or read at a layer."""
        return layer in self.layers or (self.sae is not None and self.sae.layer == layer)

    def fail(self, message: str) -> None:
        """Keep what went wrong first."""
        self.error = self.error or message


class _Steps:
    """Works out before each of vLLM's steps to which request every token belongs, and keeps what the layers count."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.directions: dict[str, torch.Tensor] = {}
        self.saes: dict[str, LoadedSae] = {}
        self._rows = int(runner.scheduler_config.max_num_seqs)
        self._free = list(range(self._rows))[::-1]
        self._running: dict[str, _Running] = {}
        self._done: dict[str, tuple[_Running, dict[int, torch.Tensor]]] = {}
        self._layers: dict[int, Layer] = {}
        self._next = np.zeros(self._rows, dtype=np.int64)
        # Of the requests in vLLM's batch, in its order: names, rows in the layers (-1: none) and starts of replies.
        self._names: list[str] = []
        self._row = np.zeros(0, dtype=np.int64)
        self._reply_start = np.zeros(0, dtype=np.int64)
        # The rows of the last step's tokens, and whether all of them were being generated.
        self._tokens: TokenRows | None = None
        self._generated = False
        self._inside = False
        self._reads: dict[int, list[tuple[_Running, int, int]]] = {}
        self._forward = runner._model_forward
        runner._model_forward = self._run

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
        batch, bounds = self.runner.input_batch, self.runner.query_start_loc.np
        names = list(batch.req_ids)
        changed = names != self._names
        if changed:
            self._admit(names)
        if not (self._row >= 0).any():
            self._set_rows(None)
            return
        lengths = np.diff(bounds[: len(names) + 1]).astype(np.int64)
        starts = batch.num_computed_tokens_cpu[: len(names)].astype(np.int64)
        self._follow(starts, lengths)
        generated = bool((lengths == 1).all() and (starts >= self._reply_start).all())
        same = self._tokens is not None and len(self._tokens.index) == width and not changed and not self._reads
        if same and generated and self._generated:
            for layer in self._layers.values():
                layer.counted = False
            return
        self._set_rows(self._token_rows(starts, lengths, width))
        self._generated = generated
        self._reads = self._reading(bounds)

    def _set_rows(self, tokens: TokenRows | None) -> None:
        self._tokens, self._generated, self._reads = tokens, False, {}
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
            running.activations.clear()
            for number in running.layers:
                self._layers[number].restart(row)

    def _admit(self, names: list[str]) -> None:
        """Give newcomers a row; take the rows of requests that vLLM no longer knows."""
        for name in [name for name in self._running if name not in self.runner.requests]:
            self._retire(name)
        for name in names:
            params = self.runner.requests[name].sampling_params
            asked = (params.extra_args or {}).get(KEY) if params else None
            if name not in self._running and asked and (asked["interventions"] or asked.get("read")):
                self._start(name, asked)
        batch = [self._running.get(name) for name in names]
        self._row = np.array([-1 if running is None else running.row for running in batch], dtype=np.int64)
        starts = [0 if running is None else running.reply_start for running in batch]
        self._reply_start = np.array(starts, dtype=np.int64)
        self._names = names

    def _start(self, name: str, asked: dict[str, Any]) -> None:
        running = self._running[name] = _Running(asked["key"], self._free.pop(), int(asked["reply_start"]))
        self._next[running.row] = 0
        try:
            for intervention in (self._intervention(wanted) for wanted in asked["interventions"]):
                running.layers.setdefault(layer_of(intervention), []).append(intervention)
            if asked.get("read"):
                running.sae, running.latents = self.saes[asked["read"]["sae"]], list(asked["read"]["latents"])
            for number, interventions in running.layers.items():
                self._layer(number).assign(running.row, interventions)
            if running.sae is not None:
                self._layer(running.sae.layer)
        except Exception as error:
            running.fail(f"its interventions could not be set up: {error!r}")

    def _intervention(self, asked: dict[str, Any]) -> Intervention:
        if asked["kind"] == "add":
            vector = self.directions[asked["direction"]] * asked["scale"]
            return Add(asked["layer"], vector, asked["positions"])
        sae, latents = self.saes[asked["sae"]], asked["latents"]
        if asked["kind"] == "clamp":
            return Clamp(sae, latents[0], asked["value"], asked["positions"])
        return Ablate(sae, tuple(latents), asked["positions"])

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
            for running, first, last in self._reads.get(layer.number, ()):
                self._read(running, steered[first:last].float() + residual[first:last].float())
        except Exception as error:
            for running in self._running.values():
                if running.uses(layer.number):
                    running.fail(f"layer {layer.number}: {error!r}")
            return None
        return steered, residual

    def _reading(self, bounds: np.ndarray) -> dict[int, list[tuple[_Running, int, int]]]:
        """For each layer, who reads there, and from which to which of the step's tokens."""
        reads: dict[int, list[tuple[_Running, int, int]]] = {}
        for number, name in enumerate(self._names):
            running = self._running.get(name)
            if running is not None and running.sae is not None:
                tokens = (running, int(bounds[number]), int(bounds[number + 1]))
                reads.setdefault(running.sae.layer, []).append(tokens)
        return reads

    def _read(self, running: _Running, states: torch.Tensor) -> None:
        assert running.sae is not None
        running.activations += [
            running.sae.encode(piece)[:, running.latents] for piece in states.split(ENCODED_AT_ONCE)
        ]

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
        """Reports of finished requests, in the order of the keys; what else is done is forgotten."""
        wanted = set(keys)
        for name in [name for name, running in self._running.items() if running.key in wanted]:
            self._retire(name)
        done, self._done = self._done, {}
        taken = [done[key] for key in keys if key in done]
        # One transfer for all counts.
        flat = [count for _, counts in taken for count in counts.values()]
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        return [
            (
                running.key,
                [(layer, next(numbers)) for layer in counts],
                running.error,
                torch.cat(running.activations).tolist() if running.activations else None,
            )
            for running, counts in taken
        ]
