"""A recipe's `train` section as SFTConfig and LoraConfig: our defaults, and which fields do what they say here."""

import difflib
import inspect
import math
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, get_scheduler
from trl import SFTConfig

from esr_train.errors import InputError, first_line
from esr_train.models import decoder_layers, load_config
from esr_train.recipe import Recipe

LORA_DEFAULTS: dict[str, Any] = {
    "r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
}
"""The paper's adapter."""

LORA_FIELDS = frozenset(
    re.findall(
        r"\w+",
        """r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern
        alpha_pattern use_rslora use_dora init_lora_weights""",
    )
)
"""What may be set of LoraConfig; every one is tested to do what it says."""

DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
}
"""The paper's optimisation, with rows of like length batched together."""

FIELDS = frozenset(
    re.findall(
        r"\w+",
        """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
        adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps per_device_train_batch_size
        gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs neftune_noise_alpha loss_type
        tf32 full_determinism torch_empty_cache_steps

        packing packing_strategy train_sampling_strategy dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_drop_last

        eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size load_best_model_at_end
        metric_for_best_model save_strategy save_steps save_total_limit logging_strategy logging_steps
        logging_first_step report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
        push_to_hub hub_model_id hub_private_repo

        ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers""",
    )
)
"""What may be set of SFTConfig; the others are refused, with a reason where there is one."""

REASONS = {
    "output_dir": "The run directory decides where files go.",
    "bf16": "Set model.dtype.",
    "fp16": "Half precision overflows in these models; set model.dtype to bfloat16 or float32.",
    "bf16_full_eval": "Held-out rows are evaluated in model.dtype.",
    "use_cpu": "Set model.device to cpu.",
    "max_length": "Set train.max_length.",
    "seed": "Set the recipe's seed.",
    "data_seed": "Set the recipe's seed.",
    "deepspeed": "Launch with `accelerate launch --config_file recipes/accelerate/zero2.yaml`.",
    "fsdp": "Launch with DeepSpeed: `accelerate launch --config_file recipes/accelerate/zero3.yaml`.",
    "resume_from_checkpoint": "Training continues from the last checkpoint by itself.",
    "save_only_model": "Training could not go on from such a checkpoint.",
    "ignore_data_skip": "A training that goes on would see other rows.",
    "chat_template_path": "The tokenizer's own template is trained; put another into the model's folder.",
    "dataset_text_field": "Rows come from transcripts; see train.data.",
    "dataset_kwargs": "The trainer prepares the rows.",
    "remove_unused_columns": "The trainer chooses the columns.",
    "completion_only_loss": "Set train.loss.",
    "assistant_only_loss": "Set train.loss.",
    "label_smoothing_factor": "The loss is that of train.loss.",
    "pad_to_multiple_of": "Rows are padded to the longest of their batch. Set train.args.packing to pad less.",
    "padding_free": "Set train.args.packing, which pads next to nothing.",
    "eval_packing": "Held-out rows are not packed.",
    "truncation_mode": "Rows are never truncated; raise train.max_length.",
    "eos_token": "The chat template's end-of-turn token is trained.",
    "pad_token": "The tokenizer's padding token is used.",
    "use_liger_kernel": "Its layers are not those that are steered and measured.",
    "torch_compile": "Compiled layers may run without the hook that steers them.",
    "model_init_kwargs": "Set the recipe's model section.",
    "greater_is_better": "The best checkpoint is that of the lowest held-out loss.",
    "auto_find_batch_size": "A changed batch size is another experiment; set per_device_train_batch_size.",
    "hub_token": "A recipe is published with its adapter. Use `hf auth login` or the variable HF_TOKEN.",
    "hub_strategy": "The finished adapter alone is uploaded.",
    "hub_always_push": "The finished adapter alone is uploaded.",
    "hub_revision": "The finished adapter goes to the main branch.",
    "trainable_token_indices": "Tokens of their own are neither merged nor served; LoRA layers alone are trained.",
    "modules_to_save": "Layers trained whole are not served; LoRA layers alone are trained.",
    "bias": "These models have no biases.",
    "task_type": "It is CAUSAL_LM.",
}

