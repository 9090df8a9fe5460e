"""Live injection: a row's own steering is active in its forward pass and until its backward pass ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

from esr_train.errors import InputError
from esr_train.models import check_layer, hidden_size
from esr_train.recipe import LiveSection, Recipe
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Add, LoadedSae, Positions
from esr_train.steering.hook import SteeringHook
from esr_train.steering.vector_files import one_called, unchanged_vectors
from esr_train.training.dataset import TrainingRow, VectorSource, table
from esr_train.transcript import SaeRef, VectorRef

COLUMNS = ("vector", "threshold_raw", "key", "row", "reply", "answer")
"""The steering columns of a batch; the model never sees them."""


def load_vectors(sources: Sequence[VectorSource]) -> torch.Tensor:
    """What one unit of strength adds: decoder rows or vectors of one's own, [sources, d_model] float32 on the CPU.

    Call it before the model is loaded: under ZeRO-3 that changes how modules are made, which sae-lens does not
    survive.

    Raises:
        InputError: what cannot be loaded, a latent that its SAE does not have, a row steered at another layer than the
            SAE's, a file of vectors that has changed, or vectors of different widths.
    """
    saes: dict[SaeRef, LoadedSae] = {}
    opened = cache(unchanged_vectors)
    rows = []
    for source in sources:
        if isinstance(source.origin, VectorRef):
            vector = one_called(source.name, opened(source.origin, source.layer), source.origin.file)
            rows.append(vector.unit * vector.length)
            continue
        sae = saes.setdefault(source.origin, saes.get(source.origin) or load_sae(source.origin))
        if source.layer != sae.layer:
            raise InputError(
                f"rows were steered at layer {source.layer} with latents of an SAE of layer {sae.layer} "
                f"({source.origin.release} / {source.origin.id})",
                "steering.layer of the training rows",
                "Name the layer of the SAE, or the SAE of the layer.",
            )
        rows.append(sae.row(source.index).cpu())
    if len(widths := sorted({len(row) for row in rows})) > 1:
        raise InputError(f"vectors of different widths steer the rows ({widths})", "steering of the training rows")
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
        vectors: decoder rows, [latents, d_model].
        layer: the decoder layer whose output is steered.
        seed: of the strengths.
        positions: which tokens of a row are steered; `generated` means those of its reply.
    """

    def __init__(
        self, settings: LiveSection, vectors: torch.Tensor, layer: int, seed: int, positions: Positions = "all"
    ) -> None:
        self.settings, self.vectors, self.layer = settings, vectors, layer
        self.seed, self.positions = seed, positions

    def check_fits(self, model: Any) -> None:
        """Refuse vectors of another width, or a layer that the model does not have.

        Raises:
            InputError: naming both sizes.
        """
        check_layer(model, self.layer, "steering.layer of the training rows")
        width, wanted = self.vectors.shape[1], hidden_size(model)
        if width != wanted:
            raise InputError(
                f"the rows' vectors are {width} wide, the model's residual stream {wanted}",
                "train.live",
                "Train on rows that were made with this model.",
            )

    def is_injected(self, key: int, epoch: int) -> bool:
        """Whether a row is in the injected share of this epoch."""
        return draw(self.seed, key, epoch)[0] < self.settings.share

    def strength(self, key: int, threshold_raw: float, epoch: int) -> float:
        """A row's strength in this epoch, in decoder rows; 0 where it is not injected."""
        low, high = self.settings.strength
        factor = low + draw(self.seed, key, epoch)[1] * (high - low)
        return threshold_raw * factor if self.is_injected(key, epoch) else 0.0

    def interventions(self, columns: dict[str, torch.Tensor], epoch: int) -> list[tuple[Add, ...]]:
        """What is added up to each row's answer, and then, row by row again, what is added from there on.

        A row, packed or not, is two rows of the hook (see `hook_rows`); nothing is added in an unsteered one.
        """
        added: list[tuple[Add, ...]] = []
        rows = list(zip(*(columns[name].tolist() for name in ("vector", "threshold_raw", "key")), strict=True))
        for factor in (1.0, self.settings.answer):
            for vector, threshold_raw, key in rows:
                strength = factor * self.strength(key, threshold_raw, epoch) if vector >= 0 else 0.0
                added.append((Add(self.layer, self.vectors[vector] * strength, self.positions),) if strength else ())
        return added

    @contextmanager
    def steering(self, model: Any, inputs: dict[str, Any], epoch: int) -> Iterator[None]:
        """Steer the batch in every forward pass until the block ends; takes its steering columns out.

        The block must enclose the backward pass: gradient checkpointing runs the steered layer again in it.
        """
        columns = {name: inputs.pop(name) for name in COLUMNS}
        added = self.interventions(columns, epoch)
        if not any(added):
            yield
            return
        with SteeringHook(model, added) as hook:
            hook.set_rows(hook_rows(columns), columns["reply"])
            yield

    def delta(self, added: Sequence[Sequence[Add]], columns: dict[str, torch.Tensor]) -> torch.Tensor:
        """What every token is to get, [sequences, positions, d_model] float32 on the CPU."""
        nothing = torch.zeros(self.vectors.shape[1])
        rows = torch.stack([*(each[0].vector if each else nothing for each in added), nothing])
        row = hook_rows(columns).cpu()
        return rows[row if self.positions == "all" else torch.where(columns["reply"].cpu(), row, -1)]


def hook_rows(columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """The row of `LiveInjection.interventions` that every token of a batch is steered by, -1 for padding."""
    in_answer = columns["answer"] & (columns["row"] >= 0)
    return columns["row"] + in_answer * len(columns["vector"])


def live_injection(recipe: Recipe, rows: Sequence[TrainingRow]) -> LiveInjection | None:
    """The injection that the recipe's `train.live` asks for; call it before the model is loaded (see `load_vectors`).

    Raises:
        InputError: as `load_vectors`, or a strength that is no finite vector.
    """
    if recipe.train.live is None:
        return None
    sources = table(rows)
    vectors, highest = load_vectors(sources), recipe.train.live.strength[1]
    largest = dict(zip(sources, vectors.abs().amax(dim=1), strict=True))
    for row in rows:
        if row.vector and not (largest[row.vector] * row.threshold_raw * highest).isfinite():
            what = f"a strength of {row.threshold_raw:g} decoder rows is no finite vector"
            raise InputError(what, f"row {row.labelled.id!r}", "Correct its steering or leave it out.")
    return LiveInjection(recipe.train.live, vectors, sources[0].layer, recipe.seed, recipe.engine.positions)
