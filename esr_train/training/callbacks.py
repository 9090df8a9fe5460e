"""What is told while training: speed, use of the hardware, memory; the behavioural probe; loggers' files and runs."""

import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from esr_train.files import read_jsonl, write_jsonl


@dataclass(frozen=True)
class Observation:
    """What a probe has measured.

    Args:
        figures: to log, such as the restart rate with and without steering.
        samples: a few responses as JSON objects, for a person to read.
    """

    figures: dict[str, float]
    samples: tuple[dict[str, Any], ...] = ()


Probe = Callable[[int, bool], Observation]
"""Called with the step, and whether this process's figures are the ones that are logged.

Every process generates (under ZeRO-3 each holds a part of the weights), but one alone needs a judge.
"""

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "L4": 121e12,
}
"""Dense bf16 operations a second, from the makers' data sheets, by a part of the device's name."""


def flops_per_token(parameters: int) -> float:
    """Operations to train LoRA on one token: 4 for every parameter of the model.

    Two in the forward pass and two to carry the gradient through the frozen weights in the backward pass; the
    frozen weights' own gradients (two more in full training) are not computed. Attention scores and what
    gradient checkpointing computes twice are left out, as is usual for MFU.
    """
    return 4.0 * parameters


def peak_flops() -> float | None:
    """Peak bf16 operations a second of the first accelerator; None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    return next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_memory_gib(on_cpu: bool) -> float:
    """The most memory this process has held: the accelerator's, or RAM when training on the CPU."""
    if not on_cpu:
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Meter:
    """Counts this process's tokens and turns them into figures for the log.

    Args:
        world_size: processes, which are taken to be equally fast.
        on_cpu: whether training runs on the CPU.
    """

    def __init__(self, parameters: int, world_size: int, on_cpu: bool) -> None:
        self._parameters, self._world_size, self._on_cpu = parameters, world_size, on_cpu
        self._peak = None if on_cpu else peak_flops()
        self._tokens = self._trained = self._generated = 0
        self._since = time.perf_counter()

    def count_generated(self, tokens: int) -> None:
        """Replies of so many `tokens` were written to be learned from."""
        self._generated += tokens

    def count(self, tokens: int, trained: int) -> None:
        """A micro-batch of `tokens` real (not padding) tokens, of which `trained` carry a label."""
        if not self._tokens:
            self._since = time.perf_counter()
        self._tokens += tokens
        self._trained += trained

    def read(self) -> dict[str, float]:
        """Figures since the last reading; tokens are real ones (no padding), of all processes."""
        if not self._tokens:
            return {}
        seconds = max(time.perf_counter() - self._since, 1e-9)
        figures = {
            "tokens_per_second": round(self._tokens * self._world_size / seconds, 1),
            "trained_token_share": round(self._trained / self._tokens, 4),
            "trained_tokens": self._trained * self._world_size,
            "peak_memory_gib": round(peak_memory_gib(self._on_cpu), 3),
        }
        if self._peak:
            figures["mfu"] = round(self._tokens * flops_per_token(self._parameters) / seconds / self._peak, 4)
        if self._generated:
            figures["generated_tokens"] = self._generated * self._world_size
        self._tokens = self._trained = self._generated = 0
        return figures


class Progress(ProgressCallback):
    """One line with loss, speed and ETA, rewritten in place on a terminal."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_begin(args, state, control)
        if self.training_bar is not None:
            self.training_bar.set_description("train")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        shown = {key: f"{logs[key]:.4g}" for key in ("loss", "eval_loss", "tokens_per_second") if logs and key in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(shown, refresh=False)


class BehaviourProbe(TrainerCallback):
    """Calls the probe every so many steps, hands its figures to the log and writes its samples beside it.

    Args:
        probe: generates under steering with the model as it is now and judges; it runs on every process.
        every: steps between two calls.
        samples: JSONL file for the samples, each with the step it was made at.
    """

    def __init__(self, probe: Probe, every: int, log: Callable[[dict[str, float]], None], samples: Path) -> None:
        self._probe, self._every, self._log, self._samples = probe, every, log, samples

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        if state.global_step % self._every:
            return
        is_training, random_state = model.training, torch.get_rng_state()
        model.eval()
        try:
            observation = self._probe(state.global_step, state.is_world_process_zero)
        finally:
            # Measuring must not change what is measured: dropout goes on as if nothing had happened.
            model.train(is_training)
            torch.set_rng_state(random_state)
        if state.is_world_process_zero:
            self._write(state.global_step, observation.samples)
        should_log = control.should_log
        self._log({f"probe_{key}": value for key, value in observation.figures.items()})
        # Logging takes back the wish to log, and this step's loss may still be waiting for it.
        control.should_log = should_log

    def _write(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        before: list[dict[str, Any]] = read_jsonl(self._samples, dict) if self._samples.exists() else []
        # A run that goes on from a checkpoint comes by some steps again.
        kept = [row for row in before if row["step"] < step]
        write_jsonl(self._samples, [*kept, *({"step": step, **sample} for sample in samples)])


def keep_events(trainer: Trainer, folder: Path) -> None:
    """Let tensorboard write to a folder of its own; by default it is among the checkpoints, which are removed."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(folder)


def end_runs(args: TrainingArguments) -> None:
    """Close wandb's run, which would otherwise take the next arm's figures as its own."""
    if "wandb" in (args.report_to or []):
        import wandb

        wandb.finish()
