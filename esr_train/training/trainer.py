"""Training one arm: TRL's SFTTrainer on labelled rows, with live injection, resumed where it stopped."""

import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer

from esr_train.adapters import is_complete
from esr_train.errors import InputError, RunError, first_line
from esr_train.files import read_json, write_json
from esr_train.masking import IGNORED
from esr_train.models import bare_model, load_model, load_tokenizer
from esr_train.provenance import RESULT, provenance, refuse_changes
from esr_train.recipe import Recipe
from esr_train.training import callbacks, saving
from esr_train.training.batches import Collator, LengthGrouped
from esr_train.training.callbacks import BehaviourProbe, Meter, Probe, Progress, flops_per_token
from esr_train.training.checks import check_flow, check_packing, verified
from esr_train.training.dataset import TrainingRow, hold_out, packed, read_rows, row_key, singly, table, to_dataset
from esr_train.training.injection import COLUMNS, LiveInjection, live_injection
from esr_train.training.lm_head import score_trained_tokens
from esr_train.training.saving import check_checkpoint, last_checkpoint, save_adapter
from esr_train.training.settings import (
    check_settings,
    decoder_only,
    is_flash,
    lora_config,
    packs,
    trains_on_cpu,
    wants_deepspeed,
)

ProbeFactory = Callable[[Any, PreTrainedTokenizerBase], Probe]
"""Given the model in training and its tokenizer, makes the behavioural probe."""

SAMPLES = "samples.jsonl"
"""In the adapter's folder: what the probe showed of the model's responses on the way."""

EVENTS = "tensorboard"
"""In the adapter's folder: tensorboard's, where it is asked for."""

PATIENCE = 3
"""Evaluations without improvement after which training stops, where `load_best_model_at_end` is set."""


class EsrTrainer(SFTTrainer):
    """SFTTrainer on collated rows with steering columns, which stops at the first loss or gradient that is not finite.

    Args:
        live: steers the rows in their forward and backward pass; None for plain training.
        meter: counts tokens for the log.
        names: the rows' ids by their keys.
    """

    def __init__(self, *, live: LiveInjection | None, meter: Meter, names: dict[int, str], **arguments: Any) -> None:
        super().__init__(**arguments)
        score_trained_tokens(bare_model(self.model))
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
        self._meter.count(int((inputs["row"] >= 0).sum()), int((inputs["labels"] != IGNORED).sum()))
        epoch = int(self.state.epoch or 0)
        verifying = self._verifying(model, inputs, epoch)
        # Autocast gives the adapters' products their dtype; to float32 and back before each would change nothing.
        uncast = disable_input_dtype_casting(model, active=self.accelerator.native_amp)
        with self._steering(model, inputs, epoch), verifying, uncast:
            loss = super().training_step(model, inputs, num_items_in_batch)
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
        """Add speed, memory and the share of trained tokens to a training log."""
        if "loss" in logs:
            logs.update(self._meter.read())
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
        # SFTTrainer would write a model card of its own into every checkpoint.
        Trainer._save_checkpoint(self, model, trial)


def count_parameters(model: Any) -> int:
    """Parameters of the whole model, also where ZeRO-3 shards them or NF4 packs two in one."""
    total = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        total += 2 * count if type(parameter).__name__ == "Params4bit" else count
    return total


def data_file(recipe: Recipe, arm: str, directory: Path) -> Path:
    """The arm's training file: the recipe's `train.data`, or what the run has generated."""
    named = recipe.for_arm(arm).train.data
    return Path(named) if named else directory / "data" / f"{arm}.jsonl"


def adapter_folder(arm: str, directory: Path) -> Path:
    """Where an arm's adapter lies in a run directory."""
    return directory / "adapter" / arm


def train(recipe: Recipe, arm: str, directory: Path, probe: ProbeFactory | None = None) -> Path:
    """Train an arm's adapter, or go on where an earlier call stopped; a finished adapter is left as it is.

    Args:
        recipe: the experiment's.
        arm: one of `recipe.arms`.
        directory: of the run; the data are `data/<arm>.jsonl` in it unless the recipe names a file.
        probe: makes the behavioural probe; called only if the recipe has `train.probe`.

    Returns:
        the adapter's folder, `adapter/<arm>` in the run directory.

    Raises:
        InputError: bad settings or data, or a continuation of a run that was begun with others.
        RunError: an injection that does not do what it should, or an adapter that has learned nothing.
    """
    section, folder = recipe.for_arm(arm), adapter_folder(arm, directory)
    data, hub = data_file(recipe, arm, directory), saving.repository(section)
    # Before the model is loaded: under ZeRO-3 this is what shards it while it loads.
    args = check_settings(section, folder / "checkpoints")
    tokenizer = load_tokenizer(section.model)
    rows = read_rows(section, data, tokenizer)
    plugin = args.deepspeed_plugin
    record = provenance(section, arm, data, len(rows), args.world_size, plugin and plugin.zero_stage)
    _begin(folder, record, args)
    is_main_process = args.process_index == 0
    if hub and is_main_process:
        saving.create_repository(hub, section.train.args.get("hub_private_repo"))
    if not is_complete(folder):
        live = live_injection(section, rows)
        model = load_model(section.model, quantization=section.train.quantization, for_training=True)
        if live:
            live.check_fits(model)
        trainer = build_trainer(section, args, model, tokenizer, rows, live, probe)
        _run(trainer, folder, record, keeps_checkpoints="save_total_limit" in section.train.args)
    if hub and is_main_process:
        saving.upload(folder, hub)
    return folder


