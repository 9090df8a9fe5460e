"""Which rows go together, and how they are padded."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
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
            order[start : start + pool] = sorted(
                order[start : start + pool], key=lambda row: -self._lengths[row]
            )
        batches = [order[start : start + self._batch] for start in range(0, len(order), self._batch)]
        # A short batch must stay last, or every later batch would straddle two groups.
        last = [batches.pop()] if len(batches[-1]) < self._batch else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([row for batch in shuffled + last for row in batch])


class Collator:
    """Rows to a right-padded batch: `input_ids`, `attention_mask`, `labels` [rows, positions], others [rows].

    Args:
        pad_token_id: fills `input_ids`; labels are filled with -100.

    Raises:
        RunError: for a batch without a single trained token, whose loss of 0 would look like success.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        ids, labels = torch.full(shape, self._pad), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for place, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[place, :length] = torch.tensor(row["input_ids"])
            labels[place, :length] = torch.tensor(row["labels"])
            mask[place, :length] = 1
        if not (labels[:, 1:] != IGNORED).any():
            raise RunError("a batch has no trained token: its loss would be 0 whatever the model says.")
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for name in ("vector", "reach", "reply_start", "key"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch
