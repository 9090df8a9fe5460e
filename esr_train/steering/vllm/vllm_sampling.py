"""Seeded sampling inside vLLM: the transformers engine's own function, so that both engines draw the same tokens.

vLLM's own per-request seeds depend on its sampler. Here vLLM is told to decode greedily, and this processor draws
the tokens (`sampling.py`) and makes each the argmax of its row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from esr_train.steering.engine import Sampling
from esr_train.steering.sampling import filled_up, next_tokens, row_seeds
from esr_train.steering.vllm.vllm_worker import KEY


@dataclass
class _Row:
    """How one request draws; `output` is vLLM's own list, which grows."""

    seed: int
    sampling: Sampling
    prompt: Sequence[int]
    output: Sequence[int]


class SeededSampling(LogitsProcessor):
    """Applies the sampling that requests carry in `extra_args` to their rows of the logits."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._groups: list[tuple[Sampling, list[_Row], torch.Tensor, torch.Tensor]] | None = None

    def is_argmax_invariant(self) -> bool:
        """No: the argmax is what it is there to change."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow rows as vLLM adds, removes and moves them."""
        if batch_update is None:
            return
        self._groups = None
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            row = _row(params, prompt, output)
            self._rows.pop(index, None)
            if row is not None:
                self._rows[index] = row
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] float32, of which each row's largest is now the drawn token's."""
        if self._groups is None:
            self._groups = self._grouped()
        for sampling, rows, index, seeds in self._groups:
            steps = torch.tensor([len(row.output) for row in rows], device=self._device)
            chosen = logits if len(rows) == len(logits) else logits[index]
            tokens = next_tokens(chosen, self._ids(sampling, rows), sampling, seeds, steps)
            # Where nothing can be drawn (-1), any token will do: the worker reports the logits.
            logits[index, tokens.clamp(min=0)] = torch.finfo(logits.dtype).max
        return logits

    def _grouped(self) -> list[tuple[Sampling, list[_Row], torch.Tensor, torch.Tensor]]:
        indices: dict[Sampling, list[int]] = {}
        for index, row in self._rows.items():
            indices.setdefault(row.sampling, []).append(index)
        groups = []
        for sampling, chosen in indices.items():
            chosen.sort()
            rows = [self._rows[index] for index in chosen]
            seeds = row_seeds([row.seed for row in rows], self._device)
            groups.append((sampling, rows, torch.tensor(chosen, device=self._device), seeds))
        return groups

    def _ids(self, sampling: Sampling, rows: Sequence[_Row]) -> torch.Tensor:
        """Every row's tokens so far, which only a repetition penalty reads."""
        if sampling.repetition_penalty == 1.0:
            return torch.empty(len(rows), 0, dtype=torch.long)
        return filled_up([[*row.prompt, *row.output] for row in rows], self._device)


def _row(params: SamplingParams, prompt: Sequence[int] | None, output: Sequence[int]) -> _Row | None:
    asked = (params.extra_args or {}).get(KEY, {}).get("sampling")
    if asked is None:
        return None
    sampling = Sampling(asked["temperature"], asked["top_p"], repetition_penalty=asked["repetition_penalty"])
    return _Row(asked["seed"], sampling, prompt or [], output)
