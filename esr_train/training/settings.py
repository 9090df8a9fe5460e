"""A recipe's `train` section as TRL's and PEFT's settings: our defaults, and which fields do what they say here."""

import difflib
import functools
import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from pydantic import Field, StrictBool, ValidationError
from transformers import AutoModelForCausalLM, Trainer, get_scheduler
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.training_args import OptimizerNames
from trl import DPOConfig, GRPOConfig, SFTConfig

from esr_train.errors import InputError, first_line, refuse
from esr_train.models import decoder_layers, load_config
from esr_train.recipe import AtLeastOne, Count, Fraction, NotNegative, Positive, Recipe, Section, TrainSection
from esr_train.training.rollouts import reward_weights

Logger = Literal["none", "wandb", "trackio", "tensorboard"]
LOGGERS = {"wandb": ("wandb",), "trackio": ("trackio",), "tensorboard": ("tensorboard", "tensorboardX")}
"""What each logger needs one of."""

ROWS_AT_ONCE = 32
"""Replies that a training writes at once, where the recipe gives no number: it fills the memory they could have."""

Texts = str | list[str]
Cadence = Literal["no", "steps", "epoch"]


class CommonArguments(Section):
    """The fields of transformers.TrainingArguments that do here what they say; defaults are the paper's for SFT."""

    learning_rate: Positive = 2e-4
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: NotNegative = 10
    optim: str | None = None
    optim_args: str | None = None
    weight_decay: NotNegative = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: NotNegative = 1e-8
    max_grad_norm: NotNegative = 1.0
    num_train_epochs: Positive = 3.0
    max_steps: AtLeastOne | None = None
    per_device_train_batch_size: AtLeastOne = 2
    gradient_accumulation_steps: AtLeastOne = 4
    gradient_checkpointing: bool | None = Field(None, description="None: on an accelerator")
    gradient_checkpointing_kwargs: dict[Literal["use_reentrant"], bool] | None = None
    tf32: bool | None = None
    full_determinism: bool = False
    torch_empty_cache_steps: AtLeastOne | None = None
    train_sampling_strategy: Literal["group_by_length", "random", "sequential"] = "group_by_length"
    dataloader_num_workers: Count = 0
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: AtLeastOne | None = None
    dataloader_drop_last: bool = False
    eval_strategy: Cadence = "no"
    eval_steps: Positive | None = None
    eval_delay: NotNegative = 0.0
    eval_on_start: bool = False
    per_device_eval_batch_size: AtLeastOne = 8
    load_best_model_at_end: bool = False
    metric_for_best_model: Literal["loss", "eval_loss"] | None = None
    save_strategy: Cadence = "epoch"
    save_steps: Positive = 500
    save_total_limit: AtLeastOne = 1
    logging_strategy: Cadence = "steps"
    logging_steps: Positive = 10
    logging_first_step: bool = False
    report_to: Logger | list[Logger] = "none"
    run_name: str | None = None
    project: str | None = None
    trackio_space_id: str | None = None
    push_to_hub: StrictBool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    ddp_backend: str | None = None
    ddp_timeout: AtLeastOne | None = None

    def optimiser_steps(self, examples: float) -> int:
        """How many optimiser steps one process takes over so many rows, packed sequences or replies."""
        at_once = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.max_steps or math.ceil(self.num_train_epochs * math.ceil(examples / at_once))


class TrainerArguments(CommonArguments):
    """Those of trl.SFTConfig."""

    neftune_noise_alpha: Positive | None = None
    loss_type: Literal["nll", "dft"] = "nll"
    packing: StrictBool = False
    packing_strategy: str = "bfd"


