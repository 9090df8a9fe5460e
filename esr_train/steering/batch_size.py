"""How many rows to generate at once, where nobody says: by the memory at hand and measured speed."""

import time
from typing import Any

import psutil
import torch

from esr_train.models import bare_model
from esr_train.steering.decoding import KeyValueCache, one_token_each

SIZES = (16, 32, 64, 128, 256, 512, 1024)
GAIN = 1.1
"""By what factor a size must be faster than the one before; a larger batch also waits longer for its last rows."""
STEPS = 3
"""Timed decode steps of each size; the fastest counts."""


@torch.no_grad()
def choose_rows(model: Any, positions: int) -> int:
    """The number of rows from `SIZES` beyond which decoding hardly gets faster, or memory may not do.

    Args:
        model: of transformers, in any wrapper, in evaluation mode.
        positions: tokens of a row, prompt and reply together.
    """
    room = _free_bytes(model) // 2
    chosen, best = SIZES[0], 0.0
    for rows in SIZES:
        if rows * _row_bytes(model, positions) > room:
            break
        speed = rows / _step_seconds(model, rows, positions)
        if speed < best * GAIN:
            break
        chosen, best = rows, speed
    return chosen


def _row_bytes(model: Any, positions: int) -> int:
    """Memory of a row: keys and values of all positions, and logits as they come and in float32."""
    config = bare_model(model).config.get_text_config()
    each = next(model.parameters()).element_size()
    heads, width = key_value_heads(config)
    return int(2 * config.num_hidden_layers * heads * width * positions * each + config.vocab_size * (each + 8))


def key_value_heads(config: Any) -> tuple[int, int]:
    """Heads of keys and values in a decoder layer, and a head's width, by the text model's configuration."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, width


def _free_bytes(model: Any) -> int:
    device = next(model.parameters()).device
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _step_seconds(model: Any, rows: int, positions: int) -> float:
    """Seconds of a decode step behind empty keys and values, half as many as a whole row has."""
    first = next(model.parameters())
    heads, width = key_value_heads(bare_model(model).config.get_text_config())
    cache, behind = KeyValueCache(model), max(1, positions // 2)
    empty = torch.zeros(rows, heads, behind, width, dtype=first.dtype, device=first.device)
    for layer in cache.memories:
        layer.update(empty, empty)
    ids, pads = torch.zeros(rows, 1, dtype=torch.long, device=first.device), torch.zeros_like(empty[:, 0, 0, 0]).long()
    seconds = []
    for step in range(1 + STEPS):
        start = time.perf_counter()
        at = torch.full_like(ids, behind + step)
        with one_token_each(model, pads, behind + step + 1) as mask:
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=at,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        logits.amax().item()  # waits for the accelerator
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
