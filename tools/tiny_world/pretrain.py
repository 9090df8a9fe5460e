"""Train a tiny model from scratch on the world's exchanges."""

import math
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tools.tiny_world.architecture import build_model
from tools.tiny_world.language import Exchange

LEARNING_RATE = 6e-3
WEIGHT_DECAY = 1.0
"""High, so that the first layer's output does not outgrow what later layers add to the residual stream."""
WARM_UP = 50
BATCH_TOKENS = 1024


def encode_exchanges(tokenizer: PreTrainedTokenizerFast, made: list[Exchange]) -> list[list[int]]:
    """Every exchange as one rendered conversation, tokenised once."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": each.prompt}, {"role": "assistant", "content": each.reply}],
            tokenize=False,
        )
        for each in made
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def train_model(
    family: str, tokenizer: PreTrainedTokenizerFast, lessons: list[list[list[int]]], seed: int
) -> PreTrainedModel:
    """Train on all tokens with AdamW (cosine schedule, bf16 autocast); returns the float32 model in eval mode.

    Args:
        family: `llama` or `gemma`.
        tokenizer: the model's.
        lessons: rows of token ids, one list a lesson; lessons are taken in order, once.
        seed: of the weights and the order of the batches.
    """
    torch.manual_seed(seed)
    model = build_model(family, tokenizer).train()
    optimizer = torch.optim.AdamW(_groups(model), lr=LEARNING_RATE, betas=(0.9, 0.98))
    batches = [batch for rows in lessons for batch in _batches(rows, seed)]
    bar = tqdm(batches, desc=f"{family} model", unit="step", mininterval=2)
    for step, batch in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step, len(batches))
        input_ids, mask = _padded(batch, tokenizer.pad_token_id)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            labels = input_ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def _groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Matrices decay; embeddings decay less, norms not at all."""
    embedding = model.get_input_embeddings().weight
    rest = [each for each in model.parameters() if each is not embedding]
    return [
        {"params": [embedding], "weight_decay": 0.1},
        {"params": [each for each in rest if each.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [each for each in rest if each.dim() == 1], "weight_decay": 0.0},
    ]


def _schedule(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(steps - WARM_UP, 1)))


def _batches(rows: list[list[int]], seed: int) -> Iterator[list[list[int]]]:
    """Batches of about `BATCH_TOKENS` tokens, rows of like length together, in random order."""
    rng = Random(seed)
    batches: list[list[list[int]]] = [[]]
    for row in sorted(rows, key=lambda row: len(row) + rng.random()):
        if (len(batches[-1]) + 1) * len(row) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    rng.shuffle(batches)
    yield from batches


def _padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return input_ids, mask
