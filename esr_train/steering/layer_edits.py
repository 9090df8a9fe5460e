"""What interventions do at one decoder layer, for many programs at once; shared by all engines.

A program sits in a **slot** (a row of a batch, or a running request of a server); a `Placement` says under which
slot's program every token of a forward pass is. Programs come and go slot by slot, the tensors stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from esr_train.errors import InputError, RunError
from esr_train.models import check_layer_number
from esr_train.steering.directions import LoadedSae
from esr_train.steering.interventions import Ablate, Add, Clamp, Intervention, edited_latents

ENCODED_AT_ONCE = 1024
"""Tokens encoded in one piece: an SAE of 131k latents then needs half a gigabyte of activations."""

Step = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Hidden states [..., d_model], and the residual not yet added to them or None -> steered hidden states."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Which program each token of one forward pass is under.

    Args:
        owner: [rows, positions] or [tokens] long; a slot, or -1 for padding and for tokens under no program.
        reply: bool of the same shape, the tokens from the reply's first one on.
    """

    owner: torch.Tensor
    reply: torch.Tensor

    @cached_property
    def index(self) -> torch.Tensor:
        """For each token its row in a table of vectors: 0 for nobody, two rows (prompt, reply) per slot."""
        return torch.where(self.owner >= 0, 1 + 2 * self.owner + self.reply.long(), 0)

    @property
    def lasting(self) -> bool:
        """Whether the next steps may have the same placement: one token a row, or packed tokens."""
        return self.owner.dim() == 1 or self.owner.shape[1] == 1


