"""Several judges on the same trials: what each finds, and how far they agree with one another, or with themselves."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from esr_train.values import typed
from eval.judging.judge import Judge, JudgeItem, Judgement
from eval.metrics import METRICS, Gap
from eval.store import RowStore, Trial
from eval.summary import Summary, summarise

SCORES = ("first_score", "last_score")
EVENTS = ("multi_attempt_rate", "esr_rate", "silent_recovery_rate", "degenerate_rate", "hijack_rate")
CHUNK = 64
"""Judgements between two writes."""
Panel = Mapping[str, Mapping[str, Sequence[Trial]]]
"""Judge -> arm -> its trials as this judge scores them; the same trials in the same order for every judge."""


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa of two judges' yes/no findings.

    Args:
        kappa: agreement beyond chance; None where both always say the same word, so chance explains all.
        agreement: share of items on which they agree.
        prevalence: share of yes over both judges. Kappa is low at extreme prevalence even for good judges
            (Feinstein & Cicchetti 1990), so it is never shown alone.
        n: items both judged.
    """

    kappa: float | None
    agreement: float | None
    prevalence: float | None
    n: int


@dataclass(frozen=True)
class Alpha:
    """Krippendorff's alpha of two judges' scores over the `n` trials that both scored; None where nothing varies."""

    alpha: float | None
    n: int


@dataclass(frozen=True)
class Pair:
    """How far two judges agree, by metric; `retest` where both are the same judge asked twice."""

    judges: tuple[str, str]
    retest: bool
    scores: Mapping[str, Alpha]
    events: Mapping[str, Kappa]


@dataclass(frozen=True)
class Agreement:
    """What agreement.json holds, its keys in this order.

    Args:
        trials: how many each was asked about.
        unscored: judge -> how many it failed on.
        alpha: metric -> Krippendorff's alpha over all judges (interval for scores, nominal for events).
        rates: judge -> the trials' numbers as it scores them.
    """

    schema: int
    judges: tuple[str, ...]
    trials: int
    unscored: Mapping[str, int]
    alpha: Mapping[str, float | None]
    pairs: tuple[Pair, ...]
    rates: Mapping[str, Summary]


def judgement_store(path: Path) -> RowStore[Judgement]:
    """Where `judge_again` keeps what a judge said."""
    return RowStore(path, _read_judgement, asdict)


def _read_judgement(row: dict[str, Any]) -> Judgement:
    return typed(Judgement, {key: value for key, value in row.items() if key != "key"})


def judge_again(
    judge: Judge,
    trials: Sequence[Trial],
    store: RowStore[Judgement],
    progress: Callable[[int], Any] = lambda rows: None,
) -> list[Trial]:
    """The trials as another judge scores them, in order.

    Args:
        store: keeps the judgements, so that a killed call goes on where it stopped; those of responses that are
            there no longer do no harm.
        progress: told of judgements as they are there.
    """
    digests = [hashlib.sha256(trial.response.encode("utf-8", "backslashreplace")).hexdigest() for trial in trials]
    keys = [f"{trial.key}#{digest[:12]}" for trial, digest in zip(trials, digests, strict=True)]
    known = store.keys()
    missing = [(key, trial) for key, trial in zip(keys, trials, strict=True) if key not in known]
    progress(len(keys) - len(missing))
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        items = [JudgeItem(each.cell.prompt, each.response, each.cell.label, recovery=True) for _, each in chunk]
        store.append((key, judgement) for (key, _), judgement in zip(chunk, judge.judge(items), strict=True))
        progress(len(chunk))
    judgements = store.by_key()
    return [_as_judged(trial, judgements[key]) for trial, key in zip(trials, keys, strict=True)]


def _as_judged(trial: Trial, found: Judgement) -> Trial:
    attempts, flags = found.attempts, found.flags
    return replace(trial, attempts=attempts, judge=found.judge, judge_raw=found.raw, flags=flags, error=found.error)


def agreement(panel: Panel, bootstrap: int, seed: int) -> Agreement:
    """How far the judges of a panel agree, and each one's numbers."""
    judges = list(panel)
    rows = {judge: [trial for arm in panel[judge].values() for trial in arm] for judge in judges}
    values = {name: np.array([_values(rows[judge], name) for judge in judges]) for name in (*SCORES, *EVENTS)}
    return Agreement(
        schema=1,
        judges=tuple(judges),
        trials=len(rows[judges[0]]),
        unscored={judge: sum(trial.error is not None for trial in found) for judge, found in rows.items()},
        alpha={name: krippendorff_alpha(table, interval=name in SCORES) for name, table in values.items()},
        pairs=tuple(
            Pair(
                judges=(judges[first], judges[second]),
                retest=judges[first].split("#")[0] == judges[second].split("#")[0],
                scores={name: _alpha(values[name][[first, second]]) for name in SCORES},
                events={name: kappa(values[name][first], values[name][second]) for name in EVENTS},
            )
            for first, second in combinations(range(len(judges)), 2)
        ),
        rates={judge: summarise(panel[judge], bootstrap, seed) for judge in judges},
    )


def _values(trials: Sequence[Trial], name: str) -> list[float]:
    found = [METRICS[name].of(trial) for trial in trials]
    return [np.nan if isinstance(value, Gap) else value for value in found]


def _alpha(ratings: np.ndarray) -> Alpha:
    both = ~np.isnan(ratings).any(axis=0)
    return Alpha(krippendorff_alpha(ratings), int(both.sum()))


def kappa(first: ArrayLike, second: ArrayLike) -> Kappa:
    """Cohen's kappa of two judges' findings [items] (1: yes, 0: no, NaN: undecided), over what both decided."""
    both = np.stack([np.asarray(first, dtype=float), np.asarray(second, dtype=float)])
    both = both[:, ~np.isnan(both).any(axis=0)]
    if both.shape[1] == 0:
        return Kappa(None, None, None, 0)
    agreement = float((both[0] == both[1]).mean())
    p, q = float(both[0].mean()), float(both[1].mean())
    chance = p * q + (1 - p) * (1 - q)
    beyond = None if chance >= 1 else (agreement - chance) / (1 - chance)
    return Kappa(beyond, agreement, (p + q) / 2, both.shape[1])


def krippendorff_alpha(ratings: ArrayLike, interval: bool = True) -> float | None:
    """Krippendorff's alpha (2011) for any number of judges, with gaps.

    Args:
        ratings: [judges, items], NaN where a judge gave none.
        interval: scores, where distance is the squared difference; else categories, equal or not.

    Returns:
        1 for full agreement, 0 for chance; None if no item has two ratings or nothing varies.
    """
    table = np.asarray(ratings, dtype=float)
    units = [unit for unit in (column[~np.isnan(column)] for column in table.T) if len(unit) >= 2]
    if not units:
        return None
    values = np.concatenate(units)
    observed = sum(_distance(unit, interval) / (len(unit) - 1) for unit in units) / len(values)
    expected = _distance(values, interval) / len(values) / (len(values) - 1)
    return None if expected == 0 else 1 - observed / expected


def _distance(values: np.ndarray, interval: bool) -> float:
    """Sum of the distances of all pairs of values."""
    differences = values[:, None] - values[None, :]
    return float((differences**2 if interval else differences != 0).sum())
