"""Training one arm: labelled rows, adapter, live injection and one of TRL's trainers, resumed where it stopped."""

import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, Trainer
from trl import GRPOConfig

from esr_train.adapters import adapter_source, is_complete, trainable_adapter
from esr_train.errors import InputError, RunError, first_line
from esr_train.files import read_json, write_json
from esr_train.models import load_model, load_tokenizer
from esr_train.provenance import RESULT, provenance, refuse_changes
from esr_train.recipe import Recipe
from esr_train.training import callbacks, saving
from esr_train.training.batches import Collator, PairCollator
from esr_train.training.callbacks import BehaviourProbe, Meter, Probe, Progress
from esr_train.training.checks import check_flow, check_packing
from esr_train.training.dataset import (
    TrainingRow,
    hold_out,
    packed,
    paired,
    read_rows,
    row_key,
    singly,
    table,
    to_dataset,
    to_prompts,
)
from esr_train.training.injection import LiveInjection, live_injection
from esr_train.training.live_trainers import EsrTrainer, LiveTrainer, PreferenceTrainer, count_parameters
from esr_train.training.rollouts import Reward, RolloutTrainer
from esr_train.training.saving import check_checkpoint, last_checkpoint, save_adapter
from esr_train.training.settings import (
    ROWS_AT_ONCE,
    TrainerConfig,
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

TRAINERS: dict[str, type[LiveTrainer]] = {"sft": EsrTrainer, "dpo": PreferenceTrainer, "grpo": RolloutTrainer}
PATIENCE = 3
"""Evaluations without improvement after which training stops, where `load_best_model_at_end` is set."""


def data_file(recipe: Recipe, arm: str, directory: Path) -> Path:
    """The arm's training file: the recipe's `train.data`, or what the run has generated."""
    named = recipe.for_arm(arm).train.data
    return Path(named) if named else directory / "data" / f"{arm}.jsonl"


def adapter_folder(arm: str, directory: Path) -> Path:
    """Where an arm's adapter lies in a run directory."""
    return directory / "adapter" / arm


def start_folder(recipe: Recipe, arm: str, directory: Path) -> Path | None:
    """The adapter from which an arm's training goes on; None for an arm that begins with a new one.

    Raises:
        InputError: if it is not there yet.
    """
    section = recipe.arms[arm]
    origin = recipe.arms[section.of] if section.of else section
    if section.of and origin.is_trained:
        folder: Path | None = adapter_folder(section.of, directory)
    elif origin.adapter:
        folder = adapter_source(origin.adapter)
    else:
        return None
    if folder is None or not is_complete(folder):
        what = "training goes on from an adapter that is not there"
        raise InputError(what, f"arms.{arm}: {folder or origin.adapter}", "Train that arm first, or check the path.")
    return folder


def train(
    recipe: Recipe, arm: str, directory: Path, probe: ProbeFactory | None = None, reward: Reward | None = None
) -> Path:
    """Train an arm's adapter, or go on where an earlier call stopped; returns its folder. A finished one is left alone.

    Args:
        recipe: the experiment's.
        arm: one of `recipe.arms`.
        directory: of the run; the data are `data/<arm>.jsonl` in it unless the recipe names a file.
        probe: makes the behavioural probe; called only if the recipe has `train.probe`.
        reward: says what replies are worth, for `train.method: grpo`.

    Raises:
        InputError: bad settings or data, or a continuation of a run that was begun with others.
        RunError: an injection that does not do what it should, or an adapter that has learned nothing.
    """
    section, folder = recipe.for_arm(arm), adapter_folder(arm, directory)
    start = start_folder(recipe, arm, directory)
    data, hub = data_file(recipe, arm, directory), saving.repository(section)
    # Before the model is loaded: under ZeRO-3 this is what shards it while it loads.
    args = check_settings(section, folder / "checkpoints")
    tokenizer = load_tokenizer(section.model)
    rows = read_rows(section, data, tokenizer)
    plugin = args.deepspeed_plugin
    record = provenance(section, arm, data, len(rows), args.world_size, plugin and plugin.zero_stage, start)
    _begin(folder, record, args)
    if hub and args.process_index == 0:
        saving.create_repository(hub, section.train.args.get("hub_private_repo"))
    if not is_complete(folder):
        live = live_injection(section, rows)
        model = load_model(section.model, quantization=section.train.quantization, for_training=True)
        if live:
            live.check_fits(model)
        model = trainable_adapter(model, start) if start else model
        trainer = build_trainer(section, args, model, tokenizer, rows, live, probe, reward)
        _run(trainer, folder, record, keeps_checkpoints="save_total_limit" in section.train.args)
    if hub and args.process_index == 0:
        saving.upload(folder, hub)
    return folder


def _run(trainer: LiveTrainer, folder: Path, record: dict[str, Any], keeps_checkpoints: bool) -> None:
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


def _begin(folder: Path, record: dict[str, Any], args: TrainerConfig) -> None:
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
    args: TrainerConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TrainingRow],
    live: LiveInjection | None = None,
    probe: ProbeFactory | None = None,
    reward: Reward | None = None,
) -> LiveTrainer:
    """Wire up rows, adapter, injection and callbacks, and check packing and injection on two of the rows.

    Args:
        recipe: as the arm sees it.
        args: from `check_settings`.
        model: as loaded, or with the adapter that training goes on from; a new one is added here otherwise.
        tokenizer, rows, live: the model's, and what `read_rows` and `live_injection` give.
        probe, reward: see `train`.
    """
    training, held_out = (rows, []) if args.eval_strategy == "no" else hold_out(rows)
    collator = Collator(tokenizer.pad_token_id, packs(recipe), packs(recipe) and is_flash(recipe))
    prompts = isinstance(args, GRPOConfig) and _prompts(recipe, args, training, reward)
    given = prompts or _sequences(recipe, training, held_out, collator)
    try:
        trainer = TRAINERS[recipe.train.method](
            live=live,
            meter=Meter(count_parameters(model), args.world_size, trains_on_cpu(recipe)),
            names={row_key(row.labelled.id): row.labelled.id for row in rows},
            model=model,
            args=args,
            processing_class=tokenizer,
            peft_config=None if isinstance(model, PeftModel) else decoder_only(lora_config(recipe), model),
            callbacks=[Progress()],
            **given,
        )
    except ValueError as error:
        raise InputError(f"the trainer refuses these settings ({first_line(error)})", "train") from error
    _add_callbacks(trainer, recipe, tokenizer, probe)
    _check_before_training(trainer, training, live, collator)
    return trainer


