"""The transformers hook: every token of a batch under its own interventions, and a count of what it steered.

A **program** is one tuple of interventions (of a request, or of a training document); the **owner** of a
token is the index of the program it is under. `place` says which token belongs to whom; one forward pass (and
its recomputation under gradient checkpointing) then runs with that placement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from esr_train.errors import InputError, RunError
from esr_train.models import check_layer, decoder_layers, hidden_size
from esr_train.steering.intervention import Add, Clamp, Intervention
from esr_train.steering.sae import LoadedSae

ENCODED_AT_ONCE = 1024
"""Tokens encoded in one piece: an SAE of 131k latents then needs half a gigabyte of activations."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Which program each token of one forward pass is under.

    Args:
        owner: [rows, positions] long; -1 for padding and for tokens under no program.
        reply: [rows, positions] bool, the tokens from the reply's first one on.
    """

    owner: torch.Tensor
    reply: torch.Tensor


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
        by_layer: dict[int, list[list[Intervention]]] = {}
        for owner, program in enumerate(programs):
            for intervention in program:
                _check(model, intervention)
                empty: list[list[Intervention]] = [[] for _ in programs]
                by_layer.setdefault(intervention.layer, empty)[owner].append(intervention)
        self._modules = decoder_layers(model)
        self._layers = {layer: _Layer(layer, lists) for layer, lists in sorted(by_layer.items())}
        self._programs = len(programs)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "SteeringHook":
        for index, layer in self._layers.items():
            self._handles.append(self._modules[index].register_forward_hook(layer))
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
        return {index: layer.counts(self._programs) for index, layer in self._layers.items()}


class _Layer:
    """All programs' interventions at one decoder layer; called as its forward hook."""

    def __init__(self, index: int, programs: Sequence[Sequence[Intervention]]) -> None:
        self.index = index
        self.stages = _stages(programs)
        self.counted = True
        self._placement: Placement | None = None
        self._counts: torch.Tensor | None = None
        self._increment: torch.Tensor | None = None
        self._steps: list[Any] = []
        # Padded by one entry so that owner -1 reads False.
        self._always = torch.tensor([any(i.positions == "all" for i in program) for program in programs] + [False])
        self._in_reply = torch.tensor([bool(program) for program in programs] + [False])

    def place(self, placement: Placement) -> None:
        self._placement, self.counted = placement, False
        self._steps, self._increment = [], None

    def counts(self, programs: int) -> list[int]:
        return [0] * programs if self._counts is None else self._counts[:-1].tolist()

    def __call__(self, _: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        steered = self._steer(hidden)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    def _steer(self, hidden: torch.Tensor) -> torch.Tensor:
        placement = self._placement
        if placement is None or placement.owner.shape != hidden.shape[:2]:
            placed = None if placement is None else tuple(placement.owner.shape)
            raise RunError(
                f"layer {self.index} got hidden states of {tuple(hidden.shape[:2])} (rows, positions) while "
                f"the steering was placed for {placed}: it would be applied to the wrong tokens."
            )
        if not self._steps:
            self._prepare(placement, hidden)
        if not self.counted:
            self._count(hidden.device)
        for step in self._steps:
            hidden = step(hidden)
        return hidden

    def _prepare(self, placement: Placement, hidden: torch.Tensor) -> None:
        owner, reply = placement.owner.to(hidden.device), placement.reply.to(hidden.device)
        self._steps = [stage.at(owner, reply, hidden) for stage in self.stages]
        always, in_reply = self._always.to(owner.device), self._in_reply.to(owner.device)
        steered = always[owner] | (in_reply[owner] & reply)
        increment = torch.zeros(len(self._always), dtype=torch.long, device=owner.device)
        # Owner -1 is counted in the last entry, which nobody reads.
        self._increment = increment.scatter_add_(0, owner.flatten() % len(self._always), steered.flatten().long())

    def _count(self, device: torch.device) -> None:
        self.counted = True
        assert self._increment is not None
        if self._counts is None:
            self._counts = torch.zeros_like(self._increment, device=device)
        self._counts += self._increment


class _AddStage:
    """Additive steering: one table of vectors, one index per token."""

    def __init__(self, programs: int) -> None:
        self._vectors: list[torch.Tensor] = []
        # Row 0 of the table is zeros; the entry past the last program stands for owner -1.
        self._prompt = [0] * (programs + 1)
        self._reply = [0] * (programs + 1)

    def accepts(self, owner: int, intervention: Intervention) -> bool:
        return isinstance(intervention, Add)

    def take(self, owner: int, intervention: Intervention) -> None:
        """Sum the program's vectors: for prompt tokens those for all positions, for reply tokens all."""
        assert isinstance(intervention, Add)
        vector = intervention.vector.detach().float().cpu()
        if intervention.positions == "all":
            self._prompt[owner] = self._extended(self._prompt[owner], vector)
        self._reply[owner] = self._extended(self._reply[owner], vector)

    def _extended(self, index: int, vector: torch.Tensor) -> int:
        self._vectors.append(self._vectors[index - 1] + vector if index else vector)
        return len(self._vectors)

    def at(self, owner: torch.Tensor, reply: torch.Tensor, hidden: torch.Tensor) -> Any:
        """What this stage does to hidden states [rows, positions, d_model] under a placement."""
        table = torch.stack([torch.zeros_like(self._vectors[0]), *self._vectors])
        table = table.to(device=hidden.device, dtype=hidden.dtype)
        prompt = torch.tensor(self._prompt, device=owner.device)
        generated = torch.tensor(self._reply, device=owner.device)
        index = torch.where(reply, generated[owner], prompt[owner])
        if index.shape[1] == 1:
            # A decode step: the same vectors are added at every step until a row ends.
            rows = table[index]
            return lambda hidden: hidden + rows
        return lambda hidden: hidden + table[index]


@dataclass(frozen=True, eq=False)
class _Setting:
    """One program's Clamp or Ablate: its latents' activations become `value`."""

    owner: int
    latents: tuple[int, ...]
    value: float
    always: bool


class _EncodeStage:
    """Clamp and Ablate: only the tokens that ask go through the encoder, all of them together."""

    def __init__(self) -> None:
        self._settings: dict[int, tuple[LoadedSae, list[_Setting]]] = {}

    def accepts(self, owner: int, intervention: Intervention) -> bool:
        """One edit per program: a second one reads the activations that the first has left."""
        taken = any(setting.owner == owner for _, settings in self._settings.values() for setting in settings)
        return not isinstance(intervention, Add) and not taken

    def take(self, owner: int, intervention: Intervention) -> None:
        assert not isinstance(intervention, Add)
        latents = (
            (intervention.latent,) if isinstance(intervention, Clamp) else tuple(dict.fromkeys(intervention.latents))
        )
        value = intervention.value if isinstance(intervention, Clamp) else 0.0
        setting = _Setting(owner, latents, value, intervention.positions == "all")
        self._settings.setdefault(id(intervention.sae), (intervention.sae, []))[1].append(setting)

    def at(self, owner: torch.Tensor, reply: torch.Tensor, hidden: torch.Tensor) -> Any:
        """What this stage does to hidden states [rows, positions, d_model] under a placement."""
        edits = [_Edit(sae, settings, owner, reply) for sae, settings in self._settings.values()]

        def edited(hidden: torch.Tensor) -> torch.Tensor:
            for edit in edits:
                hidden = edit(hidden)
            return hidden

        return edited


class _Edit:
    """One SAE's settings under a placement: h += sum_k (value - a_k(h)) * W_dec[k] at the chosen tokens."""

    def __init__(self, sae: LoadedSae, settings: Sequence[_Setting], owner: torch.Tensor, reply: torch.Tensor) -> None:
        self._sae = sae
        longest = max(len(setting.latents) for setting in settings)
        padded = [[*setting.latents, *[0] * (longest - len(setting.latents))] for setting in settings]
        device = owner.device
        self._latents = torch.tensor(padded, device=device)
        self._real = torch.tensor(
            [[float(i < len(setting.latents)) for i in range(longest)] for setting in settings], device=device
        )
        self._value = torch.tensor([setting.value for setting in settings], device=device)[:, None]
        self._rows = torch.stack([torch.stack([sae.row(k) for k in row]) for row in padded]).to(device)
        which = torch.full_like(owner, -1)
        for number, setting in enumerate(settings):
            here = owner == setting.owner
            which[here if setting.always else here & reply] = number
        self._tokens = (which >= 0).nonzero(as_tuple=True)
        self._which = which[self._tokens]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if not len(self._which):
            return hidden
        chosen = hidden[self._tokens].float()
        pieces = zip(chosen.split(ENCODED_AT_ONCE), self._which.split(ENCODED_AT_ONCE), strict=True)
        change = torch.cat([self._change(piece, which) for piece, which in pieces])
        return hidden + torch.zeros_like(hidden).index_put(self._tokens, change.to(hidden.dtype))

    def _change(self, chosen: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        activations = self._sae.encode(chosen).gather(1, self._latents[which])
        missing = (self._value[which] - activations) * self._real[which]
        return torch.einsum("tk,tkd->td", missing, self._rows[which])


def _stages(programs: Sequence[Sequence[Intervention]]) -> list[_AddStage | _EncodeStage]:
    """One layer's interventions in few stages, batched over programs, that keep every program's order."""
    stages: list[_AddStage | _EncodeStage] = []
    for owner, program in enumerate(programs):
        place = 0
        for intervention in program:
            while place < len(stages) and not stages[place].accepts(owner, intervention):
                place += 1
            if place == len(stages):
                stages.append(_AddStage(len(programs)) if isinstance(intervention, Add) else _EncodeStage())
            stages[place].take(owner, intervention)
    return stages


def _check(model: Any, intervention: Intervention) -> None:
    what = type(intervention).__name__
    check_layer(model, intervention.layer, what)
    width = hidden_size(model)
    found = intervention.vector.shape if isinstance(intervention, Add) else (intervention.sae.d_model,)
    if tuple(found) != (width,):
        raise InputError(f"a direction of shape {tuple(found)} does not fit a residual stream {width} wide", what)
