"""Monitors: a linear probe fitted on tokens, the level at which one sounds, and how well it tells replies apart."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esr_train.errors import InputError
from esr_train.steering.monitor import first_alarm
from eval.statistics import Estimate, mean, rate

Floats = NDArray[np.float64]
PENALTIES = (1e-3, 1e-2, 0.1, 1.0)
"""Of the mean log loss, on standardised states; which one, held-out directions decide."""
FOLDS = 4
UNSURE = 0.05
"""How often a threshold may let more unsteered replies pass than was wanted."""
POINTS = 200
"""Of a ROC curve that is kept."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe: w · h is larger at tokens of steered replies.

    Args:
        weights: [d_model].
        penalty: that held-out directions chose.
        auc: per token, on directions that were held out in turn.
    """

    weights: Floats
    penalty: float
    auc: float


def fit_probe(states: NDArray[np.float32], steered: NDArray[np.bool_], groups: Sequence[Hashable]) -> Probe:
    """Logistic regression with an L2 penalty, both classes of equal weight.

    Args:
        states: residual states, [tokens, d_model].
        steered: whether each token is of a steered reply, [tokens].
        groups: the direction of each token's cell; the penalty is chosen on groups that were left out.

    Raises:
        InputError: without tokens of both kinds.
    """
    if not steered.any() or steered.all():
        raise InputError("a probe needs tokens of steered and of unsteered replies", "monitor fit")
    centre, spread = states.mean(0), np.maximum(states.std(0), 1e-6)
    x = (states - centre) / spread
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    fold = np.array([order[group] for group in groups]) % min(FOLDS, max(len(order), 1))
    held_out = {penalty: _held_out_auc(x, steered, fold, penalty) for penalty in PENALTIES}
    penalty = max(PENALTIES, key=lambda each: held_out[each])
    return Probe(_logistic(x, steered, penalty) / spread.astype(np.float64), penalty, held_out[penalty])


def _held_out_auc(x: NDArray[np.float32], steered: NDArray[np.bool_], fold: NDArray[np.int64], penalty: float) -> float:
    found = []
    for number in range(int(fold.max()) + 1):
        inside, outside = fold != number, fold == number
        if len({*steered[inside].tolist()}) == len({*steered[outside].tolist()}) == 2:
            scores = x[outside] @ _logistic(x[inside], steered[inside], penalty).astype(np.float32)
            found.append(area(scores[~steered[outside]], scores[steered[outside]]))
    return float(np.mean(found)) if found else 0.5


def _logistic(x: NDArray[np.float32], steered: NDArray[np.bool_], penalty: float) -> Floats:
    """Weights [d_model] of a logistic regression whose intercept is not penalised."""
    from scipy.optimize import minimize

    sign = np.where(steered, 1.0, -1.0)
    weight = np.where(steered, 0.5 / steered.sum(), 0.5 / (~steered).sum())

    def loss(values: Floats) -> tuple[float, Floats]:
        w, b = values[:-1], values[-1]
        margin = sign * ((x @ w.astype(np.float32)).astype(np.float64) + b)
        slope = -sign * weight / (1 + np.exp(np.clip(margin, -500, 500)))
        gradient = (slope.astype(np.float32) @ x).astype(np.float64) + penalty * w
        value = float(weight @ np.logaddexp(0, -margin) + penalty / 2 * (w @ w))
        return value, np.append(gradient, slope.sum())

    # The states are float32: below this the gradient is rounding.
    found = minimize(
        loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200, "gtol": 1e-5}
    )
    return np.asarray(found.x[:-1], np.float64)


def area(negative: NDArray[np.floating], positive: NDArray[np.floating]) -> float:
    """The area under the ROC curve: how often a positive is above a negative, ties half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([negative, positive]))[len(negative) :]
    return float((ranks.sum() / len(positive) - (len(positive) + 1) / 2) / len(negative))


def level(peaks: Sequence[float], false_alarms: float) -> float:
    """The lowest threshold that, with a confidence of 95 %, at most this share of replies like these passes.

    The (n + 1) quantile of split conformal prediction keeps the share on average over all sets of replies by which a
    threshold could be set, so that nearly half of all thresholds let more pass. Here the one-sided upper bound of
    Clopper and Pearson (1934) for the share is at most what is wanted: k of n replies may pass where
    P(Binomial(n, share) <= k) <= 0.05 (Vovk 2012, "Conditional validity of inductive conformal predictors",
    proposition 2a). Replies count as independent.

    Args:
        peaks: highest score of each unsteered reply.
        false_alarms: the share wanted.

    Raises:
        InputError: if there are too few replies for so small a share.
    """
    from scipy.stats import binom

    passing = np.arange(len(peaks))
    allowed = passing[binom.cdf(passing, len(peaks), false_alarms) <= UNSURE]
    if not len(allowed):
        least = 1 - UNSURE ** (1 / len(peaks)) if peaks else 1.0
        raise InputError(
            f"{len(peaks)} unsteered replies cannot tell a false-alarm rate of {false_alarms:g}",
            "--false-alarms",
            f"Ask for {math.ceil(1000 * least) / 1000:g} or more.",
        )
    return sorted(peaks)[len(peaks) - 1 - int(allowed[-1])]


