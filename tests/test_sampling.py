"""Seeded sampling: distribution, independence of the batch, reproducibility."""

import math

import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from esr_train.steering.engine import Sampling
from esr_train.steering.sampling import BLOCK, next_tokens, row_seeds, uniforms

WIDE = 4 * BLOCK + 37
"""A vocabulary of several blocks, the last one shorter."""


def numbers(seeds: torch.Tensor, step: int, count: int) -> torch.Tensor:
    return uniforms(seeds, torch.full_like(seeds, step), torch.arange(count)[None])


def test_the_bits_are_those_of_splitmix64():
    """The generator's published first outputs for seed 1234567, through the same mixing function."""
    from esr_train.steering.sampling import _GAMMA, _mixed, _signed

    state = torch.tensor([1234567])
    found = [int(_mixed(state + _signed(n * _GAMMA))) % 2**64 for n in (1, 2, 3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_are_uniform_over_the_index_over_steps_and_over_seeds():
    one = row_seeds([7], "cpu")
    samples = [
        numbers(one, 0, 20_000).flatten(),
        torch.cat([numbers(one, step, 1).flatten() for step in range(5_000)]),
        numbers(row_seeds(range(20_000), "cpu"), 3, 1).flatten(),
    ]
    for sample in samples:
        counts = torch.histc(sample, bins=50, min=0, max=1)
        assert chisquare(counts.numpy()).pvalue > 1e-3
        assert kstest(sample.numpy(), "uniform").pvalue > 1e-3
        assert sample.min() > 0
        assert sample.max() < 1


def test_neighbouring_steps_and_seeds_are_uncorrelated():
    seeds = row_seeds(range(2), "cpu")
    noise = torch.cat([numbers(seeds, step, 10_000) for step in range(2)])
    off_diagonal = torch.corrcoef(noise) - torch.eye(4)
    assert off_diagonal.abs().max() < 4 / math.sqrt(10_000)


def drawn(logits: torch.Tensor, seeds: list[int], sampling: Sampling, step: int = 0) -> list[int]:
    """A token for each seed from the same logits [vocabulary]; token 3 is all that came before."""
    rows = logits.expand(len(seeds), -1)
    ids, steps = torch.full((len(seeds), 2), 3), torch.full((len(seeds),), step)
    return next_tokens(rows, ids, sampling, row_seeds(seeds, "cpu"), steps).tolist()


def spread(size: int, number: int = 0) -> torch.Tensor:
    return 2.5 * torch.randn(size, generator=torch.Generator().manual_seed(number))


def ruled_out(logits: torch.Tensor) -> torch.Tensor:
    """With tokens that cannot be drawn: one whole block, and every third token of another."""
    logits = logits.clone()
    logits[BLOCK : 2 * BLOCK] = -torch.inf
    logits[2 * BLOCK : 3 * BLOCK : 3] = -torch.inf
    return logits


@pytest.mark.parametrize(
    ("logits", "sampling"),
    [
        (spread(5), Sampling(0.7)),
        (spread(BLOCK), Sampling(1.0)),
        (spread(WIDE), Sampling(0.6)),
        (spread(WIDE, 1).bfloat16(), Sampling(1.0)),
        (0.1 * spread(WIDE), Sampling(1.0)),
        (ruled_out(spread(WIDE, 2)), Sampling(1.3)),
        (ruled_out(spread(WIDE, 3)), Sampling(0.8, top_p=0.9)),
        (spread(WIDE, 4), Sampling(0.9, top_p=0.7, repetition_penalty=1.5)),
    ],
)
def test_tokens_are_samples_from_the_distribution_that_transformers_warpers_leave(logits, sampling):
    count = 20_000
    ids, scores = torch.full((1, 2), 3), logits.double()[None]
    for warper in (
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
        TopPLogitsWarper(sampling.top_p),
    ):
        scores = warper(ids, scores)
    expected = scores[0].softmax(-1) * count
    found = torch.cat([torch.tensor(drawn(logits, list(range(n, n + 5000)), sampling)) for n in range(0, count, 5000)])
    counts = torch.bincount(found, minlength=len(logits)).double()
    assert counts[expected == 0].sum() == 0
    # Rare tokens together: the test wants some of each.
    often = expected > 8
    pairs = torch.stack([counts, expected])
    common, rare = pairs[:, often], pairs[:, ~often].sum(1, keepdim=True)
    observed, wanted = torch.cat([common, rare], 1) if rare[1] > 8 else common * (count / common.sum(1, keepdim=True))
    assert chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


def test_the_token_drawn_within_a_block_does_not_depend_on_the_noise_that_drew_the_block():
    """Two blocks of two tokens each, all alike: four equal cells over seeds and over steps."""
    logits = torch.full((2 * BLOCK,), -torch.inf)
    logits[[0, 1, BLOCK, BLOCK + 1]] = 0.0
    rows, ids, count = logits.expand(20_000, -1), torch.zeros(20_000, 1, dtype=torch.long), torch.arange(20_000)
    for seeds, steps in ((count, torch.zeros_like(count)), (torch.full_like(count, 5), count)):
        found = next_tokens(rows, ids, Sampling(1.0), seeds, steps)
        counts = torch.bincount(found)[[0, 1, BLOCK, BLOCK + 1]]
        assert counts.sum() == len(found)
        assert chisquare(counts.numpy()).pvalue > 1e-3


def test_a_row_draws_the_same_whatever_is_beside_it():
    logits = spread(WIDE)
    together = drawn(logits, [5, 6, 7, 8], Sampling(1.0))
    assert together == [drawn(logits, [seed], Sampling(1.0))[0] for seed in (5, 6, 7, 8)]
    assert len(set(together)) > 1


def test_rows_at_steps_of_their_own_draw_what_they_would_alone():
    rows, seeds, steps = torch.stack([spread(WIDE, n) for n in range(3)]), row_seeds([5, 5, 6], "cpu"), [0, 7, 2]
    ids, sampling = torch.zeros(3, 1, dtype=torch.long), Sampling(1.5)
    together = next_tokens(rows, ids, sampling, seeds, torch.tensor(steps)).tolist()
    assert together == [
        drawn(row, [int(seed)], sampling, step)[0] for row, seed, step in zip(rows, seeds, steps, strict=True)
    ]


def test_the_same_seed_mostly_draws_the_same_token_from_a_similar_distribution():
    """What pairs arms: independent draws from these two agree in every thirtieth case or so."""
    one, two = spread(WIDE), spread(WIDE) + 0.05 * spread(WIDE, 1)
    pairs = [
        torch.tensor(drawn(one, seeds, Sampling(1.0))) == torch.tensor(drawn(two, other, Sampling(1.0)))
        for seeds, other in ((list(range(4000)), list(range(4000))), (list(range(4000)), list(range(4000, 8000))))
    ]
    assert pairs[0].float().mean() > 0.85
    assert pairs[1].float().mean() < 0.2


def test_seeds_of_any_size_are_taken():
    noise = numbers(row_seeds([-1, 2**63, 2**64 + 5, 5], "cpu"), 0, 8)
    assert torch.isfinite(noise).all()
    assert torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[0], noise[1])


def test_top_p_leaves_the_tail_out_and_temperature_zero_is_greedy():
    logits = torch.tensor([3.0, 2.9, -2.0, -2.0, -2.0])
    assert set(drawn(logits, list(range(500)), Sampling(1.0, top_p=0.8))) == {0, 1}
    assert set(drawn(logits, list(range(500)), Sampling(1.0))) > {0, 1}
    assert set(drawn(logits, list(range(50)), Sampling(0.0, top_p=0.8))) == {0}


def test_greedy_takes_the_first_of_equal_logits_as_an_argmax_does():
    logits = spread(WIDE)
    logits[[700, 20, 900, WIDE - 1]] = 99.0
    assert drawn(logits, [0], Sampling(0.0)) == [20]
    logits[[700, 20, 900]] = 0.0
    assert drawn(logits, [0], Sampling(0.0)) == [WIDE - 1]


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_whose_logits_are_not_finite_draws_nothing_and_its_neighbour_does(value, temperature):
    rows = torch.stack([spread(WIDE), spread(WIDE)])
    rows[0, slice(None) if value == float("-inf") else 700] = value
    found = next_tokens(
        rows,
        torch.zeros(2, 1, dtype=torch.long),
        Sampling(temperature),
        row_seeds([1, 2], "cpu"),
        torch.zeros(2).long(),
    )
    assert found[0] == -1
    assert found[1] == drawn(spread(WIDE), [2], Sampling(temperature))[0]


def test_the_repetition_penalty_weighs_down_what_is_already_there():
    logits = torch.tensor([1.0, 1.5, 0.0, 2.0])
    assert drawn(logits, [0], Sampling(0.0)) == [3]
    assert drawn(logits, [0], Sampling(0.0, repetition_penalty=2.0)) == [1]
