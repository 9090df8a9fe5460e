"""TRL's trainers under live injection, with a meter, stopped at the first number that is not finite."""

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from torch.utils.data import Sampler
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, SFTTrainer

from esr_train.errors import RunError
from esr_train.masking import IGNORED
from esr_train.models import bare_model
from esr_train.training.batches import LengthGrouped
from esr_train.training.callbacks import Meter, flops_per_token
from esr_train.training.checks import verified
from esr_train.training.injection import COLUMNS, LiveInjection
from esr_train.training.lm_head import score_trained_tokens

REFERENCE = "ref"
"""Name of the frozen copy of an adapter that training goes on from; the reference of DPO and GRPO, given by TRL."""

TOTALS = {"trained_tokens", "generated_tokens"}
"""Figures of the log that are sums from the first step on."""


class LiveTrainer(Trainer):
    """A trainer on collated rows with steering columns, which stops at the first loss or gradient that is not finite.

    It stands before one of TRL's trainers in a class of both (see below). All forward passes of a step run under the
    rows' steering: the policy's, the reference's, and those that gradient checkpointing does again.

    Args:
        live: steers the rows in their forward and backward pass; None for plain training.
        meter: counts tokens for the log.
    """

    def __init__(self, *, live: LiveInjection | None, meter: Meter, names: dict[int, str], **arguments: Any) -> None:
        super().__init__(**arguments)
        temperature = self.args.temperature if isinstance(self, GRPOTrainer) else 1.0
        score_trained_tokens(bare_model(self.model), isinstance(self, DPOTrainer), temperature)
        self._live, self._meter, self._names = live, meter, names
        self._batch: list[str] = []
        self._step_rows: list[str] = []
        # Elsewhere the injection is checked before training; DeepSpeed's backward pass must be its own.
        self._unchecked = live is not None and self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self._parameters = count_parameters(self.model)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch, both under the rows' steering."""
        is_trained = inputs["labels"] != IGNORED if "labels" in inputs else inputs["completion_mask"]
        self._meter.count(int((inputs["row"] >= 0).sum()), int(is_trained.sum()))
        epoch = int(self.state.epoch or 0)
        verifying = self._verifying(model, inputs, epoch)
        # Autocast gives the adapters' products their dtype; to float32 and back before each would change nothing.
        uncast = disable_input_dtype_casting(model, active=self.accelerator.native_amp)
        with self._steering(model, inputs, epoch), verifying, uncast:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._step_rows += self._batch
        return loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The held-out rows' loss; strengths are drawn once, so that epochs can be compared."""
        with self._steering(model, inputs, 0):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """The loss of a micro-batch.

        Raises:
            RunError: naming the rows, if it is not finite; nothing has been learned of them then.
        """
        result = super().compute_loss(*arguments, **options)
        self._require_finite("loss", result[0] if isinstance(result, tuple) else result, self._batch)
        return result

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # The trainer asks for it right before each step of the optimiser.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            self._require_finite("gradient", torch.as_tensor(norm), self._step_rows)
        self._step_rows = []
        return norm

    def _require_finite(self, what: str, value: torch.Tensor, rows: Sequence[str]) -> None:
        if not bool(value.detach().isfinite().all()):
            raise RunError(
                f"step {self.state.global_step + 1}: the {what} is {value.item()}, in one of the rows "
                f"{', '.join(map(repr, rows))}. Training stops before it learns that. Look at these rows and the "
                "strength at which they are steered; if they are sound, lower the learning rate."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed, memory, and what has been trained on and generated up to now to a training log."""
        if "loss" in logs or "train_runtime" in logs:
            figures = self._meter.read()
            for name in TOTALS & figures.keys():
                # The history comes back with a checkpoint, and the sum with it.
                figures[name] += max((entry.get(name, 0) for entry in self.state.log_history), default=0)
            logs.update(figures)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations spent on a batch, by the formula of `flops_per_token`."""
        return int(flops_per_token(self._parameters) * inputs["input_ids"].numel())

    def _verifying(self, model: Any, inputs: dict[str, Any], epoch: int) -> AbstractContextManager[object]:
        """Under DeepSpeed, check the injection in the first micro-batch that has a steered row."""
        if self._live is None or not self._unchecked:
            return nullcontext()
        columns = {name: inputs[name] for name in COLUMNS}
        added = self._live.interventions(columns, epoch)
        if not any(added):
            return nullcontext()
        self._unchecked = False
        return verified(model, self._live.layer, self._live.delta(added, columns))

    def _steering(self, model: Any, inputs: dict[str, Any], epoch: int) -> AbstractContextManager[None]:
        self._batch = [self._names[key] for key in inputs["key"].tolist()]
        if self._live is not None:
            return self._live.steering(model, inputs, epoch)
        for name in COLUMNS:
            inputs.pop(name, None)
        return nullcontext()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        assert self.train_dataset is not None
        args, lengths = self.args, self.train_dataset["length"]
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGrouped(lengths, batch, args.seed, lambda: int(self.state.epoch or 0))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # TRL's trainers would write a model card of their own into every checkpoint.
        Trainer._save_checkpoint(self, model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # The reference is made anew from where training starts. transformers would load nothing else of a checkpoint.
        shutil.rmtree(Path(output_dir or str(self.args.output_dir)) / REFERENCE, ignore_errors=True)


class EsrTrainer(LiveTrainer, SFTTrainer):
    """Cue and answer are learned token by token."""


class PreferenceTrainer(LiveTrainer, DPOTrainer):
    """A reply is preferred to its row's rejected one; the reference is the model as it is when training starts."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        # Rows are tokenised already; see `dataset.paired`.
        return dataset


def count_parameters(model: Any) -> int:
    """Parameters of the whole model, also where ZeRO-3 shards them or NF4 packs two in one."""
    total = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        total += 2 * count if type(parameter).__name__ == "Params4bit" else count
    return total