def _sequences(
    recipe: Recipe, training: Sequence[TrainingRow], held_out: Sequence[TrainingRow], collator: Collator
) -> dict[str, Any]:
    """What a trainer on written replies is given."""
    sources, prefers = table([*training, *held_out]), recipe.train.method == "dpo"
    grouped = paired if prefers else singly
    sequences = packed(training, recipe.train.max_length) if packs(recipe) else grouped(training)
    return {
        "data_collator": PairCollator(collator) if prefers else collator,
        "train_dataset": to_dataset(sequences, sources),
        "eval_dataset": to_dataset(grouped(held_out), sources) if held_out else None,
    }


def _prompts(
    recipe: Recipe, args: GRPOConfig, training: Sequence[TrainingRow], reward: Reward | None
) -> dict[str, Any]:
    """What a trainer on replies of its own is given."""
    if reward is None:
        raise InputError("nothing says what replies are worth", "train.method=grpo", "Pass `reward` to `train`.")
    assert args.generation_batch_size
    assert args.num_generations
    prompts = args.generation_batch_size // args.num_generations
    if len(training) < prompts:
        what = f"a step replies to {prompts} prompts, and there are {len(training)} rows"
        raise InputError(what, "train.args", "Lower per_device_train_batch_size or gradient_accumulation_steps.")
    dataset = to_prompts(training, table(training))
    return {"reward": reward, "rows_at_once": recipe.engine.batch_rows or ROWS_AT_ONCE, "train_dataset": dataset}


def _add_callbacks(
    trainer: LiveTrainer, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, probe: ProbeFactory | None
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
    trainer: LiveTrainer, rows: Sequence[TrainingRow], live: LiveInjection | None, collator: Collator
) -> None:
    """Check packing and injection on two short rows, the first of them steered if any is; under DeepSpeed, later.

    Where training prefers, they are a row and its rejected one.
    """
    distributed = trainer.accelerator.distributed_type
    if wants_deepspeed() and distributed != DistributedType.DEEPSPEED:
        # ACCELERATE_USE_CPU makes accelerate leave DeepSpeed out without a word.
        raise RunError(f"DeepSpeed was asked for, but accelerate runs {distributed}.")
    if distributed == DistributedType.DEEPSPEED:
        return
    by_length = sorted(rows, key=lambda row: len(row.labelled.input_ids))
    steered = (row for row in by_length if live and row.vector and live.is_injected(row_key(row.labelled.id), epoch=0))
    first = next(steered, by_length[0])
    other = first.rejected or next((row for row in by_length if row is not first), first)
    sequences = [[first, other]] if collator.packed else [[first], [other]]
    batch = collator(list(to_dataset(sequences, table(rows))))
    placed = {name: value.to(trainer.args.device) for name, value in batch.items()}
    if collator.packed:
        check_packing(trainer.model, placed)
    if live:
        check_flow(trainer.model, placed, live)
