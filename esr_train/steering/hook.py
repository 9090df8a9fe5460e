"""The transformers hook: every token of a batch under its own row's interventions, and a count of what it steered."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from esr_train.models import decoder_layers, hidden_size
from esr_train.steering.interventions import Intervention, check_intervention, layer_of
from esr_train.steering.layer_edits import Layer, TokenRows


class SteeringHook:
    """Steers a model's residual stream while the context is open.

    Args:
        model: a causal language model, in any wrapper.
        row_interventions: those of each batch row (or of each packed document), applied in order.

    Raises:
        InputError: a layer the model does not have, or a vector or SAE of another width.

    Before a forward pass call `set_rows`; for another pass with the same rows (the next decode step) call `next_step`.
    A layer counts only the first pass after either call, so that its second run under gradient checkpointing, which
    happens in the backward pass, steers as before and is not counted twice. The rows must therefore stay until the
    backward pass is done.
    """

    def __init__(self, model: Any, row_interventions: Sequence[Sequence[Intervention]]) -> None:
        self._modules, width = decoder_layers(model), hidden_size(model)
        self._layers: dict[int, Layer] = {}
        for row, interventions in enumerate(row_interventions):
            by_layer: dict[int, list[Intervention]] = {}
            for intervention in interventions:
                check_intervention(intervention, len(self._modules), width)
                by_layer.setdefault(layer_of(intervention), []).append(intervention)
            for number, those in by_layer.items():
                layer = self._layers.setdefault(number, Layer(number, len(row_interventions)))
                layer.assign(row, those)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "SteeringHook":
        for number, layer in self._layers.items():
            # Before other hooks: what else reads the layer's output (`output_hidden_states`, say) reads it steered.
            handle = self._modules[number].register_forward_hook(layer.forward_hook, prepend=True)
            self._handles.append(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set_rows(self, index: torch.Tensor, reply: torch.Tensor | None = None) -> None:
        """Say to which row every token of the next forward pass belongs.

        Args:
            index: [rows, positions] long, -1 for none: padding and finished rows.
            reply: [rows, positions] bool; None: no token belongs to a reply yet.
        """
        tokens = TokenRows(index, torch.zeros_like(index, dtype=torch.bool) if reply is None else reply)
        for layer in self._layers.values():
            layer.set_rows(tokens)

    def next_step(self) -> None:
        """The next forward pass has the rows of the last one (its tokens are new and are counted)."""
        for layer in self._layers.values():
            layer.counted = False

    def not_run(self) -> list[int]:
        """The steered layers that have not run since rows were set."""
        return sorted(number for number, layer in self._layers.items() if not layer.counted)

    def counts(self) -> dict[int, list[int]]:
        """For each steered layer, how many tokens of each row it has steered so far."""
        return {number: layer.counts() for number, layer in sorted(self._layers.items())}


@contextmanager
def steering(model: Any, row_interventions: Sequence[Sequence[Intervention]]) -> Iterator[SteeringHook]:
    """The rows' interventions at work in evaluation mode: no dropout, no gradient checkpointing."""
    training = model.training
    model.eval()
    try:
        with SteeringHook(model, row_interventions) as hook:
            yield hook
    finally:
        model.train(training)
