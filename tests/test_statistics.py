"""Intervals that hold on clustered data, and what is said where there is little or nothing to go by."""

import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from eval import statistics
from eval.judging.agreement import kappa, krippendorff_alpha
from eval.power import intra_cluster_correlation, trials_needed
from eval.statistics import Estimate
from eval.store import Trial
from tests.conftest import ROOT
from tests.trial_maker import made


def clustered(
    rng: np.random.Generator, p: float, icc: float, latents: int, per_latent: int
) -> tuple[np.ndarray, list[int]]:
    """Beta-binomial trials: each latent has a rate of its own, on average p; unequal numbers per latent."""
    size = 1 / icc - 1
    rates = rng.beta(p * size, (1 - p) * size, latents)
    cluster = np.repeat(np.arange(latents), np.maximum(1, rng.poisson(per_latent, latents)))
    return (rng.random(len(cluster)) < rates[cluster]).astype(float), cluster.tolist()


def coverage(p: float, icc: float, latents: int, per_latent: int, runs: int, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(runs):
        found = statistics.rate(*clustered(rng, p, icc, latents, per_latent))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= p <= found.high
    return 100 * hits / runs


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.01, 0.05, 0.5])
def test_intervals_cover_the_truth_95_percent_of_the_time_on_clustered_data(p: float) -> None:
    """60 latents, about 20 trials each, intra-cluster correlation 0.1; 4,000 runs have an error of ± 0.7."""
    assert coverage(p, icc=0.1, latents=60, per_latent=20, runs=4000) == pytest.approx(95, abs=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.01, 0.05, 0.5])
@pytest.mark.parametrize(("latents", "per_latent"), [(24, 12), (40, 10)])
def test_small_experiments_err_on_the_wide_side(p: float, latents: int, per_latent: int) -> None:
    """With about three events no interval can cover exactly 95 %: there are too few possible outcomes."""
    assert 93.5 <= coverage(p, icc=0.1, latents=latents, per_latent=per_latent, runs=2000) <= 98.5


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5])
def test_intervals_cover_the_truth_in_a_short_simulation(p: float) -> None:
    assert 92 <= coverage(p, icc=0.1, latents=60, per_latent=20, runs=250, seed=1) <= 98


def test_intervals_that_ignore_clusters_fail_the_same_simulation() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(250):
        events, _ = clustered(rng, 0.5, 0.3, 40, 20)
        low, high = statistics.wilson(events.sum(), len(events))
        hits += low <= 0.5 <= high
    assert hits / 250 < 0.8


@pytest.mark.parametrize("of_means", [True, False])
def test_intervals_of_means_cover_the_truth_with_few_and_with_many_latents(of_means: bool) -> None:
    rng = np.random.default_rng(0)
    latents = 30 if of_means else 5
    hits = 0
    for _ in range(300):
        cluster = np.repeat(np.arange(latents), 6)
        scores = 50 + rng.normal(0, 10, latents)[cluster] + rng.normal(0, 10, len(cluster))
        found = statistics.mean(scores, cluster.tolist())
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 50 <= found.high
    assert 0.92 <= hits / 300 <= 0.985


