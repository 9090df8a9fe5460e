"""The transformers hook: every token of a batch under its own interventions, and a count of what it steered.

A **program** is one tuple of interventions (of a request, or of a training document); the **owner** of a
token is the index of the program it is under. `place` says which token belongs to whom; one forward pass (and
its recomputation under gradient checkpointing) then runs with that placement.
"""

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from esr_train.models import decoder_layers, hidden_size
from esr_train.steering.interventions import Intervention
from esr_train.steering.layer_edits import Layer, Placement, check_intervention


class SteeringHook:
    """Steers a model's residual stream while the context is open.

    Args:
        model: Llama or Gemma-2, in any wrapper.
        programs: interventions of each program, applied in order.

    Raises:
        InputError: a layer the model does not have, or a vector or SAE of another width.

    Before a forward pass call `place`; for another pass with the same placement (the next decode step) call
    `again`. A layer counts only the first pass after either call, so that its second run under gradient
    checkpointing, which happens in the backward pass, steers as before and is not counted twice. The
    placement must therefore stay until the backward pass is done.
    """

    def __init__(self, model: Any, programs: Sequence[Sequence[Intervention]]) -> None:
        layers, width = len(decoder_layers(model)), hidden_size(model)
        by_layer: dict[int, list[list[Intervention]]] = {}
        for owner, program in enumerate(programs):
            for intervention in program:
                check_intervention(intervention, layers, width)
                empty: list[list[Intervention]] = [[] for _ in programs]
                by_layer.setdefault(intervention.layer, empty)[owner].append(intervention)
        self._modules = decoder_layers(model)
        self._layers = {index: Layer(index, len(programs)) for index in sorted(by_layer)}
        for index, lists in by_layer.items():
            for owner, program in enumerate(lists):
                self._layers[index].assign(owner, program)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "SteeringHook":
        for index, layer in self._layers.items():
            self._handles.append(self._modules[index].register_forward_hook(partial(_steered, layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def place(self, owner: torch.Tensor, reply: torch.Tensor | None = None) -> None:
        """Say which program every token of the next forward pass is under.

        Args:
            owner: [rows, positions] long, -1 for none. Padding and finished rows belong to nobody.
            reply: [rows, positions] bool; None: no token belongs to a reply yet.
        """
        reply = torch.zeros_like(owner, dtype=torch.bool) if reply is None else reply
        placement = Placement(owner, reply)
        for layer in self._layers.values():
            layer.place(placement)

    def again(self) -> None:
        """The next forward pass has the placement of the last one (its tokens are new and are counted)."""
        for layer in self._layers.values():
            layer.counted = False

    def counts(self) -> dict[int, list[int]]:
        """For each steered layer, how many tokens of each program it has steered so far."""
        return {index: layer.counts() for index, layer in self._layers.items()}


def _steered(layer: Layer, _: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (layer.steer(output[0]), *output[1:])
    return layer.steer(output)