class PreferenceArguments(CommonArguments):
    """Those of trl.DPOConfig."""

    learning_rate: Positive = 1e-5
    num_train_epochs: Positive = 1.0
    beta: Positive = 0.1
    loss_type: Texts = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class RolloutArguments(CommonArguments):
    """Those of trl.GRPOConfig; batches count replies."""

    learning_rate: Positive = 1e-5
    num_train_epochs: Positive = 1.0
    train_sampling_strategy: Literal["random", "sequential"] = "random"
    eval_strategy: Literal["no"] = "no"
    num_generations: Annotated[int, Field(ge=2)] = 8
    max_completion_length: AtLeastOne | None = Field(None, description="None: sampling.max_new_tokens")
    temperature: Positive = 1.0
    beta: NotNegative = 0.04
    num_iterations: AtLeastOne = 1
    epsilon: Positive = 0.2
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"


class LoraArguments(Section):
    """The fields of peft.LoraConfig that do here what they say, with the paper's adapter as defaults."""

    r: AtLeastOne = 32
    lora_alpha: Positive = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Texts = "all-linear"
    exclude_modules: Texts | None = None
    layers_to_transform: list[Count] | Count | None = None
    layers_pattern: Texts | None = None
    rank_pattern: dict[str, AtLeastOne] | None = None
    alpha_pattern: dict[str, Positive] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal[True, "gaussian"] = True


REASONS = {
    **dict.fromkeys(("bf16", "fp16"), "Set model.dtype; half precision overflows in these models."),
    **dict.fromkeys(("seed", "data_seed"), "Set the recipe's seed."),
    **dict.fromkeys(
        ("deepspeed", "fsdp"), "Launch with `accelerate launch --config_file recipes/accelerate/zero2.yaml`."
    ),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss", "label_smoothing_factor"), "Set train.loss."),
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), "The finished adapter alone is uploaded."),
    **dict.fromkeys(("padding_free", "pad_to_multiple_of"), "Set train.args.packing, which pads next to nothing."),
    **dict.fromkeys(("save_only_model", "ignore_data_skip"), "Training could not go on as if it had not stopped."),
    "precompute_ref_log_probs": "The reference is steered as the policy is, at strengths drawn anew in every epoch.",
    "disable_dropout": "There is no dropout: the reference has none, and replies are drawn without.",
    **dict.fromkeys(("top_p", "top_k", "min_p"), "Replies are drawn from the whole distribution, which is learned."),
    "reward_weights": "Set train.reward.",
    "use_vllm": "Replies come from the model in training, as it is steered there.",
    "output_dir": "The run directory decides where files go.",
    "use_cpu": "Set model.device to cpu.",
    "max_length": "Set train.max_length.",
    "truncation_mode": "Rows are never truncated; raise train.max_length.",
    "eval_packing": "Held-out rows are not packed.",
    "resume_from_checkpoint": "Training continues from the last checkpoint by itself.",
    "chat_template_path": "Set model.chat_template.",
    "dataset_text_field": "Rows come from transcripts; see train.data.",
    "eos_token": "The chat template's end-of-turn token is trained.",
    "use_liger_kernel": "Its layers are not those that are steered and measured.",
    "torch_compile": "Compiled layers may run without the hook that steers them.",
    "auto_find_batch_size": "A changed batch size is another experiment; set per_device_train_batch_size.",
    "hub_token": "A recipe is published with its adapter. Use `hf auth login` or the variable HF_TOKEN.",
    "metric_for_best_model": "The held-out loss is what is measured.",
    "init_lora_weights": "Others change the base model's weights, need data, or steer before anything is trained.",
    "trainable_token_indices": "Tokens of their own are neither merged nor served; LoRA layers alone are trained.",
    "modules_to_save": "Layers trained whole are not served; LoRA layers alone are trained.",
    "bias": "These models have no biases.",
}
"""Why a field of either library is not set in a recipe, or what it may be."""


