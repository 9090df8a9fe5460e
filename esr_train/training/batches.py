"""Which rows go together, and how they are packed and padded."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from esr_train.errors import RunError
from esr_train.masking import IGNORED

POOL = 50
"""Batches whose rows are sorted by length together: enough to cut padding, few enough to stay random."""

SPANS = ("reply", "answer")
"""What a token may lie in or behind the beginning of: columns of a batch, each made from a `…_start` of the rows."""


class LengthGrouped(Sampler[int]):
    """Random batches of rows of like length; a function of seed and epoch alone, so resuming changes nothing.

    Args:
        lengths: of the rows, in tokens.
        batch: rows of one optimiser step over all processes.
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
    for padding), `reply` and `answer` [sequences, positions], and `vector`, `threshold_raw` and `key` [rows].

    Args:
        pad_token_id: fills `input_ids`; labels are filled with -100.
        packed: whether sequences hold more than one row.
        flat: put all sequences into one, as flash attention wants packed rows.

    Raises:
        RunError: for a batch without a single trained token, whose loss of 0 would look like success.
    """

    def __init__(self, pad_token_id: int, packed: bool = False, flat: bool = False) -> None:
        self.packed, self._flat = packed, flat
        self._fillings = {"input_ids": pad_token_id, "labels": IGNORED, "row": -1, "position_ids": 0}
        self._fillings |= dict.fromkeys(SPANS, False)

    def __call__(self, sequences: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pieces: list[dict[str, torch.Tensor]] = []
        rows = 0
        for sequence in sequences:
            lengths = torch.tensor(sequence["lengths"])
            row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            position = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
            spans = {name: position >= torch.tensor(sequence[f"{name}_start"])[row] for name in SPANS}
            tokens = {name: torch.tensor(sequence[name]) for name in ("input_ids", "labels")}
            pieces.append({**tokens, "row": row + rows, "position_ids": position, **spans})
            rows += len(lengths)
        if self._flat:
            pieces = [{name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}]
        batch = {
            name: pad_sequence([piece[name] for piece in pieces], batch_first=True, padding_value=filling)
            for name, filling in self._fillings.items()
        }
        if not (batch["labels"][:, 1:] != IGNORED).any():
            raise RunError("a batch has no trained token: its loss would be 0 whatever the model says.")
        if not self.packed:
            del batch["position_ids"]
            batch["attention_mask"] = (batch["row"] >= 0).long()
        for name in ("vector", "threshold_raw", "key"):
            batch[name] = torch.tensor([value for sequence in sequences for value in sequence[name]])
        return batch


class PairCollator:
    """Pairs of rows to a batch as `trl.DPOTrainer` wants it: all preferred rows, then all rejected ones.

    In place of `labels` it holds `completion_mask` [rows, positions], 1 where a token is scored.

    Args:
        rows: makes the batch; for rows that are not packed.
    """

    def __init__(self, rows: Collator) -> None:
        self._rows = rows

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._rows([_row_of(pair, side) for side in (0, 1) for pair in pairs])
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        return batch


def _row_of(sequence: dict[str, Any], number: int) -> dict[str, Any]:
    """One row of a sequence, as a sequence of its own."""
    lengths = sequence["lengths"]
    start = sum(lengths[:number])
    tokens = {name: sequence[name][start : start + lengths[number]] for name in ("input_ids", "labels")}
    names = ("lengths", "vector", "threshold_raw", "key", *(f"{name}_start" for name in SPANS))
    return tokens | {name: sequence[name][number : number + 1] for name in names}
