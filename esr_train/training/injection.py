"""Live injection: a row's own steering is active in its forward pass and until its backward pass ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from esr_train.errors import InputError
from esr_train.models import check_layer, hidden_size
from esr_train.recipe import LiveSection
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Add
from esr_train.steering.hook import SteeringHook
from esr_train.training.dataset import Latent
from esr_train.transcript import SaeRef

COLUMNS = ("vector", "reach", "key", "document", "reply")
"""The steering columns of a batch; the model never sees them."""


def load_vectors(latents: Sequence[Latent]) -> torch.Tensor:
    """The latents' decoder rows, [latents, d_model] float32 on the CPU.

    Call it before the model is loaded: under ZeRO-3 that changes how modules are made, which sae-lens does not
    survive.

    Raises:
        InputError: an SAE that cannot be loaded, a latent it does not have, or a row steered at another layer than the
            SAE's.
    """
    loaded: dict[SaeRef, Any] = {}
    rows = []
    for latent in latents:
        if latent.sae not in loaded:
            loaded[latent.sae] = load_sae(latent.sae)
        if latent.layer != loaded[latent.sae].layer:
            raise InputError(
                f"rows were steered at layer {latent.layer} with latents of an SAE of layer {loaded[latent.sae].layer} "
                f"({latent.sae.release} / {latent.sae.id})",
                "steering.layer of the training rows",
                "Name the layer of the SAE, or the SAE of the layer.",
            )
        rows.append(loaded[latent.sae].row(latent.index).cpu())
    return torch.stack(rows)


def draw(seed: int, key: int, epoch: int) -> tuple[float, float]:
    """Two uniform numbers in [0, 1) that belong to this seed, row and epoch, whatever was drawn before.

    Counter-based (Philox): a resumed run, another batch size and more processes all draw the same.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, key], counter=[0, 0, 0, epoch]))
    first, second = generator.random(2)
    return float(first), float(second)


class LiveInjection:
    """Steers every steered row of a batch with its own vector.

    Args:
        settings: the recipe's `train.live`.
        vectors: decoder rows, [latents, d_model].
        layer: the decoder layer whose output is steered.
        seed: of the strengths.
    """

    def __init__(self, settings: LiveSection, vectors: torch.Tensor, layer: int, seed: int) -> None:
        self.settings, self.vectors, self.layer, self.seed = settings, vectors, layer, seed

    def check_fits(self, model: Any) -> None:
        """Refuse vectors of another width, or a layer that the model does not have.

        Raises:
            InputError: naming both sizes.
        """
        check_layer(model, self.layer, "steering.layer of the training rows")
        found, width = self.vectors.shape[1], hidden_size(model)
        if found != width:
            raise InputError(
                f"the rows' SAE is {found} wide, the model's residual stream {width}",
                "train.live",
                "Train on rows that were made with this model.",
            )

    def strength(self, key: int, reach: float, epoch: int) -> float:
        """A row's strength in this epoch, in decoder rows; 0 where the row is not in the injected share."""
        chosen, place = draw(self.seed, key, epoch)
        low, high = self.settings.strength
        return reach * (low + place * (high - low)) if chosen < self.settings.share else 0.0

    def programs(self, columns: dict[str, torch.Tensor], epoch: int) -> list[tuple[Add, ...]]:
        """One program for each row of a batch, packed or not; empty for an unsteered row."""
        programs: list[tuple[Add, ...]] = []
        rows = zip(*(columns[name].tolist() for name in ("vector", "reach", "key")), strict=True)
        for vector, reach, key in rows:
            strength = self.strength(key, reach, epoch) if vector >= 0 else 0.0
            programs.append((Add(self.layer, self.vectors[vector] * strength),) if strength else ())
        return programs

    @contextmanager
    def steering(self, model: Any, inputs: dict[str, Any], epoch: int) -> Iterator[None]:
        """Steer the batch in every forward pass until the block ends; takes its steering columns out.

        The block must enclose the backward pass: gradient checkpointing runs the steered layer again in it.
        """
        columns = {name: inputs.pop(name) for name in COLUMNS}
        programs = self.programs(columns, epoch)
        if not any(programs):
            yield
            return
        owner, reply = self.placement(columns)
        with SteeringHook(model, programs) as hook:
            hook.set_rows(owner, reply)
            yield

    def placement(self, columns: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Owner (-1: nobody) and reply mask of every token, both [sequences, positions]."""
        document, reply = columns["document"], columns["reply"]
        if self.settings.positions == "assistant":
            return torch.where(reply, document, -1), reply
        return document, reply

    def delta(self, programs: Sequence[Sequence[Add]], owner: torch.Tensor) -> torch.Tensor:
        """What every token gets under these programs, [rows, positions, d_model] float32 on the CPU."""
        nothing = torch.zeros(self.vectors.shape[1])
        rows = [program[0].vector if program else nothing for program in programs]
        return torch.stack([*rows, nothing])[owner.cpu()]