@dataclass(frozen=True, eq=False)
class Followed:
    """A reply as a detector has followed it.

    Args:
        scores: at each token, [tokens].
        cluster: its direction, or its prompt where it was not steered.
        off_topic: whether its last attempt was scored below 50.
        events: name -> the token that something happened at, such as `restart`.
    """

    scores: Floats
    steered: bool
    cluster: Hashable
    off_topic: bool
    events: Mapping[str, int]


@dataclass(frozen=True)
class Lead:
    """How long before an event a monitor sounded.

    Args:
        before: share of the replies with the event in which it sounded before it.
        tokens: from the alarm to the event in those, on average.
    """

    event: str
    before: Estimate
    tokens: Estimate


@dataclass(frozen=True)
class Detection:
    """How well a detector tells steered replies from unsteered ones.

    Args:
        token_auc, reply_auc: over tokens' scores, and over replies' highest scores.
        false_alarms: share of unsteered replies in which it sounds.
        caught: share of steered replies in which it sounds.
        caught_off_topic: of those whose last attempt was scored below 50.
        alarm_token: where it sounds in steered replies, on average over those in which it does.
        leads: one for each kind of event.
        roc: of replies: (share of unsteered, share of steered ones above a threshold), rising.
    """

    name: str
    threshold: float
    token_auc: float
    reply_auc: float
    false_alarms: Estimate
    caught: Estimate
    caught_off_topic: Estimate
    alarm_token: Estimate
    leads: tuple[Lead, ...]
    roc: tuple[tuple[float, float], ...]


def detection(name: str, threshold: float, replies: Sequence[Followed]) -> Detection:
    """What a detector does on replies of held-out topics.

    Raises:
        InputError: without steered or unsteered replies.
    """
    kinds = {kind: [each for each in replies if each.steered == kind] for kind in (False, True)}
    if not kinds[False] or not kinds[True]:
        raise InputError("there must be steered and unsteered replies", "eval.conditions", "Measure both conditions.")
    tokens = [np.concatenate([each.scores for each in kinds[kind]]) for kind in (False, True)]
    peaks = [np.array([each.scores.max() for each in kinds[kind]]) for kind in (False, True)]
    alarms = [(each, at) for each in kinds[True] if (at := first_alarm(each.scores, threshold)) is not None]
    return Detection(
        name,
        threshold,
        area(*tokens),
        area(*peaks),
        _sounds(kinds[False], threshold),
        _sounds(kinds[True], threshold),
        _sounds([each for each in kinds[True] if each.off_topic], threshold),
        mean([at for _, at in alarms], [each.cluster for each, _ in alarms], bounds=(0, math.inf)),
        tuple(_leads(kinds[True], threshold)),
        tuple(_roc(*peaks)),
    )


def _sounds(replies: Sequence[Followed], threshold: float) -> Estimate:
    return rate([float((each.scores > threshold).any()) for each in replies], [each.cluster for each in replies])


def _leads(replies: Sequence[Followed], threshold: float) -> Iterator[Lead]:
    for event in dict.fromkeys(name for each in replies for name in each.events):
        there = [each for each in replies if event in each.events]
        # None: after the event, or never.
        leads: list[int | None] = []
        for each in there:
            alarm = first_alarm(each.scores[: each.events[event] + 1], threshold)
            leads.append(None if alarm is None else each.events[event] - alarm)
        clusters = [each.cluster for each in there]
        ahead = [(lead, cluster) for lead, cluster in zip(leads, clusters, strict=True) if lead is not None]
        yield Lead(
            event,
            rate([float(lead is not None) for lead in leads], clusters),
            mean([lead for lead, _ in ahead], [cluster for _, cluster in ahead], bounds=(0, math.inf)),
        )


def _roc(negative: Floats, positive: Floats) -> Iterator[tuple[float, float]]:
    levels = np.unique(np.concatenate([negative, positive]))[::-1]
    yield 0.0, 0.0
    for at in levels[:: max(1, len(levels) // POINTS)]:
        yield float((negative >= at).mean()), float((positive >= at).mean())
    yield 1.0, 1.0