class Layer:
    """All programs' interventions at one decoder layer.

    Args:
        index: of the decoder layer, for messages.
        slots: number of slots.
    """

    def __init__(self, index: int, slots: int) -> None:
        self.index = index
        self.counted = True
        self._stages: list[_AddStage | _EncodeStage] = []
        self._placement: Placement | None = None
        self._steps: list[Step] = []
        self._increment: torch.Tensor | None = None
        # One entry more than slots: owner -1 reads and counts there, and nobody looks.
        self._counts = torch.zeros(slots + 1, dtype=torch.long)
        self._always = torch.zeros(slots + 1, dtype=torch.bool)
        self._in_reply = torch.zeros(slots + 1, dtype=torch.bool)

    def assign(self, slot: int, program: Sequence[Intervention]) -> None:
        """Put a program, in its order, into an empty slot and count it from zero.

        Programs share stages: additive interventions, then one edit each, then additive ones and so on.
        """
        place = 0
        for intervention in program:
            while place < len(self._stages) and not self._stages[place].accepts(slot, intervention):
                place += 1
            if place == len(self._stages):
                slots = len(self._counts) - 1
                self._stages.append(_AddStage(slots) if isinstance(intervention, Add) else _EncodeStage(slots))
            self._stages[place].take(slot, intervention)
        self._always[slot] = any(i.positions == "all" for i in program)
        self._in_reply[slot] = bool(program)
        self._counts[slot] = 0

    def release(self, slot: int) -> None:
        """Empty a slot."""
        for stage in self._stages:
            stage.release(slot)
        self._always[slot] = self._in_reply[slot] = False

    def restart(self, slot: int) -> None:
        """Count a slot's tokens from zero again."""
        self._counts[slot] = 0

    def place(self, placement: Placement | None) -> None:
        """The placement of the next forward pass; None: it is not to be steered."""
        self._placement, self.counted = placement, False
        self._steps, self._increment = [], None

    def count(self, slot: int) -> torch.Tensor:
        """Tokens of a slot steered so far, a scalar on the layer's device."""
        return self._counts[slot].clone()

    def counts(self) -> list[int]:
        """Tokens steered so far, slot by slot."""
        return [int(count) for count in self._counts[:-1].tolist()]

    def steer(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [..., d_model] as the programs want them.

        Args:
            hidden: what the layer returns.
            residual: where the layer returns the residual stream in two parts, the other one; it is read only.

        Raises:
            RunError: if the states are not those of the placement.
        """
        placement = self._placement
        if placement is None or placement.owner.shape != hidden.shape[:-1]:
            placed = None if placement is None else tuple(placement.owner.shape)
            raise RunError(
                f"layer {self.index} got hidden states of {tuple(hidden.shape[:-1])} (rows, positions) while "
                f"the steering was placed for {placed}: it would be applied to the wrong tokens."
            )
        if self._increment is None:
            self._increment = self._prepared(placement, hidden)
        if not self.counted:
            self.counted = True
            self._counts += self._increment
        for step in self._steps:
            hidden = step(hidden, residual)
        return hidden

    def _prepared(self, placement: Placement, hidden: torch.Tensor) -> torch.Tensor:
        """Make the placement's steps; how many tokens of each slot they steer."""
        device = hidden.device
        if self._counts.device != device:
            self._counts, self._always = self._counts.to(device), self._always.to(device)
            self._in_reply = self._in_reply.to(device)
        here = Placement(placement.owner.to(device), placement.reply.to(device))
        here = placement if placement.owner.device == device else here
        self._steps = [stage.at(here, hidden) for stage in self._stages]
        steered = self._always[here.owner] | (self._in_reply[here.owner] & here.reply)
        owner = here.owner.flatten() % len(self._counts)
        return torch.zeros_like(self._counts).scatter_add_(0, owner, steered.flatten().long())


class _AddStage:
    """Additive steering: one table of vectors, one index per token."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._sums: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._table: torch.Tensor | None = None
        self._stale: dict[int, None] = {}

    def accepts(self, slot: int, intervention: Intervention) -> bool:
        return isinstance(intervention, Add)

    def take(self, slot: int, intervention: Intervention) -> None:
        """Sum the program's vectors: for prompt tokens those for all positions, for reply tokens all."""
        assert isinstance(intervention, Add)
        vector = intervention.vector.detach().float()
        prompt, reply = self._sums.get(slot, (None, None))
        if intervention.positions == "all":
            prompt = vector if prompt is None else prompt + vector
        self._sums[slot] = (prompt, vector if reply is None else reply + vector)
        self._stale[slot] = None

    def release(self, slot: int) -> None:
        if self._sums.pop(slot, None) is not None:
            self._stale[slot] = None

    def at(self, placement: Placement, hidden: torch.Tensor) -> Step:
        """What this stage does under a placement."""
        table = self._refreshed(hidden)
        if placement.lasting:
            rows = table[placement.index]
            return lambda hidden, _: hidden + rows
        return lambda hidden, _: hidden + table[placement.index]

    def _refreshed(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._table is None or self._table.device != hidden.device or self._table.dtype != hidden.dtype:
            self._table = hidden.new_zeros(1 + 2 * self._slots, hidden.shape[-1])
            self._stale = dict.fromkeys(self._sums)
        if self._stale:
            nothing = torch.zeros(hidden.shape[-1], device=self._device())
            sums = [self._sums.get(slot, (None, None)) for slot in self._stale]
            rows = torch.stack([nothing if each is None else each for pair in sums for each in pair])
            places = torch.tensor([1 + 2 * slot + part for slot in self._stale for part in (0, 1)])
            self._table[places.to(hidden.device)] = rows.to(hidden.device, hidden.dtype)
            self._stale = {}
        return self._table

    def _device(self) -> torch.device | None:
        return next((reply.device for _, reply in self._sums.values() if reply is not None), None)


@dataclass(frozen=True, eq=False)
class _Setting:
    """One program's Clamp or Ablate: its latents' activations become `value`."""

    slot: int
    sae: LoadedSae
    latents: tuple[int, ...]
    value: float
    always: bool


class _EncodeStage:
    """Clamp and Ablate: only the tokens that ask go through the encoder, all of them together."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._settings: dict[int, _Setting] = {}
        self._edits: list[_Edit] | None = None

    def accepts(self, slot: int, intervention: Intervention) -> bool:
        """One edit per program: a second one reads the activations that the first has left."""
        return not isinstance(intervention, Add) and slot not in self._settings

    def take(self, slot: int, intervention: Intervention) -> None:
        assert isinstance(intervention, Clamp | Ablate)
        latents, value = edited_latents(intervention)
        always = intervention.positions == "all"
        self._settings[slot] = _Setting(slot, intervention.sae, latents, value, always)
        self._edits = None

    def release(self, slot: int) -> None:
        if self._settings.pop(slot, None) is not None:
            self._edits = None

    def at(self, placement: Placement, hidden: torch.Tensor) -> Step:
        """What this stage does under a placement."""
        if self._edits is None:
            by_sae: dict[int, list[_Setting]] = {}
            for setting in self._settings.values():
                by_sae.setdefault(id(setting.sae), []).append(setting)
            self._edits = [_Edit(settings, self._slots, hidden.device) for settings in by_sae.values()]
        steps = [edit.at(placement) for edit in self._edits]

        def edited(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
            for step in steps:
                hidden = step(hidden, residual)
            return hidden

        return edited


class _Edit:
    """One SAE's settings: h += sum_k (value - a_k(h)) * W_dec[k] at the chosen tokens."""

    def __init__(self, settings: Sequence[_Setting], slots: int, device: torch.device) -> None:
        self._sae = settings[0].sae
        longest = max(len(setting.latents) for setting in settings)
        padded = [[*setting.latents, *[0] * (longest - len(setting.latents))] for setting in settings]
        self._latents = torch.tensor(padded, device=device)
        self._real = torch.tensor(
            [[float(i < len(setting.latents)) for i in range(longest)] for setting in settings], device=device
        )
        self._value = torch.tensor([setting.value for setting in settings], device=device)[:, None]
        self._rows = torch.stack([torch.stack([self._sae.row(k) for k in row]) for row in padded]).to(device)
        # For each slot the number of its setting, before the reply and in it; -1: none (and for owner -1).
        which = torch.full((2, slots + 1), -1)
        for number, setting in enumerate(settings):
            which[1, setting.slot] = number
            if setting.always:
                which[0, setting.slot] = number
        self._numbers = which.to(device)

    def at(self, placement: Placement) -> Step:
        which = self._numbers[placement.reply.long(), placement.owner]
        tokens = (which >= 0).nonzero(as_tuple=True)
        which = which[tokens]

        def edited(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
            if not len(which):
                return hidden
            chosen = hidden[tokens].float()
            if residual is not None:
                chosen = chosen + residual[tokens].float()
            pieces = zip(chosen.split(ENCODED_AT_ONCE), which.split(ENCODED_AT_ONCE), strict=True)
            change = torch.cat([self._change(piece, part) for piece, part in pieces])
            return hidden + torch.zeros_like(hidden).index_put(tokens, change.to(hidden.dtype))

        return edited

    def _change(self, chosen: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        activations = self._sae.encode(chosen).gather(1, self._latents[which])
        missing = (self._value[which] - activations) * self._real[which]
        return torch.einsum("tk,tkd->td", missing, self._rows[which])


def check_intervention(intervention: Intervention, layers: int, width: int) -> None:
    """Refuse an intervention that does not fit a model.

    Args:
        intervention: any.
        layers: number of the model's decoder layers.
        width: of its residual stream.

    Raises:
        InputError: a layer the model does not have, or a vector or SAE of another width.
    """
    what = type(intervention).__name__
    check_layer_number(intervention.layer, layers, what)
    found = intervention.vector.shape if isinstance(intervention, Add) else (intervention.sae.d_model,)
    if tuple(found) != (width,):
        raise InputError(f"a direction of shape {tuple(found)} does not fit a residual stream {width} wide", what)
