"""A recipe's `train` section as SFTConfig and LoraConfig: our defaults, and what may not be set."""

import dataclasses
import difflib
import inspect
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from trl import SFTConfig

from esr_train.errors import InputError
from esr_train.recipe import Recipe
from esr_train.training.loggers import check_installed

LORA_DEFAULTS: dict[str, Any] = {
    "r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
    "bias": "none",
    "task_type": "CAUSAL_LM",
}
"""The paper's adapter."""

DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 10,
    "save_strategy": "epoch",
    "report_to": "none",
}
"""The paper's optimisation, with rows of like length batched together."""

DECIDED_ELSEWHERE = {
    "output_dir": "The run directory decides where files go.",
    "bf16": "Set model.dtype.",
    "fp16": "Half precision overflows in these models; set model.dtype to bfloat16 or float32.",
    "use_cpu": "Set model.device to cpu.",
    "max_length": "Set train.max_length.",
    "seed": "Set the recipe's seed.",
    "data_seed": "Set the recipe's seed.",
    "deepspeed": "Launch with `accelerate launch --config_file recipes/accelerate/zero2.yaml`.",
    "fsdp": "Launch with DeepSpeed: `accelerate launch --config_file recipes/accelerate/zero3.yaml`.",
    "resume_from_checkpoint": "Training continues from the last checkpoint by itself.",
    "remove_unused_columns": "The trainer chooses the columns.",
    "dataset_kwargs": "The trainer prepares the rows.",
    "completion_only_loss": "Set train.loss.",
    "assistant_only_loss": "Set train.loss.",
    "padding_free": "Set train.args.packing, which pads next to nothing.",
    "eval_packing": "Held-out rows are not packed.",
    "eos_token": "The chat template's end-of-turn token is trained.",
    "pad_token": "The tokenizer's padding token is used.",
    "auto_find_batch_size": "A changed batch size is another experiment; set per_device_train_batch_size.",
    "hub_token": "A recipe is published with its adapter. Use `hf auth login` or the variable HF_TOKEN.",
    "hub_strategy": "The finished adapter alone is uploaded.",
    "hub_always_push": "The finished adapter alone is uploaded.",
    "hub_revision": "The finished adapter goes to the main branch.",
    "truncation_mode": "Rows are never truncated; raise train.max_length.",
}


def sft_config(recipe: Recipe, directory: Path) -> SFTConfig:
    """The trainer's settings: our defaults, the recipe's `train.args` above them.

    Args:
        recipe: as the arm sees it.
        directory: where checkpoints go.

    Raises:
        InputError: an unknown key (near matches are named), one that is decided elsewhere, a value that
            SFTConfig refuses, or packing that cuts rows.
    """
    given = dict(recipe.train.args)
    fields = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    _refuse_unknown(given, fields, "train.args", "SFTConfig")
    for key in given:
        if key in DECIDED_ELSEWHERE:
            raise InputError("this is not set here", f"train.args.{key}", DECIDED_ELSEWHERE[key])
    if given.pop("packing", False) and (strategy := given.pop("packing_strategy", "bfd")) != "bfd":
        raise InputError(
            f"the packing strategy {strategy!r} cuts rows, and with them detours from their corrections",
            "train.args.packing_strategy",
            "Leave it out: bfd packs whole rows.",
        )
    # The trainer would upload checkpoints and a card of its own; see `training.hub`.
    given.pop("push_to_hub", None)
    on_cpu = trains_on_cpu(recipe)
    values = {
        **DEFAULTS,
        "gradient_checkpointing": not on_cpu,
        "save_total_limit": 1,
        **given,
        "output_dir": str(directory),
        "seed": recipe.seed,
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": False,
        "use_cpu": on_cpu,
        "max_length": recipe.train.max_length,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "disable_tqdm": True,
        "completion_only_loss": False,
    }
    try:
        args = SFTConfig(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"the trainer refuses these settings ({str(error).splitlines()[0]})", "train.args") from error
    check_installed(args)
    return args


def lora_config(recipe: Recipe) -> LoraConfig:
    """The adapter's settings: the paper's, the recipe's `train.lora` above them.

    Raises:
        InputError: an unknown key or a value that LoraConfig refuses.
    """
    given = dict(recipe.train.lora)
    _refuse_unknown(given, set(inspect.signature(LoraConfig).parameters), "train.lora", "LoraConfig")
    if given.get("r", 1) < 1:
        raise InputError("the rank must be at least 1", "train.lora.r")
    try:
        return LoraConfig(**{**LORA_DEFAULTS, **given})
    except (TypeError, ValueError) as error:
        raise InputError(f"LoRA refuses these settings ({str(error).splitlines()[0]})", "train.lora") from error


def packs(recipe: Recipe) -> bool:
    """Whether several rows share a sequence (`train.args.packing`)."""
    return bool(recipe.train.args.get("packing"))


def trains_on_cpu(recipe: Recipe) -> bool:
    """Whether training runs on the CPU: because the recipe says so, or there is nothing else."""
    return recipe.model.device == "cpu" or not torch.cuda.is_available()


def _refuse_unknown(given: dict[str, Any], known: set[str], where: str, kind: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=3)
            fix = f"Did you mean {' or '.join(near)}?" if near else f"See the fields of {kind}."
            raise InputError(f"{kind} has no field of this name", f"{where}.{key}", fix)
