"""What interventions do at one decoder layer, for all rows of a batch at once; shared by all engines.

A **row** is a row of a batch, or a running request of a server: its interventions come and go, its number stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from esr_train.errors import RunError
from esr_train.steering.directions import ENCODED_AT_ONCE, Add, LoadedSae
from esr_train.steering.interventions import Intervention, LatentEdit, edited_latents

Step = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Hidden states [..., d_model], and the residual not yet added to them or None -> edited hidden states."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The row of every token of one forward pass.

    Args:
        index: [rows, positions] or [tokens] long; -1 for padding and for tokens of no row.
        reply: bool of the same shape, the tokens from the reply's first one on.
    """

    index: torch.Tensor
    reply: torch.Tensor

    def to(self, device: torch.device) -> "TokenRows":
        """The same on another device."""
        return self if self.index.device == device else TokenRows(self.index.to(device), self.reply.to(device))


class Layer:
    """All rows' interventions at one decoder layer.

    Args:
        number: of the decoder layer, for messages.
        rows: most rows there are at once.
    """

    def __init__(self, number: int, rows: int) -> None:
        self.number, self._rows = number, rows
        self.counted = True
        self._edits: list[_Additions | _LatentEdits] = []
        self._tokens: TokenRows | None = None
        self._steps: list[Step] | None = None
        # One entry more than rows: index -1 reads and counts there, and nobody looks.
        self._counts = torch.zeros(rows + 1, dtype=torch.long)
        self._is_steered = torch.zeros(rows + 1, 2, dtype=torch.bool)

    def assign(self, row: int, interventions: Sequence[Intervention]) -> None:
        """Give an empty row its interventions, which work in this order, and count it from zero.

        Rows share edits: additive interventions first, say, then one edit of latents each, then additive ones.
        """
        number = 0
        for intervention in interventions:
            while number < len(self._edits) and not self._edits[number].accepts(row, intervention):
                number += 1
            if number == len(self._edits):
                sae = None if isinstance(intervention, Add) else intervention.sae
                self._edits.append(_LatentEdits(sae, self._rows) if sae else _Additions(self._rows))
            self._edits[number].take(row, intervention)
        self._is_steered[row, 0] = any(i.positions == "all" for i in interventions)
        self._is_steered[row, 1] = bool(interventions)
        self._counts[row] = 0

    def release(self, row: int) -> None:
        """Empty a row."""
        for edit in self._edits:
            edit.release(row)
        self._is_steered[row] = False

    def restart(self, row: int) -> None:
        """Count a row's tokens from zero again."""
        self._counts[row] = 0

    def set_rows(self, tokens: TokenRows | None) -> None:
        """The rows of the next forward pass's tokens; None: it is not to be steered."""
        self._tokens, self._steps, self.counted = tokens, None, False

    def count(self, row: int) -> torch.Tensor:
        """Tokens of a row steered so far, a scalar on the layer's device."""
        return self._counts[row].clone()

    def counts(self) -> list[int]:
        """Tokens steered so far, row by row."""
        return [int(count) for count in self._counts[:-1].tolist()]

    def forward_hook(self, _module: Any, _args: Any, output: Any) -> Any:
        """What torch calls behind the decoder layer, which returns hidden states or a tuple that begins with them."""
        if isinstance(output, tuple):
            return (self.steer(output[0]), *output[1:])
        return self.steer(output)

    def steer(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [..., d_model] as the rows' interventions leave them.

        Args:
            hidden: what the layer returns.
            residual: where the layer returns the residual stream in two parts, the other one; it is read only.

        Raises:
            RunError: if the states are not those whose rows were set.
        """
        if self._tokens is None or self._tokens.index.shape != hidden.shape[:-1]:
            known = None if self._tokens is None else tuple(self._tokens.index.shape)
            raise RunError(
                f"layer {self.number} got hidden states of {tuple(hidden.shape[:-1])} (rows, positions) while the rows "
                f"were set for {known}: the steering would be applied to the wrong tokens."
            )
        if self._steps is None:
            self._prepare(hidden)
        if not self.counted:
            self.counted = True
            self._counts += self._increment
        for step in self._steps or ():
            hidden = step(hidden, residual)
        return hidden

    def _prepare(self, hidden: torch.Tensor) -> None:
        """Make the steps for the rows that were set, and count what they steer of each."""
        assert self._tokens is not None
        device = hidden.device
        self._counts, self._is_steered = self._counts.to(device), self._is_steered.to(device)
        tokens = self._tokens.to(device)
        self._steps = [edit.step(tokens, hidden) for edit in self._edits]
        steered = self._is_steered[tokens.index, tokens.reply.long()].flatten().long()
        index = tokens.index.flatten() % len(self._counts)
        self._increment = torch.zeros_like(self._counts).scatter_add_(0, index, steered)


class _Additions:
    """h += vector: one table of vectors, in which every token looks up its own.

    The table's first entry is for tokens of no row; each row has two, for its prompt and for its reply.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._table: torch.Tensor | None = None

    def accepts(self, row: int, intervention: Intervention) -> bool:
        return isinstance(intervention, Add)

    def take(self, row: int, intervention: Intervention) -> None:
        assert isinstance(intervention, Add)
        vector = intervention.vector.detach().float()
        if self._table is None:
            self._table = vector.new_zeros(1 + 2 * self._rows, len(vector))
        first = 1 + 2 * row if intervention.positions == "all" else 2 + 2 * row
        self._table[first : 3 + 2 * row] += vector.to(self._table.device)

    def release(self, row: int) -> None:
        if self._table is not None:
            self._table[1 + 2 * row : 3 + 2 * row] = 0

    def step(self, tokens: TokenRows, hidden: torch.Tensor) -> Step:
        assert self._table is not None
        self._table = self._table.to(hidden.device)
        table = self._table.to(hidden.dtype)
        entry = torch.where(tokens.index >= 0, 1 + 2 * tokens.index + tokens.reply.long(), 0)
        if entry.dim() == 1 or entry.shape[1] == 1:
            # The next steps may have the same rows: the vectors are looked up once.
            vectors = table[entry]
            return lambda hidden, _: hidden + vectors
        return lambda hidden, _: hidden + table[entry]


class _LatentEdits:
    """One SAE's edit of each row: h += sum_k (value + (factor - 1) * a_k(h)) * W_dec[k].

    Only the tokens that ask for it go through the encoder, all of them together.
    """

    def __init__(self, sae: LoadedSae, rows: int) -> None:
        self._sae, self._rows = sae, rows
        self._edits: dict[int, LatentEdit] = {}
        self._is_stale = True

    def accepts(self, row: int, intervention: Intervention) -> bool:
        """One edit per row: a second one reads the activations that the first has left."""
        return not isinstance(intervention, Add) and intervention.sae is self._sae and row not in self._edits

    def take(self, row: int, intervention: Intervention) -> None:
        assert not isinstance(intervention, Add)
        self._edits[row] = intervention
        self._is_stale = True

    def release(self, row: int) -> None:
        self._is_stale |= self._edits.pop(row, None) is not None

    def step(self, tokens: TokenRows, hidden: torch.Tensor) -> Step:
        if self._is_stale:
            self._make_tables(hidden.device)
        edit = self._edit_of_row[tokens.reply.long(), tokens.index]
        where = (edit >= 0).nonzero(as_tuple=True)
        edit = edit[where]

        def step(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
            if not len(edit):
                return hidden
            chosen = hidden[where].float()
            if residual is not None:
                chosen = chosen + residual[where].float()
            pieces = zip(chosen.split(ENCODED_AT_ONCE), edit.split(ENCODED_AT_ONCE), strict=True)
            change = torch.cat([self._change(piece, part) for piece, part in pieces])
            return hidden + torch.zeros_like(hidden).index_put(where, change.to(hidden.dtype))

        return step

    def _change(self, hidden: torch.Tensor, edit: torch.Tensor) -> torch.Tensor:
        """What [tokens, d_model] states get under each token's edit."""
        activations = self._sae.encode(hidden).gather(1, self._latents[edit])
        missing = (self._values[edit] + (self._factors[edit] - 1) * activations) * self._is_latent[edit]
        return torch.einsum("tk,tkd->td", missing, self._decoder[edit])

    def _make_tables(self, device: torch.device) -> None:
        """Latents, values and decoder rows by edit, padded to the longest; and by reply and row the edit, -1: none."""
        edits = [edited_latents(edit) for edit in self._edits.values()]
        longest = max((len(latents) for latents, *_ in edits), default=0)
        padded = [[*latents, *[0] * (longest - len(latents))] for latents, *_ in edits]
        self._latents = torch.tensor(padded, dtype=torch.long, device=device)
        is_latent = [[float(i < len(latents)) for i in range(longest)] for latents, *_ in edits]
        self._is_latent = torch.tensor(is_latent, device=device)
        self._values = torch.tensor([[value] for _, value, _ in edits], device=device)
        self._factors = torch.tensor([[factor] for *_, factor in edits], device=device)
        if edits:
            self._decoder = torch.stack([torch.stack([self._sae.row(k) for k in row]) for row in padded]).to(device)
        edit_of_row = torch.full((2, self._rows + 1), -1)
        for number, (row, edit) in enumerate(self._edits.items()):
            edit_of_row[1, row] = number
            edit_of_row[0, row] = number if edit.positions == "all" else -1
        self._edit_of_row = edit_of_row.to(device)
        self._is_stale = False
