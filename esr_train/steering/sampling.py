"""Seeded sampling per row: a row draws the same noise whatever else is in its batch.

The Gumbel-max trick: the argmax of log-probabilities plus Gumbel noise is a sample from the distribution. The
noise is a pure function of (row seed, step, vocabulary index), mixed as SplitMix64 does (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014): no generator state that batch mates share.

Caveat: the noise is exact, the logits are not. Matrix products of another batch shape may differ in the last
bits, and where two candidates are that close a draw can flip, after which the rows differ. In float32 this is
rare; in bfloat16 it happens now and then, for greedy decoding just the same.
"""

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
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


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    # torch's >> keeps the sign; SplitMix64 shifts zeros in.
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _offset(step: int | torch.Tensor) -> int | torch.Tensor:
    # Tensors wrap around by themselves.
    return _signed((step + 1) * _GAMMA) if isinstance(step, int) else (step + 1) * _GAMMA


def uniforms(seeds: torch.Tensor, step: int | torch.Tensor, count: int) -> torch.Tensor:
    """Uniform numbers in (0, 1): entry [r, i] depends on `seeds[r]`, its step and i alone.

    Args:
        seeds: [rows] int64.
        step: index of the token to be drawn, from 0; one for all rows, or [rows] int64.
        count: numbers per row (the vocabulary's size).

    Returns:
        [rows, count] float32; small values keep full relative precision.
    """
    start = _mixed(_mixed(seeds + _GAMMA) + _offset(step))
    index = torch.arange(1, count + 1, device=seeds.device)
    bits = _mixed(start[:, None] + index * _GAMMA)
    fraction = (_shifted(bits, 11).to(torch.float32) + 0.5) * 2.0**-53
    return fraction.clamp(max=1 - 2.0**-24)


def gumbels(seeds: torch.Tensor, step: int | torch.Tensor, count: int) -> torch.Tensor:
    """Standard Gumbel noise [rows, count] float32 of `uniforms`."""
    return -torch.log(-torch.log1p(-uniforms(seeds, step, count)))


def row_seeds(seeds: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Python integers of any size as [rows] int64 (their lowest 64 bits)."""
    return torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device)


def warpers(sampling: Sampling) -> LogitsProcessorList:
    """What changes the distribution before a token is drawn, in transformers' own order.

    Args:
        sampling: temperature 0 is greedy: top_p then plays no part.
    """
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature not in (0, 1):
        chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.temperature and sampling.top_p < 1.0:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return chain


class SeededGumbel(LogitsProcessor):
    """Adds each row's Gumbel noise to its scores, so that the argmax is a sample.

    Args:
        seeds: [rows] int64.
        prompt_width: positions of `input_ids` before the first drawn token; gives the step.
    """

    def __init__(self, seeds: torch.Tensor, prompt_width: int) -> None:
        self.seeds, self.prompt_width = seeds, prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [rows, vocabulary] plus noise; -inf stays -inf."""
        noise = gumbels(self.seeds, input_ids.shape[1] - self.prompt_width, scores.shape[1])
        return scores + noise  # type: ignore[return-value]


def processors(sampling: Sampling, seeds: torch.Tensor, prompt_width: int) -> LogitsProcessorList:
    """What turns raw logits into scores whose argmax is the next token.

    Args:
        sampling: temperature 0 is greedy: the seeds then play no part.
        seeds: [rows] int64.
        prompt_width: positions of the (padded) prompts.
    """
    chain = warpers(sampling)
    if sampling.temperature:
        chain.append(SeededGumbel(seeds, prompt_width))
    return chain
