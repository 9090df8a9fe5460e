"""Load a model and its tokenizer; the rules for attention and special tokens of each family."""

from pathlib import Path
from typing import Any, Literal

import torch
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

from esr_train.errors import InputError
from esr_train.recipe import ModelSection

ROOT = Path(__file__).resolve().parent.parent
END_OF_TURN = ("<|eot_id|>", "<end_of_turn>")
PADDING = ("<|finetune_right_pad_id|>", "<pad>")


def local_path(path: str) -> Path | None:
    """What `path` names, from the current directory or else the repository's root; None if it is nothing."""
    candidates = (folder / Path(path).expanduser() for folder in (Path.cwd(), ROOT))
    return next((candidate for candidate in candidates if candidate.exists()), None)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token that is not the end-of-turn token.

    Raises:
        InputError: if the folder or hub id cannot be loaded, or no padding token can be found.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source(section), revision=section.revision)
    except (OSError, ValueError) as error:
        raise _not_loadable(section, error) from error
    end = end_of_turn_id(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == end:
        known = tokenizer.get_vocab()
        spare = [token for token in (*PADDING, tokenizer.eos_token) if token in known and known[token] != end]
        if not spare:
            raise InputError(
                "the tokenizer has no padding token apart from the end-of-turn token",
                f"model.path={section.path}",
                "Add a pad_token to tokenizer_config.json: padding with the end-of-turn token would mask it.",
            )
        tokenizer.pad_token = spare[0]
    return tokenizer


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends the assistant's turn; not always `eos_token` (Gemma's is `<eos>`)."""
    known = tokenizer.get_vocab()
    found = next((known[token] for token in END_OF_TURN if token in known), tokenizer.eos_token_id)
    if found is None:
        raise InputError("the tokenizer has neither an end-of-turn nor an eos token", tokenizer.name_or_path)
    return int(found)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token at which a reply ends: end of turn, eos, and those of the model's generation config."""
    return stop_ids_of(getattr(model, "generation_config", None), tokenizer)


def stop_ids_of(generation: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """As `stop_ids`, of a generation config or None."""
    configured = getattr(generation, "eos_token_id", None)
    if configured is None:
        configured = []
    listed = [configured] if isinstance(configured, int) else list(configured)
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return frozenset([end_of_turn_id(tokenizer), *eos, *listed])


def load_model(
    section: ModelSection,
    quantization: Literal["nf4"] | None = None,
    for_training: bool = False,
) -> Any:
    """Load the model.

    Args:
        section: the recipe's `model`.
        quantization: `nf4` loads the linear layers in 4 bits (bitsandbytes).
        for_training: leave the model where it was loaded (the trainer places it); otherwise it goes to the
            section's device, in evaluation mode.

    Raises:
        InputError: what cannot be loaded, or an attention implementation that would change the results.
    """
    config = load_config(section)
    _check_attention(config, section)
    device = choose_device(section)
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype)}
    if quantization == "nf4":
        options["quantization_config"] = _nf4(section)
    if quantization or (device.type != "cpu" and not for_training):
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_source(section),
            revision=section.revision,
            config=config,
            attn_implementation=section.attn_implementation,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise _not_loadable(section, error) from error
    align_generation(model, load_tokenizer(section))
    return model if for_training else model.eval()


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
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(
            f"the device {name!r} cannot be used ({reason})",
            "model.device",
            "Leave it out to take what is there.",
        ) from error


def align_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model's generation config stop at the end-of-turn token and pad with the padding token."""
    generation = model.generation_config
    if generation is not None:
        generation.eos_token_id = sorted(stop_ids(model, tokenizer))
        generation.pad_token_id = tokenizer.pad_token_id
        generation.bos_token_id = tokenizer.bos_token_id


def bare_model(model: Any) -> Any:
    """The model inside DDP, DeepSpeed and PEFT wrappers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a Llama or Gemma-2 model, whatever it is wrapped in.

    Raises:
        InputError: for a model that has none where those families keep them.
    """
    found = bare_model(model)
    for name in ("model", "language_model"):
        found = getattr(found, name, found)
    layers = getattr(found, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(
            f"{type(bare_model(model)).__name__} has no decoder layers at model.layers",
            "model.path",
            "Use a causal language model of the Llama or Gemma-2 family.",
        )
    return layers


def hidden_size(model: Any) -> int:
    """Width of the residual stream."""
    return int(bare_model(model).config.get_text_config().hidden_size)


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
            "Name an SAE that was trained on this model.",
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
            f"Relative paths are looked up in {Path.cwd()} and {ROOT}.",
        )
    return section.path


def _not_loadable(section: ModelSection, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0].rstrip(".")
    return InputError(
        f"{section.path!r} cannot be loaded ({reason})",
        "model.path",
        "Name a local folder or a hub id; for a gated model accept its licence and run `hf auth login`.",
    )


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        InputError: if it cannot be loaded.
    """
    try:
        return AutoConfig.from_pretrained(model_source(section), revision=section.revision)
    except (OSError, ValueError) as error:
        raise _not_loadable(section, error) from error


def _check_attention(config: PreTrainedConfig, section: ModelSection) -> None:
    # sdpa knows no soft-capping: some releases of transformers drop it without a word.
    if config.model_type == "gemma2" and section.attn_implementation == "sdpa":
        raise InputError(
            "sdpa leaves out Gemma-2's attention soft-capping, which makes it another model",
            "model.attn_implementation",
            "Set it to eager (or flash_attention_2 on a GPU), the same for training and evaluation.",
        )


def _nf4(section: ModelSection) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, section.dtype),
    )
