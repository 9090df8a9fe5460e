"""Which rows go together, and how they are packed and padded."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from esr_train.errors import RunError
from esr_train.masking import IGNORED

POOL = 50
"""Batches whose rows are sorted by length together: enough to cut padding, few enough to stay random."""


class LengthGrouped(Sampler[int]):
    """Random batches of rows of like length; a function of seed and epoch alone, so resuming changes nothing.

    Args:
        lengths: of the rows, in tokens.
        batch: rows of one optimiser step over all processes.
        seed: of the order.
        epoch: says which epoch is beginning.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths, self._batch, self._seed, self._epoch = list(lengths), batch, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self._epoch())
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        pool = self._batch * POOL
        for start in range(0, len(order), pool):
            order[start : start + pool] = sorted(order[start : start + pool], key=lambda row: -self._lengths[row])
        batches = [order[start : start + self._batch] for start in range(0, len(order), self._batch)]
        # A short batch must stay last, or every later batch would straddle two groups.
        last = [batches.pop()] if len(batches[-1]) < self._batch else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([row for batch in shuffled + last for row in batch])


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows dealt to sequences of at most `capacity` tokens, whole (best-fit decreasing); [sequences][rows].

    A row longer than `capacity` is alone in its sequence.
    """
    room: list[tuple[int, int]] = []
    packed: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        tightest = bisect_left(room, (lengths[row], -1))
        if tightest < len(room):
            left, number = room.pop(tightest)
        else:
            left, number = capacity, len(packed)
            packed.append([])
        packed[number].append(row)
        insort(room, (left - lengths[row], number))
    return packed


class Collator:
    """Sequences of one or more rows to a right-padded batch.

    The batch holds `input_ids` and `labels` [sequences, positions], and `attention_mask` or, where rows are packed,
    `position_ids` of the same shape, which begin at 0 with every row and with every padding token: from their
    breaks transformers infers who may see whom. For the steering it holds `row` (the row's index in the batch, -1
    for padding) and `reply` [sequences, positions], and `vector`, `threshold_raw` and `key` [rows].

    Args:
        pad_token_id: fills `input_ids`; labels are filled with -100.
        packed: whether sequences hold more than one row.
        flat: put all sequences into one, as flash attention wants packed rows.

    Raises:
        RunError: for a batch without a single trained token, whose loss of 0 would look like success.
    """

    def __init__(self, pad_token_id: int, packed: bool = False, flat: bool = False) -> None:
        self._pad, self._packed, self._flat = pad_token_id, packed, flat

    def __call__(self, sequences: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pieces = [_Piece.of(sequence, number) for number, sequence in _numbered(sequences)]
        if self._flat:
            pieces = [_Piece(*(torch.cat(parts) for parts in zip(*map(astuple, pieces), strict=True)))]
        labels = _padded([piece.labels for piece in pieces], IGNORED)
        if not (labels[:, 1:] != IGNORED).any():
            raise RunError("a batch has no trained token: its loss would be 0 whatever the model says.")
        row = _padded([piece.row for piece in pieces], -1)
        batch = {"input_ids": _padded([piece.input_ids for piece in pieces], self._pad), "labels": labels}
        if self._packed:
            batch["position_ids"] = _padded([piece.position for piece in pieces], 0)
        else:
            batch["attention_mask"] = (row >= 0).long()
        columns = {
            name: torch.tensor([value for sequence in sequences for value in sequence[name]])
            for name in ("vector", "threshold_raw", "key")
        }
        return {**batch, **columns, "row": row, "reply": _padded([piece.reply for piece in pieces], False)}


@dataclass(frozen=True)
class _Piece:
    """One sequence, everything [positions]: tokens, labels, the token's row, its position in it, if in a reply."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    reply: torch.Tensor

    @staticmethod
    def of(sequence: dict[str, Any], first: int) -> "_Piece":
        lengths = torch.tensor(sequence["lengths"])
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        position = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
        reply = position >= torch.tensor(sequence["reply_start"])[row]
        ids, labels = torch.tensor(sequence["input_ids"]), torch.tensor(sequence["labels"])
        return _Piece(ids, labels, row + first, position, reply)


def _numbered(sequences: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sequences with the number of the first row of each."""
    first = 0
    for sequence in sequences:
        yield first, sequence
        first += len(sequence["lengths"])


def _padded(rows: Sequence[torch.Tensor], filling: int | bool) -> torch.Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=filling)