LOGGERS = {"wandb": ("wandb",), "trackio": ("trackio",), "tensorboard": ("tensorboard", "tensorboardX")}
"""What each logger needs one of."""

_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps")


def sft_config(recipe: Recipe, directory: Path) -> SFTConfig:
    """The trainer's settings: our defaults, the recipe's `train.args` above them.

    Args:
        recipe: as the arm sees it.
        directory: where checkpoints go.

    Raises:
        InputError: a key that does not exist (near matches are named) or does not do here what it says, a value that
            the trainer, its optimiser or its schedule refuses, packing that cuts rows, or a logger that is not there.
    """
    given = dict(recipe.train.args)
    _refuse_fields(given, FIELDS, SFTConfig, "train.args")
    if given.pop("packing", False) and (strategy := given.pop("packing_strategy", "bfd")) != "bfd":
        raise InputError(
            f"the packing strategy {strategy!r} cuts rows, and with them detours from their corrections",
            "train.args.packing_strategy",
            "Leave it out: bfd packs whole rows.",
        )
    _check_values(given)
    # The trainer would upload checkpoints and a card of its own; see `training.saving`.
    given.pop("push_to_hub", None)
    on_cpu = trains_on_cpu(recipe)
    values = {
        **DEFAULTS,
        "gradient_checkpointing": not on_cpu,
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
        _try_optimiser(args)
    # Each library refuses a value in its own way.
    except Exception as error:
        raise InputError(f"the trainer refuses these settings ({first_line(error)})", "train.args") from error
    for name, packages in LOGGERS.items():
        if name in (args.report_to or []) and not any(find_spec(package) for package in packages):
            fix = f"`pip install {name}`, or take another."
            raise InputError(f"{name} is not installed", "train.args.report_to", fix)
    return args


def _check_values(given: dict[str, Any]) -> None:
    for key in _COUNTS:
        if key in given and not (isinstance(given[key], int) and given[key] >= 1):
            raise InputError("this must be a whole number from 1 on", f"train.args.{key}")
    if given.get("metric_for_best_model", "eval_loss") not in ("loss", "eval_loss"):
        fix = "Leave it out: the held-out loss is what is measured."
        raise InputError("there is no such metric", "train.args.metric_for_best_model", fix)
    if given.get("loss_type", "nll") not in ("nll", "dft"):
        raise InputError("there is no such loss", "train.args.loss_type", "It is nll or dft.")


def _try_optimiser(args: SFTConfig) -> None:
    """Make an optimiser and a schedule as the trainer will, so that what they refuse is refused now."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    schedule: Any = args.lr_scheduler_kwargs or {}
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    get_scheduler(
        args.lr_scheduler_type,
        optimizer=kind([weight], **{**options, "lr": args.learning_rate}),
        num_warmup_steps=args.get_warmup_steps(100),
        num_training_steps=100,
        scheduler_specific_kwargs=schedule,
    )


def lora_config(recipe: Recipe) -> LoraConfig:
    """The adapter's settings: the paper's, the recipe's `train.lora` above them.

    Raises:
        InputError: a key that does not exist or does not do here what it says, or a value that LoRA refuses.
    """
    given = dict(recipe.train.lora)
    _refuse_fields(given, LORA_FIELDS, LoraConfig, "train.lora")
    values = {**LORA_DEFAULTS, **given}
    start = values.get("init_lora_weights", True)
    if start not in (True, "gaussian"):
        what = f"{start!r} changes the base model's weights, needs data, or steers before anything is trained"
        raise InputError(what, "train.lora.init_lora_weights", "Take true or gaussian.")
    for key, lowest, below in (("r", 1, math.inf), ("lora_alpha", 1e-6, math.inf), ("lora_dropout", 0, 1)):
        value = values[key]
        whole = isinstance(value, int) or key != "r"
        if isinstance(value, bool) or not isinstance(value, int | float) or not (whole and lowest <= value < below):
            raise InputError(f"{value!r} is out of range", f"train.lora.{key}", f"It begins at {lowest:g}.")
    try:
        return LoraConfig(**values, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        raise InputError(f"LoRA refuses these settings ({first_line(error)})", "train.lora") from error


def check_lora(recipe: Recipe, lora: LoraConfig) -> None:
    """Refuse LoRA settings that name what the model does not have; of these PEFT ignores all but some.

    Raises:
        InputError: naming the module, pattern or layer.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(recipe.model))
    names, layers = [name for name, _ in model.named_modules()], len(decoder_layers(model))
    for key in ("target_modules", "exclude_modules"):
        listed = getattr(lora, key)
        for part in listed if isinstance(listed, set | list) else []:
            if not any(name == part or name.endswith(f".{part}") for name in names):
                raise InputError(f"the model has no module {part!r}", f"train.lora.{key}", "Such as q_proj.")
    numbers = lora.layers_to_transform if lora.layers_to_transform is not None else []
    for number in [numbers] if isinstance(numbers, int) else numbers:
        if not 0 <= number < layers:
            raise InputError(f"the model has no layer {number}", "train.lora.layers_to_transform", f"It has {layers}.")
    try:
        tuned = get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise InputError(f"LoRA refuses these settings ({first_line(error)})", "train.lora") from error
    changed = [name.partition(".lora_A")[0] for name, _ in tuned.named_parameters() if ".lora_A" in name]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in changed):
                raise InputError(f"no LoRA layer is called {pattern!r}", f"train.lora.{key}")


