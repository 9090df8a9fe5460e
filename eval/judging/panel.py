"""Several judges on the same trials: what each finds, and how far they agree."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from esr_train.values import typed
from eval.judging.agreement import kappa, krippendorff_alpha
from eval.judging.judge import Judge, JudgeItem, Judgement
from eval.metrics import METRICS, Gap
from eval.store import RowStore, Trial
from eval.summary import summarise

SCORES = ("first_score", "last_score")
EVENTS = ("multi_attempt_rate", "esr_rate", "silent_recovery_rate", "degenerate_rate", "hijack_rate")
CHUNK = 64
"""Judgements between two writes."""
Panel = Mapping[str, Mapping[str, Sequence[Trial]]]
"""Judge -> arm -> its trials as this judge scores them; the same trials in the same order for every judge."""


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
    keys = [_key(trial) for trial in trials]
    known = store.keys()
    missing = [place for place, key in enumerate(keys) if key not in known]
    progress(len(keys) - len(missing))
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        found = judge.judge([_item(trials[place]) for place in chunk])
        store.append((keys[place], judgement) for place, judgement in zip(chunk, found, strict=True))
        progress(len(chunk))
    judgements = store.by_key()
    return [_as_judged(trial, judgements[key]) for trial, key in zip(trials, keys, strict=True)]


def judgement_store(path: Path) -> RowStore[Judgement]:
    """Where `judge_again` keeps what a judge said."""
    return RowStore(path, _read, Judgement.to_json)


def _read(row: dict[str, Any]) -> Judgement:
    renamed = {"raw" if key == "judge_raw" else key: value for key, value in row.items() if key != "key"}
    return typed(Judgement, renamed)


def _as_judged(trial: Trial, judgement: Judgement) -> Trial:
    return replace(
        trial,
        attempts=judgement.attempts,
        judge=judgement.judge,
        judge_raw=judgement.raw,
        flags=judgement.flags,
        error=judgement.error,
    )


def _key(trial: Trial) -> str:
    digest = hashlib.sha256(trial.response.encode("utf-8", "backslashreplace")).hexdigest()
    return f"{trial.key}#{digest[:12]}"


def _item(trial: Trial) -> JudgeItem:
    return JudgeItem(trial.cell.prompt, trial.response, trial.cell.label, recovery=True)


def agreement(panel: Panel, bootstrap: int, seed: int) -> dict[str, Any]:
    """What `agreement.json` holds.

    Returns:
        `judges`; `trials` and each judge's `unscored`; `alpha` over all judges (Krippendorff: interval for
        scores, nominal for events); `pairs` with alpha for scores and kappa with agreement and prevalence for
        events, `retest` where both are the same judge asked twice; and `rates`, each judge's metrics.
    """
    judges = list(panel)
    rows = {judge: [trial for arm in panel[judge].values() for trial in arm] for judge in judges}
    values = {name: np.array([_values(rows[judge], name) for judge in judges]) for name in (*SCORES, *EVENTS)}
    return {
        "schema": 1,
        "judges": judges,
        "trials": len(rows[judges[0]]),
        "unscored": {judge: sum(trial.error is not None for trial in found) for judge, found in rows.items()},
        "alpha": {name: krippendorff_alpha(table, interval=name in SCORES) for name, table in values.items()},
        "pairs": [_pair(judges, first, second, values) for first, second in combinations(range(len(judges)), 2)],
        "rates": {judge: summarise(panel[judge], bootstrap, seed) for judge in judges},
    }


def _values(trials: Sequence[Trial], name: str) -> list[float]:
    found = [METRICS[name].of(trial) for trial in trials]
    return [np.nan if isinstance(value, Gap) else value for value in found]


def _pair(judges: Sequence[str], first: int, second: int, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    names = judges[first], judges[second]
    scores = {}
    for name in SCORES:
        both = values[name][[first, second]]
        seen = ~np.isnan(both).any(axis=0)
        scores[name] = {"alpha": krippendorff_alpha(both), "n": int(seen.sum())}
    events = {}
    for name in EVENTS:
        one, other = ([None if np.isnan(v) else bool(v) for v in values[name][place]] for place in (first, second))
        found = kappa(one, other)
        events[name] = {
            "kappa": found.kappa,
            "agreement": found.agreement,
            "prevalence": found.prevalence,
            "n": found.n,
        }
    retest = names[0].split("#")[0] == names[1].split("#")[0]
    return {"judges": list(names), "retest": retest, "scores": scores, "events": events}
