"""What a transcript, a steering and a model are, and how to train on them.

The names below are what notebooks and scripts need; each is imported when it is first used, so that
`import esr_train` loads no heavy library.

    from esr_train import load_model, load_sae, load_tokenizer, steer

    name = "meta-llama/Llama-3.1-8B-Instruct"
    model, tokenizer = load_model(name), load_tokenizer(name)
    sae = load_sae("goodfire-llama-3.1-8b-instruct", "layer_19", model=model, tokenizer=tokenizer)
    with steer(model, sae.direction(1234).add(0.9)) as steered:
        output = model.generate(**tokenizer("How do I fold a fitted sheet?", return_tensors="pt").to(model.device))
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from esr_train.errors import InputError, RunError
    from esr_train.masking import label
    from esr_train.recipe import load_recipe
    from esr_train.steering.direction_files import load_sae, load_vectors
    from esr_train.steering.engine import Sampling
    from esr_train.steering.interventions import Ablate, Clamp
    from esr_train.steering.latent_labels import read_labels
    from esr_train.steering.readout import measure_residual_norm
    from esr_train.steering.steer import generate, steer
    from esr_train.transcript import read_transcripts, write_transcripts

_MODULES = {
    "Ablate": "steering.interventions",
    "Clamp": "steering.interventions",
    "InputError": "errors",
    "RunError": "errors",
    "Sampling": "steering.engine",
    "generate": "steering.steer",
    "label": "masking",
    "load_recipe": "recipe",
    "load_sae": "steering.direction_files",
    "load_vectors": "steering.direction_files",
    "measure_residual_norm": "steering.readout",
    "read_labels": "steering.latent_labels",
    "read_transcripts": "transcript",
    "steer": "steering.steer",
    "write_transcripts": "transcript",
}

__all__ = [
    "Ablate",
    "Clamp",
    "InputError",
    "RunError",
    "Sampling",
    "generate",
    "label",
    "load_model",
    "load_recipe",
    "load_sae",
    "load_tokenizer",
    "load_vectors",
    "measure_residual_norm",
    "read_labels",
    "read_transcripts",
    "steer",
    "write_transcripts",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'esr_train' has no attribute {name!r}")
    return getattr(import_module(f"esr_train.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str | None = None,
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "eager",
    adapter: Path | str | None = None,
) -> Any:
    """Load a model of the Llama or Gemma-2 family to generate with, in evaluation mode.

    Args:
        path: a local folder or a hub id.
        revision: of the hub's repository.
        dtype: of its weights.
        device: such as cuda:0 or cpu; None takes the first accelerator.
        attn_implementation: the same for everything that is compared.
        adapter: folder of a PEFT adapter of this model.

    Returns:
        a transformers `PreTrainedModel`, or a `PeftModel` where an adapter is given.

    Raises:
        InputError: what cannot be loaded, or an attention implementation that would change the results.
    """
    from esr_train import models
    from esr_train.adapters import load_adapter
    from esr_train.recipe import ModelSection

    section = ModelSection(
        path=path, revision=revision, dtype=dtype, device=device, attn_implementation=attn_implementation
    )
    model = models.load_model(section)
    return model if adapter is None else load_adapter(model, Path(adapter))


def load_tokenizer(path: str, *, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer, with a padding token that is not the end-of-turn token, padding on the left.

    Args:
        path: a local folder or a hub id.
        revision: of the hub's repository.

    Raises:
        InputError: what cannot be loaded, or has no such padding token.
    """
    from esr_train import models
    from esr_train.recipe import ModelSection

    tokenizer = models.load_tokenizer(ModelSection(path=path, revision=revision))
    # What `generate` needs of a batch; training pads by itself.
    tokenizer.padding_side = "left"
    return tokenizer