def test_no_event_still_has_an_upper_bound_that_shrinks_with_n() -> None:
    def high(latents: int) -> float:
        found = statistics.rate(np.zeros(latents * 10), [i // 10 for i in range(latents * 10)])
        assert (found.value, found.low) == (0, 0)
        assert found.high is not None
        return found.high

    assert 0.012 < high(25) < 0.04
    assert 0 < high(250) < high(25) / 5


def test_all_events_mirror_no_events() -> None:
    clusters = [i // 5 for i in range(100)]
    none, all_ = statistics.rate(np.zeros(100), clusters), statistics.rate(np.ones(100), clusters)
    assert all_.high == 1
    assert none.high == pytest.approx(1 - all_.low)  # type: ignore[operator]


def test_nothing_to_count_is_null_and_keeps_the_unscored() -> None:
    assert statistics.rate([], [], unscored=7) == Estimate(None, None, None, 0, 7)
    assert statistics.mean([], [], unscored=7) == Estimate(None, None, None, 0, 7)


def test_one_latent_says_next_to_nothing_however_many_trials_it_has() -> None:
    found = statistics.rate([0.0] * 1000, ["only"] * 1000)
    assert found.high is not None
    assert found.high > 0.9
    assert statistics.mean([30.0] * 1000, ["only"] * 1000) == Estimate(30.0, None, None, 1000)


def test_more_trials_of_the_same_latents_do_not_narrow_an_interval_that_latents_decide() -> None:
    few = statistics.rate([1.0, 0.0] * 10, list(range(20)))
    many = statistics.rate([1.0, 0.0] * 1000, list(range(20)) * 100)
    assert many.low == pytest.approx(few.low)
    assert many.high == pytest.approx(few.high)


def test_the_same_seed_gives_the_same_numbers_and_the_order_of_rows_does_not_matter() -> None:
    events, clusters = clustered(np.random.default_rng(0), 0.3, 0.1, 30, 8)
    order = np.random.default_rng(1).permutation(len(events))
    shuffled = statistics.rate(events[order], [clusters[i] for i in order])
    once = statistics.rate(events, clusters)
    assert once == shuffled
    assert once != statistics.rate(events, clusters, seed=1)


def test_a_steered_trial_clusters_by_latent_and_an_unsteered_one_by_prompt() -> None:
    def trial(prompt: str, latent: int | None) -> Trial:
        cell = {"prompt": prompt, "topic": "t", "latent": latent, "label": None, "strength": None, "seed": 0}
        return made(cell=cell)

    assert statistics.cluster_of(trial("a", 3)) == statistics.cluster_of(trial("b", 3))
    assert statistics.cluster_of(trial("a", None)) != statistics.cluster_of(trial("b", None))
    assert statistics.cluster_of(trial("a", 0)) != statistics.cluster_of(trial("a", None))


def test_values_and_clusters_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values but 3 cluster labels"):
        statistics.rate([0, 1], [1, 2, 3])


def test_wilson_agrees_with_published_values() -> None:
    """Newcombe 1998, table I: 81 of 263 and 1 of 29."""
    assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert statistics.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def test_the_design_effect_is_the_cluster_size_when_clusters_are_all_alike() -> None:
    alike = np.repeat([0.0, 1.0] * 50, 8)
    clusters = np.repeat(np.arange(100), 8).tolist()
    assert statistics.design_effect(alike, clusters) == pytest.approx(8, rel=0.02)
    assert intra_cluster_correlation(alike, clusters) == pytest.approx(1)
    independent = np.random.default_rng(0).random(8000) < 0.5
    assert statistics.design_effect(independent, [i // 8 for i in range(8000)]) < 1.2


def test_the_two_way_bootstrap_is_wider_when_prompts_matter_too() -> None:
    rng = np.random.default_rng(0)
    latents, prompts = np.repeat(np.arange(20), 20), np.tile(np.arange(20), 20)
    scores = 50 + rng.normal(0, 20, 20)[prompts] + rng.normal(0, 5, 400)
    one = statistics.mean(scores, latents.tolist())
    low, high = statistics.two_way_interval(scores, latents.tolist(), prompts.tolist())
    assert low is not None
    assert high is not None
    assert one.low is not None
    assert one.high is not None
    assert high - low > 3 * (one.high - one.low)
    assert statistics.two_way_interval([1.0, 2.0], ["a", "a"], ["p", "q"]) == (None, None)


def test_pairing_removes_what_the_cells_share() -> None:
    rng = np.random.default_rng(0)
    clusters = [i // 10 for i in range(200)]
    hard = rng.normal(0, 30, 200)
    base, tuned = hard + rng.normal(0, 1, 200), hard + 5 + rng.normal(0, 1, 200)
    found = statistics.paired(tuned - base, clusters)
    assert found.low is not None
    assert found.high is not None
    assert 4.5 < found.low < 5 < found.high < 5.5


def test_arms_that_differ_nowhere_still_leave_room_for_a_difference_of_rates() -> None:
    clusters = [i // 10 for i in range(300)]
    found = statistics.paired([0.0] * 300, clusters, of_rates=True)
    assert found.value == 0
    assert found.high is not None
    assert found.low == -found.high
    assert 0.005 < found.high < 0.03


def test_one_differing_cell_does_not_break_the_paired_interval() -> None:
    found = statistics.paired([1.0] + [0.0] * 299, [i // 10 for i in range(300)], of_rates=True)
    assert found.low is not None
    assert found.high is not None
    assert -0.02 < found.low < 0 < found.high < 0.03


@pytest.mark.parametrize("latents", [10, 30])
def test_the_sign_flip_test_rejects_a_true_null_as_often_as_it_says(latents: int) -> None:
    rng = np.random.default_rng(0)
    clusters = [i // 4 for i in range(latents * 4)]
    values = [
        statistics.sign_flip(rng.normal(0, 1, latents)[clusters] + rng.normal(0, 1, latents * 4), clusters, 500)
        for _ in range(300)
    ]
    rejected = [value is not None and value <= 0.05 for value in values]
    assert 0.02 <= np.mean(rejected) <= 0.085


def test_the_sign_flip_test_sees_a_difference_and_is_exact_for_few_latents() -> None:
    assert statistics.sign_flip([1.0] * 5, list(range(5))) == pytest.approx(2 / 32)
    assert statistics.sign_flip([1.0] * 40, list(range(40))) == pytest.approx(1 / 10_001)
    assert statistics.sign_flip([0.0] * 40, list(range(40))) == 1
    assert statistics.sign_flip([1.0, 1.0], ["a", "a"]) is None


def test_holms_adjustment_agrees_with_a_worked_example() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []


def test_the_two_way_bootstrap_is_the_weighted_mean_over_trials() -> None:
    """Against the definition: every trial weighs as often as its latent times as often as its prompt is drawn."""
    rng = np.random.default_rng(1)
    latents, prompts, values = rng.integers(0, 6, 50), rng.integers(0, 4, 50), rng.normal(size=50)
    found = statistics.two_way_interval(values, latents.tolist(), prompts.tolist(), 400)
    weights = statistics._resamples(6, 400, 0)[:, latents] * statistics._resamples(4, 400, 1)[:, prompts]
    drawn = weights.sum(axis=1)
    means = (weights @ values)[drawn > 0] / drawn[drawn > 0]
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_the_power_table_agrees_with_a_simulation() -> None:
    n = trials_needed(0.1, 0.25, icc=0.1, per_cluster=10)
    assert n % 10 == 0
    rng, found = np.random.default_rng(0), 0
    for _ in range(300):
        shares = [_cluster_rates(rng, p, n // 10) for p in (0.1, 0.25)]
        error = math.sqrt(sum(share.var(ddof=1) / len(share) for share in shares))
        found += abs(shares[0].mean() - shares[1].mean()) > 1.96 * error
    assert 0.72 <= found / 300 <= 0.88


def _cluster_rates(rng: np.random.Generator, p: float, clusters: int) -> np.ndarray:
    return rng.binomial(10, rng.beta(p * 9, (1 - p) * 9, clusters)) / 10


def test_clustering_and_small_differences_cost_trials() -> None:
    independent = trials_needed(0.01, 0.05, icc=0, per_cluster=10)
    assert 280 <= independent <= 300
    assert trials_needed(0.01, 0.05, icc=0.1, per_cluster=10) == pytest.approx(1.9 * independent, rel=0.05)
    assert trials_needed(0.01, 0.02, icc=0, per_cluster=10) > 5 * independent
    with pytest.raises(ValueError, match="must differ"):
        trials_needed(0.1, 0.1, icc=0, per_cluster=10)


def test_alpha_agrees_with_krippendorffs_worked_example() -> None:
    """Krippendorff 2011, data D: four observers, twelve units, gaps; nominal 0.743, interval 0.849."""
    gap = math.nan
    ratings: Sequence[Sequence[float]] = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, gap, gap, gap],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, gap, 3],
        [gap, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, gap],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, gap],
    ]
    assert krippendorff_alpha(ratings, interval=False) == pytest.approx(0.743, abs=1e-3)
    assert krippendorff_alpha(ratings) == pytest.approx(0.849, abs=1e-3)


def test_alpha_is_undefined_without_overlap_or_variation() -> None:
    assert krippendorff_alpha([[1, math.nan], [math.nan, 2]]) is None
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None


def test_kappa_comes_with_its_prevalence() -> None:
    """Two judges, 50 items: 20 both yes, 15 both no, 5 and 10 split (kappa 0.4)."""
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = kappa([*first, None], [*second, True])
    assert found.kappa == pytest.approx(0.4)
    assert (found.agreement, found.n) == (0.7, 50)
    assert found.prevalence == pytest.approx(0.55)
    assert kappa([True, True], [True, True]).kappa is None
    assert kappa([None], [True]).n == 0


def test_the_interval_of_a_mean_does_not_pass_the_values_there_can_be():
    scores, clusters = [100.0] * 59 + [60.0], [number // 4 for number in range(60)]
    free, bounded = statistics.mean(scores, clusters), statistics.mean(scores, clusters, bounds=(0, 100))
    assert free.high > 100
    assert bounded.high == 100
    assert bounded.low == free.low


def test_the_interval_of_a_mean_that_few_directions_carry_does_not_reach_across_the_scale():
    """Many resamples miss the three that vary: what these say of the spread, studentised, has no size."""
    scored = {"a": [45.0] * 5, "b": [30.0] * 4, "c": [50.0] * 4, **{f"slight {n}": [2.0] for n in range(6)}}
    scored |= {f"silent {n}": [0.0] for n in range(44)}
    clusters = [name for name, scores in scored.items() for _ in scores]
    found = statistics.mean([score for scores in scored.values() for score in scores], clusters, bounds=(0, 100))
    assert found.value < 10
    assert 0 <= found.low < found.value < found.high < 20


def test_a_difference_of_rates_never_leaves_what_rates_allow():
    found = statistics.paired([1.0] * 9 + [0.0, 0.0], list(range(11)), of_rates=True, bounds=(-1, 1))
    assert found.low is not None
    assert 0.4 < found.low < found.value < found.high == 1.0


def test_an_interval_for_a_notebook_is_that_of_a_rate_or_a_mean_in_plain_floats() -> None:
    rng = np.random.default_rng(0)
    events, clusters = clustered(rng, 0.3, 0.2, 20, 10)
    scores = 50 + rng.normal(0, 10, len(clusters))
    for values, found in ((events, statistics.rate(events, clusters)), (scores, statistics.mean(scores, clusters))):
        ends = statistics.cluster_interval(values, np.array(clusters))
        assert ends == (found.low, found.high)
        assert [type(end) for end in ends] == [float, float]
    assert statistics.cluster_interval([30.0, 40.0], ["only", "only"]) == (None, None)
    assert statistics.cluster_interval([], []) == (None, None)
    with pytest.raises(ValueError, match="not finite: leave unscored trials out"):
        statistics.cluster_interval([1.0, math.nan], [1, 2])


def test_the_front_door_has_what_it_names_and_loads_nothing_by_itself() -> None:
    told = "import sys, eval; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    told += "; print([getattr(eval, name).__name__ for name in eval.__all__] == eval.__all__)"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True"]
