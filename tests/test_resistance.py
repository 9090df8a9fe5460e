"""How much harder an arm must be pushed, and what it kept of ordinary answers: ratios, intervals, censoring."""

import math
from pathlib import Path
from typing import Any

import pytest

from esr_train.steering.engine import Request
from eval.arms import Variant
from eval.calibration import Threshold
from eval.resistance import resistance, thresholds_paired
from eval.retention import CHUNK_REPLIES, Reply, read_replies, reply_store, retention
from tests.trial_maker import made


def threshold(latent: int, norm: float, bound: Any = None) -> Threshold:
    return Threshold(latent, None, norm, 2 * norm, 0.9 * norm, 1.1 * norm, n=20, bound=bound)


def test_the_factor_is_the_geometric_mean_of_own_over_base() -> None:
    base = [threshold(i, 0.4) for i in range(12)]
    own = [threshold(i, 0.4 * (2 if i % 2 else 8)) for i in range(12)]
    found = resistance(thresholds_paired(own, base))
    assert (found.value, found.median, found.n) == (pytest.approx(4), pytest.approx(4), 12)
    assert found.low
    assert found.high
    assert 1 < found.low < 4 < found.high < 16
    assert resistance(thresholds_paired(own[::-1], base)) == found


def test_runs_of_one_direction_are_one_cluster() -> None:
    pairs = [(threshold(i, 0.4 + i / 10), threshold(i, 0.4)) for i in range(10)]
    once, thrice = resistance(pairs), resistance(pairs * 3)
    assert (thrice.n, thrice.low) == (10, pytest.approx(once.low, rel=0.02))


def test_a_threshold_at_the_highest_strength_counts_there_and_is_named_one_of_the_base_is_left_out() -> None:
    pairs = [(threshold(i, 0.8), threshold(i, 0.4)) for i in range(8)]
    pairs += [(threshold(8, 4.0, "high"), threshold(8, 0.4)), (threshold(9, 4.0), threshold(9, 2.0, "high"))]
    found = resistance(pairs)
    assert (found.n, found.at_high, found.at_low, found.median) == (9, 1, 0, pytest.approx(2))
    assert found.value == pytest.approx((2**8 * 10) ** (1 / 9))
    assert resistance([]).value is None


class Reader:
    """Finds every character as likely as e^-1, and says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Request, str]] = []

    def log_probabilities(self, requests: Any, continuations: Any) -> list[tuple[float, ...]]:
        self.asked += zip(requests, continuations, strict=True)
        return [(-1.0,) * len(text) for text in continuations]


def replies(count: int) -> list[Any]:
    return [made(key=f"base/unsteered/{n}", condition="unsteered", response="Fold it.") for n in range(count)]


def test_replies_are_read_once_without_steering_and_with_the_arms_own_words(tmp_path: Path) -> None:
    reader, path = Reader(), tmp_path / "replies.jsonl"
    trials = replies(CHUNK_REPLIES + 3)
    read_replies(reader, Variant("{prompt} Look again."), trials[:CHUNK_REPLIES], reply_store(path))
    assert len(reader.asked) == CHUNK_REPLIES
    read_replies(reader, Variant("{prompt} Look again."), [*trials, made(key="e", response=" ")], reply_store(path))
    assert len(reader.asked) == len(trials) == len(reply_store(path).rows())
    request, text = reader.asked[0]
    assert (request.prompt, request.interventions, text) == ("How do you fold a sheet? Look again.", (), "Fold it.")
    assert reply_store(path).rows()[0] == Reply("base/unsteered/0", "How do you fold a sheet?", 8, -8.0)


def test_the_ratio_of_perplexities_counts_every_token_and_clusters_by_prompt() -> None:
    base = {str(i): Reply(str(i), f"p{i // 2}", 10 + i, -2.0 * (10 + i)) for i in range(24)}
    own = {key: Reply(key, reply.prompt, reply.tokens, -2.1 * reply.tokens) for key, reply in base.items()}
    found = retention(own, base)
    assert found.value == pytest.approx(math.exp(0.1))
    assert found.low == pytest.approx(found.high) == pytest.approx(math.exp(0.1))
    assert found.perplexity == pytest.approx(math.exp(2.1))
    assert (found.n, found.tokens) == (24, sum(range(10, 34)))
    assert retention(base, base).value == 1
    assert retention({}, base).value is None


def test_an_arm_that_lost_on_some_prompts_alone_has_a_wide_interval() -> None:
    base = {str(i): Reply(str(i), f"p{i}", 10, -20.0) for i in range(16)}
    own = {key: Reply(key, reply.prompt, 10, -20.0 - (4 if int(key) % 4 else 0)) for key, reply in base.items()}
    found = retention(own, base)
    assert found.value == pytest.approx(math.exp(0.3))
    assert found.low
    assert found.high
    assert 1.1 < found.low < found.value < found.high < 1.6