TrainerConfig = SFTConfig | DPOConfig | GRPOConfig
SCHEMAS: dict[str, tuple[type[CommonArguments], type[TrainerConfig]]] = {
    "sft": (TrainerArguments, SFTConfig),
    "dpo": (PreferenceArguments, DPOConfig),
    "grpo": (RolloutArguments, GRPOConfig),
}
"""What `train.args` may hold by `train.method`, and what of TRL's it becomes."""


def trainer_config(recipe: Recipe, directory: Path) -> TrainerConfig:
    """The trainer's settings: our defaults, the recipe's `train.args` above them.

    Args:
        recipe: as the arm sees it.
        directory: where checkpoints go.

    Raises:
        InputError: a key that does not exist (near matches are named) or does not do here what it says, a value that
            the trainer, its optimiser or its schedule refuses, packing that cuts rows, or a logger that is not there.
    """
    given = _values(recipe)
    # The trainer would upload checkpoints and a card of its own; see `training.saving`.
    del given["push_to_hub"]
    on_cpu = trains_on_cpu(recipe)
    values = {
        "gradient_checkpointing": not on_cpu,
        **given,
        "output_dir": str(directory),
        "seed": recipe.seed,
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": False,
        "use_cpu": on_cpu,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    try:
        args = SCHEMAS[recipe.train.method][1](**values)
        _try_optimiser(args)
    # Each library refuses a value in its own way.
    except Exception as error:
        raise InputError(f"the trainer refuses these settings ({first_line(error)})", "train.args") from error
    return args


def _values(recipe: Recipe) -> dict[str, Any]:
    """What the trainer gets of `train.args`; all mistakes in names, values, optimiser and loggers are told at once."""
    raw, given, mistakes = recipe.train.args, {}, []
    try:
        given = {"sft": _sft_values, "dpo": _preference_values, "grpo": _rollout_values}[recipe.train.method](recipe)
    except InputError as error:
        mistakes.append(error)
    for check in (_check_optimiser, _check_loggers):
        try:
            check(raw)
        except InputError as error:
            mistakes.append(error)
    refuse(mistakes)
    return given


def _check_optimiser(raw: Mapping[str, Any]) -> None:
    known, name = [str(each.value) for each in OptimizerNames], raw.get("optim")
    if isinstance(name, str) and name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        fix = f"Did you mean {' or '.join(near)}?" if near else f"It knows {', '.join(known)}."
        raise InputError(f"the trainer has no optimiser {name!r}", "train.args.optim", fix)


def _sft_values(recipe: Recipe) -> dict[str, Any]:
    given = _checked(recipe.train.args, TrainerArguments, SFTConfig, "train.args")
    if given.pop("packing") and given["packing_strategy"] != "bfd":
        what = f"the packing strategy {given['packing_strategy']!r} cuts rows, and with them detours from corrections"
        raise InputError(what, "train.args.packing_strategy", "Leave it out: bfd packs whole rows.")
    del given["packing_strategy"]
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "completion_only_loss": False}
    return {**given, **own, "max_length": recipe.train.max_length}


def _preference_values(recipe: Recipe) -> dict[str, Any]:
    given = _checked(recipe.train.args, PreferenceArguments, DPOConfig, "train.args")
    losses = given["loss_type"]
    losses = [losses] if isinstance(losses, str) else losses
    return {**given, "loss_type": losses, "max_length": recipe.train.max_length}


def _rollout_values(recipe: Recipe) -> dict[str, Any]:
    given = _checked(recipe.train.args, RolloutArguments, GRPOConfig, "train.args")
    own = {
        "max_completion_length": recipe.sampling.max_new_tokens,
        "shuffle_dataset": given.pop("train_sampling_strategy") == "random",
        "reward_weights": reward_weights(recipe.train.reward),
        "disable_dropout": True,
    }
    return {**own, **given}


