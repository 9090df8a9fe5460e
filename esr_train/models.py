"""Load a model and its tokenizer; where in a model its layers lie."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from esr_train.errors import InputError, first_line
from esr_train.recipe import ModelSection
from esr_train.template import bos_id, padding_token, stop_ids, use_template

ROOT = Path(__file__).resolve().parent.parent
MOST_OF_A_REASON = 200
"""Characters that are quoted of what a library says."""


def models_folder() -> Path:
    """Where `esr models fetch` puts models; they are found there by name."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "endogenous-steering" / "models"


def local_path(path: str) -> Path | None:
    """What `path` names, from the current directory or the repository's root, or a fetched model's name; else None."""
    candidates = (folder / Path(path).expanduser() for folder in (Path.cwd(), ROOT, models_folder()))
    return next((candidate for candidate in candidates if candidate.exists()), None)


def load_tokenizer(model: ModelSection | Path | str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, with a padding token that means nothing else.

    Args:
        model: the recipe's `model`, or a folder or hub id.

    Raises:
        InputError: if it cannot be loaded, or its chat template cannot be used (see `template.chat_template`).
    """
    tokenizer = _read_tokenizer(_section(model))
    tokenizer.pad_token = padding_token(tokenizer)
    return tokenizer


def load_model(
    model: ModelSection | Path | str,
    quantization: Literal["nf4"] | None = None,
    for_training: bool = False,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None,
    device: str | None = None,
) -> Any:
    """Load a model.

    Args:
        model: the recipe's `model`, or a folder or hub id.
        quantization: `nf4` loads the linear layers in 4 bits (bitsandbytes).
        for_training: leave the model where it was loaded (the trainer places it); otherwise it goes to the device,
            in evaluation mode.
        dtype: instead of the section's (bfloat16).
        attn_implementation: instead of the section's (eager).
        device: instead of the section's (the first accelerator, or else the CPU).

    Raises:
        InputError: what cannot be loaded, or an attention implementation that would change the results.
    """
    section = _section(model, dtype=dtype, attn_implementation=attn_implementation, device=device)
    config = load_config(section)
    _check_attention(config, section)
    options = _loading_options(section, quantization, for_training)
    with _loading(section):
        pair: Any = AutoModelForCausalLM.from_pretrained(
            model_source(section), config=config, output_loading_info=True, **options
        )
        loaded, report = pair
        _check_whole(report)
    tokenizer = _read_tokenizer(section)
    if tokenizer.chat_template:
        align_generation(loaded, tokenizer)
    return loaded if for_training else loaded.eval()


def _loading_options(section: ModelSection, quantization: Literal["nf4"] | None, for_training: bool) -> dict[str, Any]:
    dtype, device = getattr(torch, section.dtype), choose_device(section)
    options: dict[str, Any] = {"dtype": dtype, "revision": section.revision}
    options["attn_implementation"] = section.attn_implementation
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if quantization or (device.type != "cpu" and not for_training):
        options["device_map"] = {"": device}
    return options


def _section(model: ModelSection | Path | str, **instead: str | None) -> ModelSection:
    values = model.model_dump() if isinstance(model, ModelSection) else {"path": str(model)}
    try:
        return ModelSection.model_validate(values | {key: value for key, value in instead.items() if value})
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{problem['msg']} (got {problem['input']!r})", ".".join(map(str, problem["loc"]))) from error


def _read_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    with _loading(section):
        tokenizer: Any = AutoTokenizer.from_pretrained(model_source(section), revision=section.revision)
        processor = tokenizer.backend_tokenizer.post_processor if tokenizer.is_fast else None
        if processor is not None:
            # Offsets without white space do not say which token a space belongs to.
            processor.__setstate__(processor.__getstate__().replace(b'"trim_offsets":true', b'"trim_offsets":false'))
            tokenizer.backend_tokenizer.post_processor = processor
    use_template(tokenizer, template_text(section), section.template_kwargs, "model")
    return cast(PreTrainedTokenizerBase, tokenizer)


def template_text(section: ModelSection) -> str | None:
    """The text of the section's own chat template, if it names one.

    Raises:
        InputError: if its file cannot be read.
    """
    if section.chat_template is None:
        return None
    where = f"model.chat_template={section.chat_template}"
    file = local_path(section.chat_template)
    if file is None or not file.is_file():
        raise InputError("the chat template's file does not exist", where, "Check the path.")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"the chat template cannot be read ({first_line(error)})", where) from error


def choose_device(section: ModelSection) -> torch.device:
    """The section's device, or the first accelerator, or the CPU.

    Raises:
        InputError: if the section's device is not there.
    """
    name = section.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        what = f"the device {name!r} cannot be used ({first_line(error)})"
        raise InputError(what, "model.device", "Leave it out to take what is there.") from error


def align_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model's generation config begin, stop and pad as the tokenizer's chat template has it."""
    generation = model.generation_config
    if generation is not None:
        generation.eos_token_id = sorted(stop_ids(tokenizer, generation))
        generation.pad_token_id = tokenizer.convert_tokens_to_ids(padding_token(tokenizer))
        generation.bos_token_id = bos_id(tokenizer)


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Training mode but for dropout; not evaluation mode, in which bitsandbytes repacks 4-bit weights on the CPU."""
    training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        model.train(training)


def bare_model(model: Any) -> Any:
    """The model inside DDP, DeepSpeed and PEFT wrappers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model, whatever it is wrapped in; of a multimodal one the text's.

    Raises:
        InputError: for a model that has none where such models keep them.
    """
    found = bare_model(model)
    for name in ("model", "language_model"):
        found = getattr(found, name, found)
    layers = getattr(found, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(
            f"{type(bare_model(model)).__name__} has no decoder layers at model.layers",
            "model.path",
            "Use a causal language model of a family in docs/families.md.",
        )
    return layers


def hidden_size(model: Any) -> int:
    """Width of the residual stream."""
    return int(bare_model(model).config.get_text_config().hidden_size)


def context_length(model: Any) -> int | None:
    """Most tokens of prompt and reply together; None: the model's configuration does not say."""
    found = getattr(bare_model(model).config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def check_layer(model: Any, layer: int, where: str) -> None:
    """Refuse a layer that the model does not have.

    Raises:
        InputError: naming `where` and the model's number of layers.
    """
    check_layer_number(layer, len(decoder_layers(model)), where)


def check_layer_number(layer: int, count: int, where: str) -> None:
    """Refuse a layer that a model of `count` layers does not have.

    Raises:
        InputError: naming `where` and the number of layers.
    """
    if not 0 <= layer < count:
        raise InputError(
            f"there is no layer {layer}: the model has {count}, counted from 0",
            where,
            "Name a layer of this model, or an SAE that was trained on it.",
        )


def model_source(section: ModelSection) -> str:
    """The model's folder, or its hub id.

    Raises:
        InputError: a folder that does not exist.
    """
    found = local_path(section.path)
    if found:
        return str(found)
    if section.path.startswith((".", "/", "~")) or section.path.count("/") > 1:
        raise InputError(
            f"the folder {section.path!r} does not exist",
            "model.path",
            f"Relative paths are looked up in {' and '.join(dict.fromkeys((str(Path.cwd()), str(ROOT))))}.",
        )
    return section.path


@contextmanager
def _loading(section: ModelSection) -> Iterator[None]:
    """Whatever a library says about a broken folder becomes a sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if len(reason) > MOST_OF_A_REASON:  # whole sentences, if there is one
            reason = reason[:MOST_OF_A_REASON].rpartition(". ")[0] or reason[:MOST_OF_A_REASON]
        raise InputError(
            f"{section.path!r} cannot be loaded ({reason.rstrip('.')})",
            "model.path",
            "Name a local folder or a hub id; for a gated model accept its licence and run `hf auth login`.",
        ) from error


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        InputError: if it cannot be loaded.
    """
    with _loading(section):
        return AutoConfig.from_pretrained(model_source(section), revision=section.revision)


def _check_attention(config: PreTrainedConfig, section: ModelSection) -> None:
    # sdpa knows no soft-capping: some releases of transformers drop it without a word.
    if config.model_type == "gemma2" and section.attn_implementation == "sdpa":
        raise InputError(
            "sdpa leaves out Gemma-2's attention soft-capping, which makes it another model",
            "model.attn_implementation",
            "Set it to eager (or flash_attention_2 on a GPU), the same for training and evaluation.",
        )


def _check_whole(report: Mapping[str, Any]) -> None:
    # transformers fills in missing weights at random and drops surplus layers, with a line in the log.
    surplus = [name for name in report["unexpected_keys"] if re.fullmatch(r"model\.(.*\.)?layers\..*\.weight", name)]
    if wrong := sorted(report["missing_keys"]) + sorted(surplus):
        which = "has no" if report["missing_keys"] else "has a surplus"
        raise ValueError(f"the checkpoint {which} {wrong[0]}, so it does not belong to its config.json")
