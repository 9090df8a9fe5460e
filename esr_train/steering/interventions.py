"""What may be done to the residual stream of one batch row: add a vector, or set latents of an SAE."""

from dataclasses import dataclass

from esr_train.errors import InputError
from esr_train.models import check_layer_number
from esr_train.steering.directions import Add, LoadedSae, Positions


@dataclass(frozen=True, eq=False)
class Clamp:
    """Set one latent's activation to `value`: h += (value - a_k(h)) * W_dec[k], a_k from the SAE's encoder.

    Equal to decode(encode(h) with a_k := value) + (h - decode(encode(h))): the reconstruction error is kept.

    Raises:
        InputError: if the SAE has no such latent, or its latents cannot be set.
    """

    sae: LoadedSae
    latent: int
    value: float
    positions: Positions = "all"

    def __post_init__(self) -> None:
        self.sae.check_use("clamped", (self.latent,))


@dataclass(frozen=True, eq=False)
class Ablate:
    """Zero some latents: h -= sum_k a_k(h) * W_dec[k]; the reconstruction error is kept.

    Raises:
        InputError: if the SAE has no such latent, or its latents cannot be set.
    """

    sae: LoadedSae
    latents: tuple[int, ...]
    positions: Positions = "all"

    def __post_init__(self) -> None:
        self.sae.check_use("ablated", self.latents)


@dataclass(frozen=True, eq=False)
class Amplify:
    """Multiply some latents' activations by `factor`: h += sum_k (factor - 1) * a_k(h) * W_dec[k].

    Raises:
        InputError: if the SAE has no such latent, or its latents cannot be set.
    """

    sae: LoadedSae
    latents: tuple[int, ...]
    factor: float
    positions: Positions = "all"

    def __post_init__(self) -> None:
        self.sae.check_use("amplified", self.latents)


LatentEdit = Clamp | Ablate | Amplify
Intervention = Add | LatentEdit


def layer_of(intervention: Intervention) -> int:
    """The decoder layer whose output it changes."""
    return intervention.layer if isinstance(intervention, Add) else intervention.sae.layer


def edited_latents(edit: LatentEdit) -> tuple[tuple[int, ...], float, float]:
    """Which latents an edit sets, each once, and to what: to a value plus a factor times their activation."""
    if isinstance(edit, Clamp):
        return (edit.latent,), float(edit.value), 0.0
    factor = float(edit.factor) if isinstance(edit, Amplify) else 0.0
    return tuple(dict.fromkeys(edit.latents)), 0.0, factor


def check_intervention(intervention: Intervention, layers: int, width: int) -> None:
    """Refuse an intervention that does not fit a model.

    Args:
        layers: number of the model's decoder layers.

    Raises:
        InputError: what is no intervention, a layer the model does not have, or a vector or SAE of another width.
    """
    what = type(intervention).__name__
    if not isinstance(intervention, Intervention):
        raise InputError(f"{what} is no intervention", "steering", "Give a strength: direction.add(0.9), for example.")
    check_layer_number(layer_of(intervention), layers, what)
    shape = tuple(intervention.vector.shape) if isinstance(intervention, Add) else (intervention.sae.d_model,)
    if shape != (width,):
        raise InputError(f"a direction of shape {shape} does not fit a residual stream {width} wide", what)
    if isinstance(intervention, Add) and not bool(intervention.vector.isfinite().all()):
        raise InputError("the vector holds numbers that are not finite", what)