def _check_loggers(raw: Mapping[str, Any]) -> None:
    asked = raw.get("report_to") or []
    asked = asked if isinstance(asked, list) else [asked]
    for name, packages in LOGGERS.items():
        if name in asked and not any(find_spec(package) for package in packages):
            fix = f"`pip install {name}`, or take another."
            raise InputError(f"{name} is not installed", "train.args.report_to", fix)
    if "wandb" in asked and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            fix = "Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline."
            raise InputError("wandb has no login", "train.args.report_to", fix)


def _try_optimiser(args: TrainerConfig) -> None:
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
    values = _checked(recipe.train.lora, LoraArguments, LoraConfig, "train.lora")
    try:
        return LoraConfig(**values, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        raise InputError(f"LoRA refuses these settings ({first_line(error)})", "train.lora") from error


def decoder_only(lora: LoraConfig, model: Any) -> LoraConfig:
    """The settings with `all-linear` meaning the decoder's layers: what else a multimodal model has is left out.

    Args:
        lora: from `lora_config`; what it excludes stays excluded.
    """
    if lora.target_modules != "all-linear" or model.config.get_text_config() is model.config:
        return lora
    layers = decoder_layers(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    excluded = lora.exclude_modules or []
    named = [excluded] if isinstance(excluded, str) else [rf"(?:.*\.)?{re.escape(part)}" for part in sorted(excluded)]
    lora.exclude_modules = "|".join([rf"(?!{re.escape(name)}\.).*", *(f"(?:{part})" for part in named)])
    return lora


def check_settings(recipe: Recipe, directory: Path) -> TrainerConfig:
    """As `trainer_config`, and refuse whatever else of the training can be refused before a model is loaded.

    Raises:
        InputError: all that is wrong with either part; LoRA settings that name what the model does not have (PEFT
            ignores all but some), quantisation where it cannot work, or a launch with DeepSpeed that is not active.
    """
    mistakes = []
    try:
        lora = lora_config(recipe)
        # The trainer's settings make ZeRO-3 shard every model that is made in this process from then on.
        if not is_deepspeed_zero3_enabled():
            _check_lora(recipe, lora)
    except InputError as error:
        mistakes.append(error)
    try:
        args = trainer_config(recipe, directory)
    except InputError as error:
        mistakes.append(error)
    refuse(mistakes)
    plugin = args.deepspeed_plugin
    if plugin is None and wants_deepspeed():
        what = "accelerate was told to use DeepSpeed, yet it is not active"
        raise InputError(what, None, "Unset ACCELERATE_USE_CPU.")
    evaluates = args.eval_strategy != "no" or recipe.train.probe or recipe.train.method == "grpo"
    if recipe.train.quantization and args.use_cpu and evaluates:
        raise InputError(
            "on the CPU, bitsandbytes repacks 4-bit weights when they are evaluated, and training would go on wrong",
            "train.quantization",
            "Leave out train.args.eval_strategy, train.probe and method grpo, or use an accelerator.",
        )
    if plugin is not None and plugin.zero_stage == 3:
        _check_sharding(recipe)
    return args


def _check_sharding(recipe: Recipe) -> None:
    fix = "Launch with recipes/accelerate/zero2.yaml or ddp.yaml."
    if recipe.train.quantization:
        raise InputError("NF4 weights cannot be sharded by ZeRO-3", "train.quantization", fix)
    if recipe.train.method == "grpo":
        what = "processes write replies of different lengths, for which ZeRO-3 cannot gather the weights it shards"
        raise InputError(what, "train.method=grpo", fix)


def trainer_arguments(recipe: Recipe) -> CommonArguments:
    """The recipe's `train.args` over our defaults, by its method.

    Raises:
        InputError: keys that do not exist and values that no field takes.
    """
    schema, kind = SCHEMAS[recipe.train.method]
    return schema(**_checked(recipe.train.args, schema, kind, "train.args"))


def adapter_parameters(recipe: Recipe) -> tuple[int, int]:
    """How many parameters the recipe's model has, and how many more its adapter; nothing is loaded.

    Raises:
        InputError: if the model's configuration cannot be read, or LoRA refuses its settings.
    """
    return _count_parameters(recipe.model.model_dump_json(), json.dumps(recipe.train.lora, sort_keys=True))


@functools.cache
def _count_parameters(section: str, lora: str) -> tuple[int, int]:
    recipe = Recipe(name="counted", model=json.loads(section), train=TrainSection(lora=json.loads(lora)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(recipe.model))
    before: int = sum(parameter.numel() for parameter in model.parameters())
    tuned = get_peft_model(model, decoder_only(lora_config(recipe), model))
    return before, sum(parameter.numel() for parameter in tuned.parameters()) - before


def _check_lora(recipe: Recipe, lora: LoraConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(recipe.model))
    names, layers = [name for name, _ in model.named_modules()], len(decoder_layers(model))
    for key in ("target_modules", "exclude_modules"):
        listed = getattr(lora, key)
        for part in listed if isinstance(listed, set | list) else []:
            if part == "lm_head" or not any(name == part or name.endswith(f".{part}") for name in names):
                what = f"the model has no module {part!r} that can be trained"
                raise InputError(what, f"train.lora.{key}", "Such as q_proj.")
    numbers = lora.layers_to_transform if lora.layers_to_transform is not None else []
    for number in [numbers] if isinstance(numbers, int) else numbers:
        if number >= layers:
            raise InputError(f"the model has no layer {number}", "train.lora.layers_to_transform", f"It has {layers}.")
    try:
        tuned = get_peft_model(model, decoder_only(lora, model))
    except (TypeError, ValueError) as error:
        raise InputError(f"LoRA refuses these settings ({first_line(error)})", "train.lora") from error
    changed = [name.partition(".lora_A")[0] for name, _ in tuned.named_parameters() if ".lora_A" in name]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in changed):
                raise InputError(f"no LoRA layer is called {pattern!r}", f"train.lora.{key}")


def wants_deepspeed() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def packs(recipe: Recipe) -> bool:
    """Whether several rows share a sequence (`train.args.packing`)."""
    return bool(recipe.train.args.get("packing"))


def is_flash(recipe: Recipe) -> bool:
    """Whether attention wants all rows of a batch in one sequence."""
    return recipe.model.attn_implementation == "flash_attention_2"


def trains_on_cpu(recipe: Recipe) -> bool:
    """Whether training runs on the CPU: because the recipe says so, or there is nothing else."""
    return recipe.model.device == "cpu" or not torch.cuda.is_available()


def _checked(given: dict[str, Any], schema: type[Section], kind: type, where: str) -> dict[str, Any]:
    """What is given and our defaults; fields that are left to the library are not in it."""
    known = sorted(inspect.signature(kind).parameters)
    wrong = [key for key in given if key not in schema.model_fields]
    mistakes = [_misnamed(key, known, kind, where) for key in wrong]
    usable: dict[str, Any] = {}
    try:
        named = {key: value for key, value in given.items() if key not in wrong}
        usable = schema.model_validate(named).model_dump(exclude_none=True)
    except ValidationError as error:
        # A value that fits none of several types is one mistake, not one for each type.
        first = {str(item["loc"][0]): item for item in reversed(error.errors())}
        for key, item in reversed(first.items()):
            what = f"{item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"
            mistakes.append(InputError(what, f"{where}.{key}", REASONS.get(key)))
    refuse(mistakes)
    return usable


def _misnamed(key: str, known: list[str], kind: type, where: str) -> InputError:
    if key in known:
        fix = REASONS.get(key, "It is not known to do here what it says: leave it out.")
        return InputError("this is not set here", f"{where}.{key}", fix)
    near = difflib.get_close_matches(key, known, n=3)
    fix = f"Did you mean {' or '.join(near)}?" if near else f"See the fields of {kind.__name__}."
    return InputError(f"{kind.__name__} has no field of this name", f"{where}.{key}", fix)
