"""A running vLLM: started when it is needed, in eager mode, with the steering extension on its workers."""

import gc
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import InvalidStateError
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from esr_train.errors import InputError, RunError, first_line
from esr_train.models import choose_device, load_config, model_source
from esr_train.recipe import ModelSection
from esr_train.steering.vllm.vllm_worker import SUPPORTED

LONGEST = 8192
"""Most tokens of a conversation, if the model allows as many: vLLM reserves memory for one of that length."""
CPU_CACHE_BYTES = 1 << 30
"""Keys and values on the CPU, where vLLM would otherwise take most of the machine's memory."""
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Modules that adapters may change: the decoder's linear layers, as `target_modules: all-linear` has them.

With the output layer among them, vLLM's CPU build could not score prompts (`log_probabilities`).
"""
NOT_SERVED = "Merge it into the model (`merged: true`), or take the transformers engine."
QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
"""Environment of vLLM's processes: what they say is an error."""


class VllmServer:
    """One vLLM engine, started when it is first needed; several `VllmEngine`s (base, adapters) may share it.

    Args:
        rows: most requests that run at once.
        tensor_parallel: accelerators that share the model.
        lora_rank: highest rank of an adapter that will be used; 0: none will be.
        memory: share of each accelerator's memory that it takes, where it is not the only one; None: vLLM's default.
        options: further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        section: ModelSection,
        *,
        rows: int = 32,
        tensor_parallel: int = 1,
        lora_rank: int = 0,
        memory: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.section, self.rows, self.tensor_parallel, self.lora_rank = section, rows, tensor_parallel, lora_rank
        self.memory = memory
        self.config = load_config(section).get_text_config()
        self.max_length = min(int(self.config.max_position_embeddings), LONGEST)
        self._options = dict(options or {})
        self._llm: Any = None
        self._adapters: dict[Path, int] = {}

    @property
    def llm(self) -> Any:
        """The running `vllm.LLM`, steering installed.

        Raises:
            InputError: if vLLM is absent, of an unknown release, or cannot load the model.
        """
        self.start()
        return self._llm

    def start(self) -> None:
        """Start vLLM unless it runs: before a progress bar times what it does.

        Raises:
            InputError: as `llm`.
        """
        if self._llm is not None:
            return
        require_vllm()
        began = time.monotonic()
        # What this process no longer uses of an accelerator's memory, vLLM can have.
        gc.collect()
        torch.cuda.empty_cache()
        print(f"starting vLLM on {self.section.path}", flush=True)
        self._llm = self._started()
        problems = [problem for problem in self._llm.collective_rpc("esr_install") if problem]
        if problems:
            self.close()
            raise InputError(f"vLLM cannot be steered: {problems[0]}", "engine.kind")
        _announce_death(self._llm.llm_engine.engine_core)
        print(f"vLLM runs, after {time.monotonic() - began:.0f} s", flush=True)

    def close(self) -> None:
        """Stop vLLM and free its memory; the next use starts it again."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._adapters.clear()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Started, and held against the death of vLLM's processes while the block runs.

        Raises:
            RunError: if they have died; the next use starts them again.
        """
        self.start()
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError:
            self.close()
            raise RunError(
                f"vLLM's processes on {self.section.path} have died; what they said is above (killed for want of "
                "memory, they say nothing). What is finished is kept, and the same command goes on from there."
            ) from None

    def adapter(self, folder: Path) -> Any:
        """What tells vLLM to use an adapter.

        Raises:
            InputError: an adapter of a kind that vLLM does not serve.
        """
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.request import LoRARequest

        # Found out by its workers, it would stop vLLM.
        try:
            PEFTHelper.from_local_dir(str(folder), None).validate_legal(self.llm.llm_engine.vllm_config.lora_config)
        except ValueError as error:
            raise InputError(f"vLLM cannot serve this adapter ({error})", str(folder), NOT_SERVED) from None
        number = self._adapters.setdefault(folder, len(self._adapters) + 1)
        return LoRARequest(f"adapter-{number}", number, str(folder.resolve()))

    def _started(self) -> Any:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        # The second generation of runners is the default on some machines and is not supported (vllm_worker.py).
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        arguments = {**self._arguments(), **self._options}
        from vllm import LLM

        try:
            return LLM(**arguments)
        except (ValueError, RuntimeError, OSError) as error:
            what = f"vLLM cannot start ({first_line(error)})"
            raise InputError(what, "engine", "Its own messages above say more.") from error

    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": model_source(self.section),
            "revision": self.section.revision,
            "dtype": self.section.dtype,
            "max_num_seqs": self.rows,
            "max_model_len": self.max_length,
            "tensor_parallel_size": self.tensor_parallel,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "async_scheduling": False,
            "generation_config": "vllm",
            "worker_extension_cls": "esr_train.steering.vllm.vllm_worker.SteeringExtension",
            "logits_processors": ["esr_train.steering.vllm.vllm_sampling:SeededSampling"],
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self.lora_rank:
            arguments |= {"enable_lora": True, "max_lora_rank": _lora_rank(self.lora_rank), "max_loras": 1}
            arguments["lora_target_modules"] = list(LORA_MODULES)
        if choose_device(self.section).type == "cpu":
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        elif self.memory is not None:
            arguments["gpu_memory_utilization"] = self.memory
        return arguments


def _announce_death(core: Any) -> None:
    """Let whoever waits for vLLM's engine process know when it has died.

    vLLM's own watch notes the death (a process killed for want of memory, say), but wakes nobody: a call that waits
    for an answer would wait for ever.
    """
    resources = getattr(core, "resources", None)
    if resources is None:
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    # Not the client itself, which must not be kept alive.
    answers, calls = core.outputs_queue, core.utility_results

    def watch() -> None:
        while not resources.engine_dead:
            time.sleep(0.5)
        answers.put_nowait(EngineDeadError())
        for future in list(calls.values()):
            with suppress(InvalidStateError):
                future.set_exception(EngineDeadError())

    threading.Thread(target=watch, daemon=True, name="vllm-watch").start()


def require_vllm() -> None:
    """Refuse to go on without a release of vLLM that is known.

    Raises:
        InputError: with the supported range.
    """
    from packaging.specifiers import SpecifierSet

    release = _version()
    if release is None:
        raise InputError(
            "vLLM is not installed",
            "engine.kind",
            "On a GPU machine: pip install 'endogenous-steering-resistance[vllm]'.",
        )
    if not SpecifierSet(SUPPORTED).contains(release.partition("+")[0], prereleases=True):
        raise InputError(
            f"vLLM {release} is not known to the steering extension, which was checked on {SUPPORTED}",
            "engine.kind",
            "Install a release in that range, or take the transformers engine.",
        )


def _version() -> str | None:
    # The CPU build is a package of another name.
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _lora_rank(rank: int) -> int:
    """The least of the ranks vLLM offers that is high enough."""
    offered = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    enough = next((size for size in offered if size >= rank), None)
    if enough is None:
        raise InputError(f"vLLM serves adapters of rank {offered[-1]} at most, not {rank}", "train.lora.r")
    return enough
