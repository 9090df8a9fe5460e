"""Monitors as numbers: the probe finds a planted direction, a threshold keeps its promise, detection counts."""

import numpy as np
import pytest
from scipy.stats import beta, norm

from esr_train.errors import InputError
from eval.monitoring import Followed, area, detection, fit_probe, level

RNG = np.random.default_rng(0)


def planted(push: float, tokens: int = 600, width: int = 24) -> tuple[np.ndarray, np.ndarray, list[int], np.ndarray]:
    """Tokens of eight directions; half of each are pushed along one axis of their own and one that all share."""
    groups, steered = np.arange(tokens) % 8, (np.arange(tokens) // 8) % 2 == 0
    states = RNG.normal(size=(tokens, width)) * np.linspace(0.5, 4, width)
    shared = np.zeros(width)
    shared[3] = 1
    states[steered] += push * shared
    states[np.flatnonzero(steered), 10 + groups[steered]] += 6
    return states.astype(np.float32), steered, groups.tolist(), shared


def test_the_probe_finds_what_all_directions_share():
    states, steered, groups, shared = planted(6.0)
    probe = fit_probe(states, steered, groups)
    assert probe.auc > 0.97
    fresh, pushed, _, _ = planted(6.0)
    assert area(fresh[~pushed] @ probe.weights, fresh[pushed] @ probe.weights) > 0.97
    assert abs(probe.weights @ shared) == max(abs(probe.weights))


def test_what_only_directions_that_were_seen_share_is_not_believed():
    states, steered, groups, _ = planted(0.0)
    probe = fit_probe(states, steered, groups)
    assert probe.auc < 0.7


def test_a_probe_needs_both_kinds_of_tokens():
    with pytest.raises(InputError, match="of steered and of unsteered"):
        fit_probe(np.ones((4, 2), np.float32), np.ones(4, bool), [1, 2, 3, 4])


def test_one_threshold_in_twenty_lets_more_unsteered_replies_pass_than_was_asked():
    shares = np.array([norm.sf(level(RNG.normal(size=400).tolist(), 0.05)) for _ in range(2000)])
    assert 0.02 < (shares > 0.05).mean() < 0.055
    assert shares.mean() > 0.03, "no more careful than that takes"


def test_as_many_replies_pass_as_the_upper_bound_of_their_share_allows():
    replies = [float(n) for n in range(400)]
    for share, passing in ((0.01, 0), (0.02, 3), (0.05, 12)):
        assert level(replies, share) == 399 - passing
        upper = [beta.ppf(0.95, k + 1, 400 - k) for k in (passing, passing + 1)]
        assert upper[0] <= share < upper[1]


def test_a_share_that_too_few_replies_cannot_tell_is_refused():
    assert level([float(n) for n in range(299)], 0.01) == 298
    with pytest.raises(InputError, match="298 unsteered replies cannot tell") as refused:
        level([0.0] * 298, 0.01)
    assert "Ask for 0.011 or more" in str(refused.value)


def test_the_area_counts_ties_half():
    assert area(np.array([0.0, 1.0]), np.array([1.0, 2.0])) == pytest.approx(0.875)


def reply(steered: bool, scores: list[float], off_topic: bool = False, **events: int) -> Followed:
    return Followed(np.array(scores), steered, (steered, len(scores)), off_topic, events)


def test_detection_counts_alarms_and_how_long_before_an_event_they_came():
    found = detection(
        "probe",
        1.0,
        [
            reply(False, [0, 0.5]),
            reply(False, [0, 2.0, 0]),
            reply(True, [0, 2.0, 0, 0, 0], True, restart=4),
            reply(True, [0, 0, 0, 3.0], True, restart=2),
            reply(True, [0, 0.2, 0]),
        ],
    )
    assert (found.false_alarms.value, found.caught.value, found.caught_off_topic.value) == (0.5, 2 / 3, 1.0)
    assert found.alarm_token.value == 2
    (lead,) = found.leads
    assert (lead.event, lead.before.value, lead.before.n, lead.tokens.value) == ("restart", 0.5, 2, 3)
    assert found.reply_auc == pytest.approx((0.5 + 1 + 1 + 1 + 0 + 0) / 6)
    assert (found.roc[0], found.roc[-1]) == ((0, 0), (1, 1))


def test_detection_needs_both_kinds_of_replies():
    with pytest.raises(InputError, match="steered and unsteered"):
        detection("probe", 1.0, [reply(True, [1.0])])
