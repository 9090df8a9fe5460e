"""Seeded sampling: distribution, independence of the batch, reproducibility."""

import math

import torch
from scipy.stats import chisquare, kstest

from esr_train.steering.engine import Sampling
from esr_train.steering.sampling import gumbels, processors, row_seeds, uniforms


def test_the_bits_are_those_of_splitmix64():
    """The generator's published first outputs for seed 1234567, through the same mixing function."""
    from esr_train.steering.sampling import _GAMMA, _mixed, _signed

    state = torch.tensor([1234567])
    found = [int(_mixed(state + _signed(n * _GAMMA))) % 2**64 for n in (1, 2, 3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_are_uniform_over_the_vocabulary_over_steps_and_over_seeds():
    one = row_seeds([7], "cpu")
    samples = [
        uniforms(one, 0, 20_000).flatten(),
        torch.cat([uniforms(one, step, 1).flatten() for step in range(5_000)]),
        uniforms(row_seeds(range(20_000), "cpu"), 3, 1).flatten(),
    ]
    for sample in samples:
        counts = torch.histc(sample, bins=50, min=0, max=1)
        assert chisquare(counts.numpy()).pvalue > 1e-3
        assert kstest(sample.numpy(), "uniform").pvalue > 1e-3
        assert sample.min() > 0
        assert sample.max() < 1


def test_neighbouring_steps_and_seeds_are_uncorrelated():
    seeds = row_seeds(range(2), "cpu")
    noise = torch.cat([uniforms(seeds, step, 10_000) for step in range(2)])
    off_diagonal = torch.corrcoef(noise) - torch.eye(4)
    assert off_diagonal.abs().max() < 4 / math.sqrt(10_000)


def drawn(logits: torch.Tensor, seeds: list[int], sampling: Sampling, width: int = 3) -> list[int]:
    rows = logits.expand(len(seeds), -1)
    ids = torch.zeros(len(seeds), width, dtype=torch.long)
    return processors(sampling, row_seeds(seeds, "cpu"), width)(ids, rows).argmax(-1).tolist()


def test_the_argmax_of_noisy_logits_is_a_sample_from_the_softmax():
    logits, temperature = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]), 0.7
    found = torch.bincount(torch.tensor(drawn(logits, list(range(20_000)), Sampling(temperature))), minlength=5)
    expected = torch.softmax(logits.double() / temperature, 0) * 20_000
    assert chisquare(found.numpy(), expected.numpy()).pvalue > 1e-3


def test_a_row_draws_the_same_whatever_is_beside_it():
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0))
    together = drawn(logits, [5, 6, 7, 8], Sampling(1.0))
    assert together == [drawn(logits, [seed], Sampling(1.0))[0] for seed in (5, 6, 7, 8)]
    assert len(set(together)) > 1


def test_seeds_of_any_size_are_taken():
    noise = gumbels(row_seeds([-1, 2**63, 2**64 + 5, 5], "cpu"), 0, 8)
    assert torch.isfinite(noise).all()
    assert torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[0], noise[1])


def test_top_p_leaves_the_tail_out_and_temperature_zero_is_greedy():
    logits = torch.tensor([3.0, 2.9, -2.0, -2.0, -2.0])
    assert set(drawn(logits, list(range(500)), Sampling(1.0, top_p=0.8))) == {0, 1}
    assert set(drawn(logits, list(range(500)), Sampling(1.0))) > {0, 1}
    assert set(drawn(logits, list(range(50)), Sampling(0.0, top_p=0.8))) == {0}


def test_the_repetition_penalty_weighs_down_what_is_already_there():
    logits = torch.tensor([1.0, 2.0, 1.5])
    chain = processors(Sampling(0.0, repetition_penalty=2.0), row_seeds([0], "cpu"), 1)
    assert chain(torch.tensor([[1]]), logits[None]).argmax().item() == 2
