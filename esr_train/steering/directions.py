"""Directions to steer along: vectors of one's own and SAE latents, with both units of strength."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch

from esr_train.errors import InputError
from esr_train.transcript import SaeRef, Strength, VectorRef

Positions = Literal["all", "generated"]
"""`all`: every token but padding (BOS, too); `generated`: from the reply's first token on (a given prefix included)."""

ENCODED_AT_ONCE = 1024
"""Tokens that an SAE encodes in one piece: one of 131k latents then needs half a gigabyte of activations."""


@dataclass(frozen=True, eq=False)
class Add:
    """h += vector after decoder layer `layer` (an SAE's reconstruction error is kept).

    Args:
        layer: index of the decoder layer whose output is changed.
        vector: [d_model], direction times strength, in residual units; any array becomes a tensor.
        positions: which tokens are steered.
    """

    layer: int
    vector: torch.Tensor
    positions: Positions = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.vector, torch.Tensor):
            object.__setattr__(self, "vector", torch.as_tensor(self.vector, dtype=torch.float32))


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in the output of one decoder layer, and how long a step along it is in either unit of strength.

    Args:
        layer: the decoder layer whose output is steered.
        label: what it stands for, if known.
        unit: [d_model] float32 on the CPU, of norm 1.
        length: what one unit of raw strength adds, in residual units: the norm of the vector as it was given.
        residual_norm: the layer's median residual norm without BOS; None: not measured.
    """

    layer: int
    label: str | None
    unit: torch.Tensor
    length: float
    residual_norm: float | None

    def strength(self, norm: float) -> Strength:
        """Both units of a strength given in residual norms.

        Raises:
            InputError: if the layer's residual norm is not known.
        """
        return Strength(raw=norm * self._known_norm() / self.length, norm=norm)

    def add(self, norm: float | None = None, positions: Positions = "all", *, raw: float | None = None) -> Add:
        """Steer along the direction.

        Args:
            norm: strength in median residual norms of the layer.
            positions: which tokens are steered.
            raw: the strength in multiples of the vector as it was given (of an SAE's decoder row: the paper's b)
                instead; needs no residual norm.

        Raises:
            InputError: unless one of the two strengths is given, and finite; for `norm`, if the layer's residual norm
                is unknown.
        """
        if (norm is None) == (raw is None):
            raise InputError("one strength is needed", "add", "Such as add(0.9), in residual norms, or add(raw=210.0).")
        strength = raw if norm is None else norm
        if not isinstance(strength, Real) or not math.isfinite(strength):
            raise InputError(f"a strength of {strength!r} cannot be added", "add", "Give a finite number.")
        length = float(strength) * (self.length if norm is None else self._known_norm())
        return Add(self.layer, self.unit * length, positions)

    def _known_norm(self) -> float:
        if self.residual_norm is None:
            raise InputError(
                f"the residual norm of layer {self.layer} is not known, so a strength in residual norms says nothing",
                self.label,
                "Call load_sae or load_vectors with model=model, tokenizer=tokenizer, which measures it, or steer by "
                "add(raw=…).",
            )
        return self.residual_norm


@dataclass(frozen=True, eq=False)
class Direction(SteeringVector):
    """A latent's decoder row, or a vector of a file, as a direction that results refer to by a number.

    Args:
        source: the SAE or the file it belongs to.
        latent: index in the SAE's dictionary, or place in the file.
    """

    source: SaeRef | VectorRef
    latent: int


@dataclass(frozen=True, eq=False)
class VectorSet:
    """The vectors of a file, from which directions are taken as from an SAE's dictionary.

    Args:
        ref: the file, and the hash of what is in it.
        layer: the decoder layer whose output they steer.
        vectors: in the order of the file, each with its name as its label, and of one width.
    """

    ref: VectorRef
    layer: int
    vectors: tuple[SteeringVector, ...]

    @property
    def d_model(self) -> int:
        """Width of the residual stream that they belong to."""
        return len(self.vectors[0].unit)

    @property
    def labels(self) -> dict[int, str]:
        """What the vectors stand for, by index: their names."""
        return {index: vector.label or str(index) for index, vector in enumerate(self.vectors)}

    def direction(self, index: int, residual_norm: float | None = None, label: str | None = None) -> Direction:
        """A vector of the file as a direction.

        Args:
            index: its place in the file, from 0.
            residual_norm: the layer's, if it is known.
            label: what it stands for, where that is not its name.

        Raises:
            InputError: if there is no such vector.
        """
        if not 0 <= index < len(self.vectors):
            what = f"there is no vector {index}: the file has {len(self.vectors)}, counted from 0"
            raise InputError(what, self.ref.file)
        vector = self.vectors[index]
        known = vector.residual_norm if residual_norm is None else residual_norm
        return Direction(self.layer, label or vector.label, vector.unit, vector.length, known, self.ref, index)


@dataclass(frozen=True, eq=False)
class LoadedSae:
    """An SAE on the output of one decoder layer, of which one unit of activation adds one decoder row.

    Args:
        ref: where it came from.
        layer: the decoder layer whose output it reads.
        d_model: width of the residual stream it was trained on.
        n_latents: size of its dictionary.
        module: the sae-lens SAE, frozen, float32. It stays where it was loaded until `encode` meets an
            activation on another device; additive steering needs only rows and never moves it.
        residual_norm: the layer's median residual norm without BOS in the model it was loaded for; None: not measured.
        not_encoded: why its activations cannot be computed, which is what choosing latents needs; None: they can.
        not_edited: why its latents cannot be clamped or ablated, where a unit of activation adds no fixed vector.
    """

    ref: SaeRef
    layer: int
    d_model: int
    n_latents: int
    module: Any
    residual_norm: float | None = None
    not_encoded: str | None = None
    not_edited: str | None = None

    def row(self, latent: int) -> torch.Tensor:
        """W_dec[latent], [d_model] float32: what one unit of activation adds to the residual stream.

        Raises:
            InputError: if the SAE has no such latent.
        """
        if not 0 <= latent < self.n_latents:
            raise InputError(
                f"there is no latent {latent}: the SAE has {self.n_latents}, counted from 0", sae_name(self.ref)
            )
        return self.module.W_dec[latent].detach().float()

    def direction(self, latent: int, residual_norm: float | None = None, label: str | None = None) -> Direction:
        """The unit vector of a latent's decoder row.

        Args:
            latent: index in the dictionary.
            residual_norm: where it is not the one the SAE was loaded with.
            label: what the latent stands for.

        Raises:
            InputError: if there is no such latent, or its decoder row is zero or not finite.
        """
        row = self.row(latent).cpu()
        length = float(row.norm())
        if not 0 < length < float("inf"):
            what = "zeros" if length == 0 else "numbers that are not finite"
            raise InputError(f"latent {latent} has a decoder row of {what}", sae_name(self.ref), "Take another latent.")
        known = self.residual_norm if residual_norm is None else residual_norm
        return Direction(self.layer, label, row / length, length, known, self.ref, latent)

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """Activations [..., n_latents] of hidden states [..., d_model], both float32.

        Raises:
            InputError: for an SAE whose activations cannot be computed token by token.
        """
        self.check_use("read")
        if self.module.W_dec.device != hidden.device:
            self.module.to(hidden.device)
        activations = self.module.encode(hidden.float())
        # TopK SAEs may answer in sparse tensors, which neither index nor gather.
        return activations.to_dense() if activations.is_sparse else activations

    def check_use(self, how: Literal["read", "clamped", "ablated", "amplified"], latents: tuple[int, ...] = ()) -> None:
        """Refuse what is not defined for an SAE, or latents that it does not have.

        Raises:
            InputError: naming the reason.
        """
        if reason := self.not_encoded or (self.not_edited if how != "read" else None):
            raise InputError(
                f"its latents cannot be {how}: {reason}",
                sae_name(self.ref),
                "Steer additively with latents that are chosen by hand, or take another SAE.",
            )
        for latent in latents:
            self.row(latent)

    def decoder_norms(self) -> torch.Tensor:
        """Norms of the decoder rows, [n_latents] float32 on the CPU."""
        return self.module.W_dec.detach().float().norm(dim=-1).cpu()


DirectionSource = LoadedSae | VectorSet
"""What gives directions by their number."""


def sae_name(ref: SaeRef) -> str:
    """An SAE as messages name it."""
    return f"{ref.release} / {ref.id}"
