"""Monitors as numbers: the probe finds a planted direction, a threshold keeps its promise, detection counts."""

import numpy as np
import pytest

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


def test_a_threshold_lets_no_more_unsteered_replies_pass_than_was_asked():
    passed = []
    for _ in range(300):
        peaks = RNG.normal(size=300)
        passed.append((RNG.normal(size=300) > level(peaks.tolist(), 0.05)).mean())
    assert 0.04 < np.mean(passed) < 0.0505
    assert level([float(n) for n in range(99)], 0.01) == 98
    with pytest.raises(InputError, match="98 unsteered replies cannot tell"):
        level([0.0] * 98, 0.01)


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