def _run(trainer: EsrTrainer, folder: Path, record: dict[str, Any], keeps_checkpoints: bool) -> None:
    """Train from the last checkpoint on, save the adapter and leave the process group."""
    checkpoint = last_checkpoint(folder / "checkpoints", trainer.args.world_size)
    if checkpoint:
        check_checkpoint(checkpoint, trainer.model)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    save_adapter(trainer, folder, record)
    callbacks.end_runs(trainer.args)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero() and not keeps_checkpoints:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if trainer.args.world_size > 1 or trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        trainer.accelerator.end_training()


def _begin(folder: Path, record: dict[str, Any], args: SFTConfig) -> None:
    """Note what this training is made from, or hold it against what was noted when it was begun."""
    begun = folder / "checkpoints" / "provenance.json"
    if is_complete(folder):
        refuse_changes(read_json(folder / "provenance.json"), record, folder, RESULT)
    elif begun.is_file():
        refuse_changes(read_json(begun), record, folder)
    elif args.process_index == 0:
        write_json(begun, record)


def build_trainer(
    recipe: Recipe,
    args: SFTConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TrainingRow],
    live: LiveInjection | None = None,
    probe: ProbeFactory | None = None,
) -> EsrTrainer:
    """Wire up rows, adapter, injection and callbacks, and check packing and injection on two of the rows.

    Args:
        recipe: as the arm sees it.
        args: from `check_settings`.
        model: as loaded; the adapter is added here.
        tokenizer, rows, live, probe: the model's, and what `read_rows`, `live_injection` and a `ProbeFactory` give.
    """
    training, held_out = (rows, []) if args.eval_strategy == "no" else hold_out(rows)
    sources, is_packed = table(rows), packs(recipe)
    sequences = packed(training, recipe.train.max_length) if is_packed else singly(training)
    try:
        trainer = EsrTrainer(
            live=live,
            meter=Meter(count_parameters(model), args.world_size, trains_on_cpu(recipe)),
            names={row_key(row.labelled.id): row.labelled.id for row in rows},
            model=model,
            args=args,
            data_collator=Collator(tokenizer.pad_token_id, is_packed, is_packed and is_flash(recipe)),
            train_dataset=to_dataset(sequences, sources),
            eval_dataset=to_dataset(singly(held_out), sources) if held_out else None,
            processing_class=tokenizer,
            peft_config=decoder_only(lora_config(recipe), model),
            callbacks=[Progress()],
        )
    except ValueError as error:
        raise InputError(f"the trainer refuses these settings ({first_line(error)})", "train") from error
    _add_callbacks(trainer, recipe, tokenizer, probe)
    _check_before_training(trainer, training, live, is_packed)
    return trainer


def _add_callbacks(
    trainer: EsrTrainer, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, probe: ProbeFactory | None
) -> None:
    folder = Path(str(trainer.args.output_dir)).parent
    trainer.remove_callback(PrinterCallback)
    callbacks.keep_events(trainer, folder / EVENTS)
    if trainer.args.load_best_model_at_end:
        trainer.add_callback(EarlyStoppingCallback(PATIENCE))
    if recipe.train.probe and probe:
        log = functools.partial(Trainer.log, trainer)
        made = probe(trainer.model, tokenizer)
        trainer.add_callback(BehaviourProbe(made, recipe.train.probe.every, log, folder / SAMPLES))
    elif recipe.train.probe and trainer.is_world_process_zero():
        print("train.probe is left out: `train` was given nothing that steers and judges.", file=sys.stderr)


def _check_before_training(
    trainer: EsrTrainer, rows: Sequence[TrainingRow], live: LiveInjection | None, is_packed: bool
) -> None:
    """Check packing and injection on two short rows, the first of them steered if any is; under DeepSpeed, later."""
    distributed = trainer.accelerator.distributed_type
    if wants_deepspeed() and distributed != DistributedType.DEEPSPEED:
        # ACCELERATE_USE_CPU makes accelerate leave DeepSpeed out without a word.
        raise RunError(f"DeepSpeed was asked for, but accelerate runs {distributed}.")
    if distributed == DistributedType.DEEPSPEED:
        return
    by_length = sorted(rows, key=lambda row: len(row.labelled.input_ids))
    steered = (row for row in by_length if live and row.vector and live.is_injected(row_key(row.labelled.id), epoch=0))
    first = next(steered, by_length[0])
    other = next((row for row in by_length if row is not first), first)
    sequences = [[first, other]] if is_packed else [[first], [other]]
    batch = trainer.data_collator(list(to_dataset(sequences, table(rows))))
    placed = {name: value.to(trainer.args.device) for name, value in batch.items()}
    if is_packed:
        check_packing(trainer.model, placed)
    if live:
        check_flow(trainer.model, placed, live)
