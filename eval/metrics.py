"""What is reported, one function per metric: a trial's value, or why it has none."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from eval.store import Trial

OFF_TOPIC_BELOW = 50.0
"""An attempt that scores less is off-topic."""


class Gap(Enum):
    """Why a trial has no value: the judge failed on it, or the metric does not apply to it."""

    UNSCORED = "unscored"
    UNDEFINED = "undefined"


Value = float | Gap


def multi_attempt_rate(trial: Trial) -> Value:
    """Whether the response has two attempts or more."""
    return Gap.UNSCORED if _failed(trial) else float(len(trial.attempts) >= 2)


def esr_rate(trial: Trial) -> Value:
    """Whether the last of several attempts scores more than the first (the paper's ESR)."""
    return _gain_is(trial, lambda gain: gain > 0)


def esr10_rate(trial: Trial) -> Value:
    """Whether the last of several attempts scores at least 10 points more than the first."""
    return _gain_is(trial, lambda gain: gain >= 10)


def worsening_rate(trial: Trial) -> Value:
    """Whether the last of several attempts scores less than the first."""
    return _gain_is(trial, lambda gain: gain < 0)


def success_rate(trial: Trial) -> Value:
    """Among responses with several attempts: whether the last scores more than the first."""
    value = esr_rate(trial)
    return value if isinstance(value, Gap) or len(trial.attempts) >= 2 else Gap.UNDEFINED


def restart_rate(trial: Trial) -> Value:
    """Whether an explicit restart phrase is present; known even where the judge failed."""
    return float(trial.cue)


def first_score(trial: Trial) -> Value:
    """The first attempt's score, 0-100."""
    return _score(trial, 0)


def last_score(trial: Trial) -> Value:
    """The last attempt's score, 0-100; the first attempt's where there is only one."""
    return _score(trial, -1)


def improvement(trial: Trial) -> Value:
    """Last minus first score, among responses with several attempts."""
    gain = _gain(trial)
    return gain if isinstance(gain, Gap) or len(trial.attempts) >= 2 else Gap.UNDEFINED


def parroting_rate(trial: Trial) -> Value:
    """Whether the attempt after the first restart is off-topic again and no better than the first."""
    if _failed(trial):
        return Gap.UNSCORED
    if len(trial.attempts) < 2:
        return 0.0
    first, second = _score(trial, 0), _score(trial, 1)
    if isinstance(first, Gap) or isinstance(second, Gap):
        return Gap.UNSCORED
    return float(second < OFF_TOPIC_BELOW and second <= first)


def silent_recovery_rate(trial: Trial) -> Value:
    """Whether the response drifts off topic and comes back without a restart."""
    return _flag(trial, "silent_recovery")


def degenerate_rate(trial: Trial) -> Value:
    """Whether the response is word salad or repetition."""
    return _flag(trial, "degenerate")


def hijack_rate(trial: Trial) -> Value:
    """Whether the last attempt is mainly about the latent's topic."""
    return _flag(trial, "hijacked")


def restart_position(trial: Trial) -> Value:
    """Generated tokens before the second attempt begins; from its share of the characters in rows without a count."""
    if _failed(trial):
        return Gap.UNSCORED
    if len(trial.attempts) < 2 or not trial.response:
        return Gap.UNDEFINED
    if trial.restart_token is not None:
        return float(trial.restart_token)
    if trial.tokens is None:
        return Gap.UNDEFINED
    return trial.attempts[1].start / len(trial.response) * trial.tokens


def restart_logprob(trial: Trial) -> Value:
    """Mean over the first attempt's sentence ends of the log-probability (nats) that a restart phrase comes next."""
    values = [value for _, value in trial.restart_logprobs]
    return sum(values) / len(values) if values else Gap.UNDEFINED


@dataclass(frozen=True)
class Metric:
    """A metric's function, whether its values are events (0/1), and between which values it can lie."""

    of: Callable[[Trial], Value]
    is_rate: bool
    bounds: tuple[float, float] = (-math.inf, math.inf)


RATES = (
    multi_attempt_rate,
    esr_rate,
    esr10_rate,
    worsening_rate,
    success_rate,
    restart_rate,
    silent_recovery_rate,
    degenerate_rate,
    parroting_rate,
    hijack_rate,
)
SCORES = (first_score, last_score)
MEANS = (improvement, restart_position, restart_logprob)
METRICS = (
    {function.__name__: Metric(function, True, (0, 1)) for function in RATES}
    | {function.__name__: Metric(function, False, (0, 100)) for function in SCORES}
    | {function.__name__: Metric(function, False) for function in MEANS}
)


def attempts_histogram(trials: Sequence[Trial]) -> dict[str, int]:
    """How many scored responses have 1, 2, … attempts."""
    counts = Counter(len(trial.attempts) for trial in trials if not _failed(trial))
    return {str(attempts): counts[attempts] for attempts in sorted(counts)}


def pair_key(trial: Trial) -> tuple[Any, ...]:
    """What two arms' trials must share to be compared: condition, the whole cell, and the seed."""
    cell = trial.cell
    along = None if cell.strength is None else round(float(cell.strength.raw), 6)
    return trial.condition, cell.prompt, cell.latent, along, cell.seed, trial.seed


def _failed(trial: Trial) -> bool:
    return trial.error is not None or not trial.attempts


def _score(trial: Trial, index: int) -> Value:
    if _failed(trial):
        return Gap.UNSCORED
    score = trial.attempts[index].score
    return Gap.UNSCORED if score is None or math.isnan(score) else float(score)


def _gain(trial: Trial) -> Value:
    first, last = _score(trial, 0), _score(trial, -1)
    return Gap.UNSCORED if isinstance(first, Gap) or isinstance(last, Gap) else last - first


def _gain_is(trial: Trial, wanted: Callable[[float], bool]) -> Value:
    gain = _gain(trial)
    if isinstance(gain, Gap):
        return gain
    return float(len(trial.attempts) >= 2 and wanted(gain))


def _flag(trial: Trial, name: str) -> Value:
    if name not in trial.flags:
        return Gap.UNSCORED if _failed(trial) else Gap.UNDEFINED
    found = trial.flags[name]
    return Gap.UNSCORED if found is None else float(found)
