"""Keys, values and attention while tokens are generated one by one: written in place, read without copies.

transformers' own cache is a new tensor with every token, and its eager attention repeats keys and values for all query
heads that share them: on CPUs both cost more than the model's matrix products.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from esr_train.errors import InputError
from esr_train.models import bare_model

ROOM = 64
"""Positions by which the memory for keys and values grows."""
TOKENS_AT_ONCE = {"cpu": 1024}
"""Tokens of prompts or texts that one pass reads, by device. On a CPU the activations of more leave its caches and the
memory that malloc keeps, which costs a third of the time; elsewhere `READ_ELSEWHERE`."""
READ_ELSEWHERE = 16384
_GROUPED = "esr_grouped"
_FAMILIES = ("llama", "gemma2")
"""Model types whose attention `grouped_attention` computes."""


class KeyValues(DynamicLayer):
    """One decoder layer's keys and values [rows, heads, positions, head_dim]: views of memory that has room for more.

    All positions of all rows are kept: where a model's window is shorter, its mask says so.

    Args:
        most: rows that there will be at most, if there may be more than at first.
    """

    def __init__(self, most: int = 0) -> None:
        super().__init__()
        self._most, self._rows, self._start, self._stop = most, 0, 0, 0
        self._memory: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next positions' keys and values; all of them."""
        if not self.is_initialized:
            self._rows, self.is_initialized = len(key_states), True
            self._memory = [self._new(states, states.shape[2]) for states in (key_states, value_states)]
        if self._stop + key_states.shape[2] > self._memory[0].shape[2]:
            self._grow(key_states.shape[2])
        first, self._stop = self._stop, self._stop + key_states.shape[2]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[: self._rows, :, first : self._stop] = states
        self._view()
        return cast(torch.Tensor, self.keys), cast(torch.Tensor, self.values)

    def keep(self, holes: Sequence[int], movers: Sequence[int], rows: int, first: int) -> None:
        """Move rows `movers` to the places `holes`, and forget those from `rows` on and positions before `first`."""
        self._rows, self._start = rows, self._start + first
        for memory in self._memory if holes else ():
            part = memory[:, :, self._start : self._stop]
            part[list(holes)] = part[list(movers)]
        self._view()

    def add(self, other: "KeyValues") -> None:
        """Put another one's rows behind these; both end at the same position, and the other one is no longer."""
        rows, length = self._rows + other._rows, other.get_seq_length()
        for memory, states in zip(self._memory, (other.keys, other.values), strict=True):
            assert states is not None
            memory[self._rows : rows, :, self._stop - length : self._stop] = states
            # What stood there may not be a number, and no weight makes that nothing.
            memory[self._rows : rows, :, self._start : self._stop - length] = 0
        self._rows = rows
        self._view()

    def _new(self, like: torch.Tensor, length: int) -> torch.Tensor:
        rows, heads, _, width = like.shape
        return like.new_empty(max(rows, self._most), heads, length + ROOM, width)

    def _grow(self, more: int) -> None:
        length = self._stop - self._start
        grown = [self._new(memory, length + more) for memory in self._memory]
        for memory, old in zip(grown, self._memory, strict=True):
            memory[: self._rows, :, :length] = old[: self._rows, :, self._start : self._stop]
        self._memory, self._start, self._stop = grown, 0, length

    def _view(self) -> None:
        self.keys, self.values = (memory[: self._rows, :, self._start : self._stop] for memory in self._memory)


class KeyValueCache(DynamicCache):
    """An empty cache of `KeyValues`.

    Args:
        model: in any wrapper.
        most: rows that there will be at most, if there may be more than at first.

    Raises:
        InputError: for a model that keeps something else.
    """

    def __init__(self, model: Any, most: int = 0) -> None:
        super().__init__(config=bare_model(model).config)
        for layer in self.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise InputError(
                    f"{type(bare_model(model)).__name__} keeps more than keys and values of its tokens "
                    f"({type(layer).__name__}), which is not supported",
                    "model.path",
                    "Use a causal language model of a family in docs/families.md.",
                )
        self.memories = [KeyValues(most) for _ in self.layers]
        self.layers = list(self.memories)

    def keep(self, holes: Sequence[int], movers: Sequence[int], rows: int, first: int) -> None:
        """Move rows `movers` to the places `holes`, and forget those from `rows` on and positions before `first`."""
        for memory in self.memories:
            memory.keep(holes, movers, rows, first)

    def add(self, other: "KeyValueCache") -> None:
        """Put another one's rows behind these; both end at the same position, and the other one is no longer."""
        for memory, those in zip(self.memories, other.memories, strict=True):
            memory.add(those)


def rows_at_once(model: Any, width: int) -> int:
    """How many rows of `width` tokens one pass should read."""
    return max(1, TOKENS_AT_ONCE.get(next(model.parameters()).device.type, READ_ELSEWHERE) // max(1, width))


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Eager attention of one new token a row; query heads that share keys are one matrix.

    Args:
        query: [rows, heads, 1, head_dim].
        key: [rows, groups, positions, head_dim], as is `value`.
        attention_mask: float32 [rows, 1, 1, positions], added to the scores.

    Returns:
        [rows, 1, heads, head_dim], and no weights.
    """
    rows, heads, _, width = query.shape
    scores = torch.matmul(query.reshape(rows, key.shape[1], -1, width), key.transpose(2, 3)).float().mul_(scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    weights = scores.add_(attention_mask).softmax(-1).to(query.dtype)
    return torch.matmul(weights, value).reshape(rows, 1, heads, width), None


AttentionInterface.register(_GROUPED, grouped_attention)


@contextmanager
def one_token_each(model: Any, pads: torch.Tensor, positions: int) -> Iterator[Any]:
    """The attention mask for feeding one token a row; meanwhile `grouped_attention` works where it can.

    It can in Llama and Gemma-2 under `eager` or `sdpa`, up to the length of a sliding window.

    Args:
        model: in any wrapper.
        pads: [rows], positions in front of each row's first token.
        positions: of the keys, the fed token's included.
    """
    config: Any = bare_model(model).config
    implementation, window = config._attn_implementation, getattr(config, "sliding_window", None)
    column = torch.arange(positions, device=pads.device)
    if (
        config.model_type not in _FAMILIES
        or implementation not in ("eager", "sdpa")
        or (window is not None and positions > window)
    ):
        yield (column >= pads[:, None]).long()
        return
    low = torch.finfo(torch.float32).min
    mask = torch.zeros(len(pads), positions, device=pads.device).masked_fill_(column < pads[:, None], low)[
        :, None, None
    ]
    kinds = getattr(config, "layer_types", None)
    config._attn_implementation = _GROUPED
    try:
        yield mask if kinds is None else dict.fromkeys(kinds, mask)
    finally:
        config._attn_implementation = implementation
