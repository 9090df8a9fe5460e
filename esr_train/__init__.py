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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esr_train.adapters import load_adapter
    from esr_train.errors import InputError, RunError
    from esr_train.masking import label
    from esr_train.models import load_model, load_tokenizer
    from esr_train.recipe import load_recipe
    from esr_train.steering.direction_files import load_sae
    from esr_train.steering.engine import Sampling
    from esr_train.steering.interventions import Ablate, Clamp
    from esr_train.steering.latent_labels import read_labels
    from esr_train.steering.monitor import Monitor, load_monitor, save_monitor, watching
    from esr_train.steering.readout import measure_residual_norm
    from esr_train.steering.steer import generate, steer
    from esr_train.steering.vector_files import load_vectors, save_vectors
    from esr_train.steering.vector_making import difference_of_means, make_vectors
    from esr_train.transcript import Span, SpanKind, Transcript, read_transcripts, write_transcripts

_NAMES = {
    "adapters": ("load_adapter",),
    "errors": ("InputError", "RunError"),
    "masking": ("label",),
    "models": ("load_model", "load_tokenizer"),
    "recipe": ("load_recipe",),
    "steering.direction_files": ("load_sae",),
    "steering.engine": ("Sampling",),
    "steering.interventions": ("Ablate", "Clamp"),
    "steering.latent_labels": ("read_labels",),
    "steering.monitor": ("Monitor", "load_monitor", "save_monitor", "watching"),
    "steering.readout": ("measure_residual_norm",),
    "steering.steer": ("generate", "steer"),
    "steering.vector_files": ("load_vectors", "save_vectors"),
    "steering.vector_making": ("difference_of_means", "make_vectors"),
    "transcript": ("Span", "SpanKind", "Transcript", "read_transcripts", "write_transcripts"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Ablate",
    "Clamp",
    "InputError",
    "Monitor",
    "RunError",
    "Sampling",
    "Span",
    "SpanKind",
    "Transcript",
    "difference_of_means",
    "generate",
    "label",
    "load_adapter",
    "load_model",
    "load_monitor",
    "load_recipe",
    "load_sae",
    "load_tokenizer",
    "load_vectors",
    "make_vectors",
    "measure_residual_norm",
    "read_labels",
    "read_transcripts",
    "save_monitor",
    "save_vectors",
    "steer",
    "watching",
    "write_transcripts",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'esr_train' has no attribute {name!r}")
    return getattr(import_module(f"esr_train.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