def check_launch(recipe: Recipe, args: SFTConfig) -> None:
    """Refuse what does not go together: quantisation, where training runs, and how it was launched.

    Raises:
        InputError: naming the key.
    """
    plugin = args.deepspeed_plugin
    if plugin is None and wants_deepspeed():
        raise InputError(
            "accelerate was told to use DeepSpeed, yet it is not active", None, "Unset ACCELERATE_USE_CPU."
        )
    if recipe.train.quantization and args.use_cpu and (args.eval_strategy != "no" or recipe.train.probe):
        raise InputError(
            "on the CPU, bitsandbytes repacks 4-bit weights when they are evaluated, and training would go on wrong",
            "train.quantization",
            "Leave out train.args.eval_strategy and train.probe, or use an accelerator.",
        )
    if recipe.train.quantization and plugin is not None and plugin.zero_stage == 3:
        raise InputError(
            "NF4 weights cannot be sharded by ZeRO-3",
            "train.quantization",
            "Launch with recipes/accelerate/zero2.yaml or ddp.yaml.",
        )


def wants_deepspeed() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def packs(recipe: Recipe) -> bool:
    """Whether several rows share a sequence (`train.args.packing`)."""
    return bool(recipe.train.args.get("packing"))


def trains_on_cpu(recipe: Recipe) -> bool:
    """Whether training runs on the CPU: because the recipe says so, or there is nothing else."""
    return recipe.model.device == "cpu" or not torch.cuda.is_available()


def _refuse_fields(given: dict[str, Any], allowed: frozenset[str], kind: type, where: str) -> None:
    known = sorted(inspect.signature(kind).parameters)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            fix = f"Did you mean {' or '.join(near)}?" if near else f"See the fields of {kind.__name__}."
            raise InputError(f"{kind.__name__} has no field of this name", f"{where}.{key}", fix)
        if key not in allowed:
            what = "this is not set here" if key in REASONS else "this field is not known to do here what it says"
            raise InputError(what, f"{where}.{key}", REASONS.get(key, "Leave it out."))
