"""Steering inside vLLM's workers: `worker_extension_cls` for stock vLLM, one instance on every rank.

A request names its interventions in `SamplingParams.extra_args["esr"]`, by reference to directions and SAEs that
were registered on the workers beforehand:

    {"key": "7", "reply_start": 31, "interventions": [
        {"kind": "add", "layer": 26, "direction": "d0", "scale": 210.0, "positions": "all"},
        {"kind": "clamp", "sae": "s0", "latents": [5], "value": 4.0, "positions": "generated"},
        {"kind": "ablate", "sae": "s0", "latents": [7, 9], "value": 0.0, "positions": "all"}],
     "read": {"sae": "s0", "latents": [5]}}

vLLM packs the tokens of all running requests into one row. Once per step, before the model runs, it is worked out
which token belongs to whom (`_Steps.begin`); the layers' hooks then only add and encode tensors. A decoder layer of
vLLM returns the residual stream in two parts, the block's output and what is yet to be added to it; the first is
steered. Under tensor parallelism both parts are whole on every rank when a layer returns (its last matrix product
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

from esr_train.steering.directions import LoadedSae, load_sae
from esr_train.steering.interventions import Ablate, Add, Clamp, Intervention
from esr_train.steering.layer_edits import ENCODED_AT_ONCE, Layer, Placement
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
    """A request with interventions or a read-out that has not been reported as finished."""

    key: str
    slot: int
    reply_start: int
    layers: dict[int, list[Intervention]]
    sae: LoadedSae | None
    latents: list[int]
    read: list[torch.Tensor] = field(default_factory=list)
    error: str | None = None

    def uses(self, layer: int) -> bool:
        """Whether it is steered or read at a layer."""
        return layer in self.layers or (self.sae is not None and self.sae.layer == layer)


class _Steps:
    """Works out each step's placement, and keeps what the layers count."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.directions: dict[str, torch.Tensor] = {}
        self.saes: dict[str, LoadedSae] = {}
        slots = int(runner.scheduler_config.max_num_seqs)
        self._slots = slots
        self._free = list(range(slots))[::-1]
        self._running: dict[str, _Running] = {}
        self._done: dict[str, tuple[_Running, dict[int, torch.Tensor]]] = {}
        self._layers: dict[int, Layer] = {}
        self._next = np.zeros(slots, dtype=np.int64)
        self._members: list[str] = []
        self._owner = np.zeros(0, dtype=np.int64)
        self._reply_start = np.zeros(0, dtype=np.int64)
        self._steady = False
        self._placed: Placement | None = None
        self._reads: dict[int, list[tuple[_Running, int, int]]] = {}
        self._forward = runner._model_forward
        runner._model_forward = self._run

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
            self._begin(int(positions.shape[-1]))  # type: ignore[union-attr]
        except Exception as error:
            self._fail(self._running.values(), f"the step could not be placed: {error!r}")
            self._place(None)
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._placed = None

    def _begin(self, width: int) -> None:
        """Place the step: `width` tokens, padding at their end included."""
        batch, bounds = self.runner.input_batch, self.runner.query_start_loc.np
        members = list(batch.req_ids)
        changed = members != self._members
        if changed:
            self._admit(members)
        if not (self._owner >= 0).any():
            self._steady = False
            self._place(None)
            return
        count = len(members)
        lengths = np.diff(bounds[: count + 1]).astype(np.int64)
        starts = batch.num_computed_tokens_cpu[:count].astype(np.int64)
        self._follow(starts, lengths)
        generating = bool((lengths == 1).all() and (starts >= self._reply_start).all())
        if generating and self._steady and not changed and not self._reads and self._placement_fits(width):
            self._placed = self._lasting
            for layer in self._layers.values():
                layer.counted = False
            return
        self._place(self._placement(starts, lengths, width))
        self._steady = generating
        self._reads = self._reading(starts, bounds)

    def _placement_fits(self, width: int) -> bool:
        return self._lasting is not None and len(self._lasting.owner) == width

    def _place(self, placement: Placement | None) -> None:
        self._placed = self._lasting = placement
        self._reads = {}
        for layer in self._layers.values():
            layer.place(placement)

    def _placement(self, starts: np.ndarray, lengths: np.ndarray, width: int) -> Placement:
        firsts = np.cumsum(lengths) - lengths
        rows = np.repeat(np.arange(len(lengths)), lengths)
        position = starts[rows] + np.arange(len(rows)) - firsts[rows]
        owner, reply = np.full(width, -1, dtype=np.int64), np.zeros(width, dtype=bool)
        owner[: len(rows)] = self._owner[rows]
        reply[: len(rows)] = position >= self._reply_start[rows]
        device = self.runner.device
        return Placement(torch.from_numpy(owner).to(device), torch.from_numpy(reply).to(device))

    def _follow(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Hold that every request goes on where its last step ended, or begins again after a preemption."""
        mine = self._owner >= 0
        slots, starts, ends = self._owner[mine], starts[mine], (starts + lengths)[mine]
        wrong = starts != self._next[slots]
        self._next[slots] = ends
        if not wrong.any():
            return
        by_slot = {running.slot: running for running in self._running.values()}
        for slot, start in zip(slots[wrong].tolist(), starts[wrong].tolist(), strict=True):
            running = by_slot[slot]
            if start:
                self._fail([running], f"vLLM went on at token {start}, which is not where it had stopped")
            running.read.clear()
            for index in running.layers:
                self._layers[index].restart(slot)

    def _admit(self, members: list[str]) -> None:
        """Give newcomers a slot; take the slots of requests that vLLM no longer knows."""
        for name in [name for name in self._running if name not in self.runner.requests]:
            self._retire(name)
        for name in members:
            params = self.runner.requests[name].sampling_params
            asked = (params.extra_args or {}).get(KEY) if params else None
            if name not in self._running and asked and (asked["interventions"] or asked.get("read")):
                self._start(name, asked)
        found = [self._running.get(name) for name in members]
        self._owner = np.array([-1 if each is None else each.slot for each in found], dtype=np.int64)
        self._reply_start = np.array([0 if each is None else each.reply_start for each in found], dtype=np.int64)
        self._members = members

    def _start(self, name: str, asked: dict[str, Any]) -> None:
        running = _Running(asked["key"], self._free.pop(), int(asked["reply_start"]), {}, None, [])
        self._running[name] = running
        self._next[running.slot] = 0
        try:
            for intervention in (self._intervention(each) for each in asked["interventions"]):
                running.layers.setdefault(intervention.layer, []).append(intervention)
            if asked.get("read"):
                running.sae, running.latents = self.saes[asked["read"]["sae"]], list(asked["read"]["latents"])
            for index, program in running.layers.items():
                self._layer(index).assign(running.slot, program)
            if running.sae is not None:
                self._layer(running.sae.layer)
        except Exception as error:
            self._fail([running], f"its interventions could not be set up: {error!r}")

    def _intervention(self, asked: dict[str, Any]) -> Intervention:
        if asked["kind"] == "add":
            vector = self.directions[asked["direction"]] * asked["scale"]
            return Add(asked["layer"], vector, asked["positions"])
        sae, latents = self.saes[asked["sae"]], asked["latents"]
        if asked["kind"] == "clamp":
            return Clamp(sae.layer, sae, latents[0], asked["value"], asked["positions"])
        return Ablate(sae.layer, sae, tuple(latents), asked["positions"])

    def _layer(self, index: int) -> Layer:
        if index not in self._layers:
            self._layers[index] = Layer(index, self._slots)
            module = self.runner.get_model().model.layers[index]
            module.register_forward_hook(partial(self._hook, self._layers[index]))
        return self._layers[index]

    def _hook(self, layer: Layer, _: Any, __: Any, output: Any) -> Any:
        if self._placed is None:
            return None
        try:
            hidden, residual = output
            steered = layer.steer(hidden, residual)
            self._read(layer, steered, residual)
        except Exception as error:
            concerned = [each for each in self._running.values() if each.uses(layer.index)]
            self._fail(concerned, f"layer {layer.index}: {error!r}")
            return None
        return steered, residual

    def _reading(self, starts: np.ndarray, bounds: np.ndarray) -> dict[int, list[tuple[_Running, int, int]]]:
        """For each layer, who reads there, and from which to which of the step's tokens."""
        reads: dict[int, list[tuple[_Running, int, int]]] = {}
        for row, name in enumerate(self._members):
            running = self._running.get(name)
            if running is not None and running.sae is not None:
                tokens = (running, int(bounds[row]), int(bounds[row + 1]))
                reads.setdefault(running.sae.layer, []).append(tokens)
        return reads

    def _read(self, layer: Layer, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        for running, first, last in self._reads.get(layer.index, ()):
            assert running.sae is not None
            states = hidden[first:last].float() + residual[first:last].float()
            pieces = [running.sae.encode(piece)[:, running.latents] for piece in states.split(ENCODED_AT_ONCE)]
            running.read.append(torch.cat(pieces))

    def _fail(self, concerned: Any, message: str) -> None:
        for running in concerned:
            running.error = running.error or message

    def _retire(self, name: str) -> None:
        running = self._running.pop(name)
        # Copies on the device: nothing waits for it until the results are fetched.
        counts = {index: self._layers[index].count(running.slot) for index in running.layers if index in self._layers}
        self._done[running.key] = (running, counts)
        for index in running.layers:
            if index in self._layers:
                self._layers[index].release(running.slot)
        self._free.append(running.slot)
        self._members = []

    @torch.inference_mode()
    def take(self, keys: list[str]) -> list[Report]:
        """Reports of finished requests, in the order of the keys; what else is done is forgotten."""
        wanted = set(keys)
        for name in [name for name, running in self._running.items() if running.key in wanted]:
            self._retire(name)
        done, self._done = self._done, {}
        flat = [count for key in keys if key in done for count in done[key][1].values()]
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        return [self._report(key, *done[key], numbers) for key in keys if key in done]

    def _report(self, key: str, running: _Running, counts: dict[int, torch.Tensor], numbers: Any) -> Report:
        read = torch.cat(running.read).tolist() if running.read else None
        return key, [(index, next(numbers)) for index in counts], running.error, read
