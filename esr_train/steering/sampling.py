"""Seeded sampling per row: a row draws the same noise whatever else is in its batch, and whichever engine runs.

The Gumbel-max trick in two levels: the vocabulary is cut into blocks of `BLOCK` ids; the block that is drawn is the
argmax of log P(block) plus Gumbel noise, and the token the argmax of log P(token) plus other Gumbel noise within that
block. Both draws are exact, so the token is a sample from the whole distribution, and noise is needed for the blocks
and for one block's tokens instead of for the whole vocabulary. Rows with the same seed and similar distributions
mostly draw the same token, as with noise over the whole vocabulary (benchmarks/results/generate.md).

The noise is a pure function of (row seed, step, block or vocabulary index), mixed as SplitMix64 does (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014): no generator state that batch mates share.

Caveat: the noise is exact, the logits are not. Matrix products of another batch shape may differ in the last
bits, and where two candidates are that close a draw can flip, after which the rows differ. In float32 this is
rare; in bfloat16 it happens now and then, for greedy decoding just the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.nn import functional
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from esr_train.steering.engine import Sampling


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)
BLOCK = 256
"""Vocabulary ids of a block. What is drawn from a seed depends on it."""
_BLOCKS_FROM = 1 << 32
"""Index from which on the blocks' noise is numbered: behind every vocabulary."""
_ABOVE = math.log(BLOCK) + 0.01
"""How far a block's logsumexp can lie above its largest score; rounding included."""

LEAST_TEMPERATURE = 1e-6
"""Below it the draw is greedy: logits divided by less leave no room for the noise in float32, and then overflow."""


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    # torch's >> keeps the sign; SplitMix64 shifts zeros in.
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def uniforms(seeds: torch.Tensor, steps: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1): entry [r, i] depends on `seeds[r]`, `steps[r]` and `index[r, i]` alone.

    Args:
        seeds: [rows] int64.
        steps: [rows] int64, the index of the token to be drawn, from 0.
        index: [rows or 1, numbers] int64.

    Returns:
        [rows, numbers] float32; small values keep full relative precision.
    """
    start = _mixed(_mixed(seeds + _GAMMA) + (steps + 1) * _GAMMA)
    bits = _mixed(start[:, None] + index * _GAMMA)
    fraction = (_shifted(bits, 11).to(torch.float32) + 0.5) * 2.0**-53
    return fraction.clamp(max=1 - 2.0**-24)


def row_seeds(seeds: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Python integers of any size as [rows] int64 (their lowest 64 bits)."""
    return torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device)


def filled_up(texts: Sequence[Sequence[int]], device: torch.device | str) -> torch.Tensor:
    """Texts of token ids as [rows, longest]; a repetition penalty sees no token that a row would not have alone."""
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[text[0]] * (longest - len(text))] for text in texts], device=device)


def next_tokens(
    logits: torch.Tensor, ids: torch.Tensor, sampling: Sampling, seeds: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """The next token of every row.

    Args:
        logits: [rows, vocabulary], of any floating type. Minus infinity is a token that the model rules out; a row's
            largest one must be a number.
        ids: [rows, positions], the tokens that a repetition penalty looks at.
        sampling: temperature 0, or one below `LEAST_TEMPERATURE`, is greedy: seeds and top_p then play no part.
        seeds: [rows] int64.
        steps: [rows] int64, tokens that each row has drawn before.

    Returns:
        [rows] int64; -1 where a row's logits are not finite.
    """
    if sampling.temperature < LEAST_TEMPERATURE:
        sampling = replace(sampling, temperature=0.0)
    blocks = _in_blocks(_warped(logits, ids, sampling))
    largest = blocks.amax(-1).float()
    drawn = _Drawn(sampling.temperature, seeds, steps) if sampling.temperature else None
    block = largest.argmax(-1) if drawn is None else drawn.blocks(blocks, largest)
    scores = blocks[torch.arange(len(blocks), device=blocks.device), block]
    token = scores.argmax(-1) if drawn is None else drawn.tokens(scores, block)
    return torch.where(largest.amax(-1).isfinite(), block * BLOCK + token, -1)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Draws at a temperature, for rows' seeds and steps."""

    temperature: float
    seeds: torch.Tensor
    steps: torch.Tensor

    def blocks(self, blocks: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        """The block of every row, [rows], whose log-probability plus noise is largest.

        A block's logsumexp lies between its largest score and log(BLOCK) above that: it is worked out only for the
        blocks that can still win.

        Args:
            blocks: logits [rows, blocks, BLOCK].
            largest: of every block, [rows, blocks] float32.
        """
        number = torch.arange(_BLOCKS_FROM, _BLOCKS_FROM + largest.shape[1], device=largest.device)
        noise = self._gumbels(number[None])
        at_least = largest / self.temperature + noise
        chosen = (at_least + _ABOVE >= at_least.amax(-1, keepdim=True)).nonzero(as_tuple=True)
        scores = torch.full_like(noise, -torch.inf)
        scores[chosen] = (blocks[chosen].float() / self.temperature).logsumexp(-1) + noise[chosen]
        return scores.argmax(-1)

    def tokens(self, scores: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """The token within each row's block, [rows]; `scores` are that block's logits [rows, BLOCK]."""
        index = block[:, None] * BLOCK + torch.arange(BLOCK, device=scores.device)
        return (scores.float() / self.temperature + self._gumbels(index)).argmax(-1)

    def _gumbels(self, index: torch.Tensor) -> torch.Tensor:
        return -torch.log(-torch.log1p(-uniforms(self.seeds, self.steps, index)))


def _in_blocks(logits: torch.Tensor) -> torch.Tensor:
    """Logits [rows, blocks, BLOCK]; where the vocabulary's size is no multiple, the last ones are minus infinity."""
    short = -logits.shape[1] % BLOCK
    whole = functional.pad(logits, (0, short), value=-torch.inf) if short else logits
    return whole.unflatten(1, (-1, BLOCK))


def _warped(logits: torch.Tensor, ids: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits, before the temperature, as a repetition penalty and top_p leave them: in transformers' own order."""
    if sampling.repetition_penalty != 1.0:
        penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
        logits = penalty(cast(torch.LongTensor, ids), cast(torch.FloatTensor, logits.float()))
    if sampling.temperature and sampling.top_p < 1.0:
        scores = cast(torch.FloatTensor, logits.float() / sampling.temperature)
        kept = TopPLogitsWarper(sampling.top_p)(cast(torch.LongTensor, ids), scores)
        logits = logits.masked_fill(kept == -torch.inf, -torch.inf)
    return logits
