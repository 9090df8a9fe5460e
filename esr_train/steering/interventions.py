"""What may be done to the residual stream of one batch row."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from esr_train.steering.directions import LoadedSae

Positions = Literal["all", "generated"]
"""`all`: every token but padding; `generated`: from the reply's first token on (a given prefix included)."""


@dataclass(frozen=True, eq=False)
class Add:
    """h += vector after decoder layer `layer` (the SAE's reconstruction error is kept).

    Args:
        layer: index of the decoder layer whose output is changed.
        vector: [d_model], direction times strength, in residual units.
        positions: which tokens are steered.
        along: [d_model] and a length, where the vector is a multiple of a direction that others share: engines
            that keep directions on their workers then send it once.
    """

    layer: int
    vector: "torch.Tensor"
    positions: Positions = "all"
    along: "tuple[torch.Tensor, float] | None" = None


@dataclass(frozen=True, eq=False)
class Clamp:
    """Set one latent's activation to `value`: h += (value - a_k(h)) * W_dec[k], a_k from the SAE's encoder.

    Equal to decode(encode(h) with a_k := value) + (h - decode(encode(h))): the reconstruction error is kept.
    """

    layer: int
    sae: "LoadedSae"
    latent: int
    value: float
    positions: Positions = "all"


@dataclass(frozen=True, eq=False)
class Ablate:
    """Zero some latents: h -= sum_k a_k(h) * W_dec[k]; the reconstruction error is kept."""

    layer: int
    sae: "LoadedSae"
    latents: tuple[int, ...]
    positions: Positions = "all"


Intervention = Add | Clamp | Ablate


def edited_latents(intervention: Clamp | Ablate) -> tuple[tuple[int, ...], float]:
    """Which latents a Clamp or Ablate sets, each once, and to what."""
    if isinstance(intervention, Clamp):
        return (intervention.latent,), float(intervention.value)
    return tuple(dict.fromkeys(intervention.latents)), 0.0
