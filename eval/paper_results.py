"""The paper's published results as trials, so that their rates come from our statistics."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from esr_train.errors import InputError
from esr_train.files import read_json
from esr_train.restarts import find_cues
from esr_train.values import typed
from eval.judging.judge import Attempt
from eval.judging.rubric import locate
from eval.store import Trial, TrialCell, UsedStrength

_NUMBER = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*100)?\s*")
_JUDGES = ("judge_model_name", "judge_model", "judge")
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Imported:
    """What a result file holds.

    Args:
        trials: one row a trial; the judge's errors are unscored rows.
        failed: latents whose whole measurement failed, with the error that the file gives.
        config: the file's `experiment_config`.
    """

    trials: list[Trial]
    failed: dict[str, str]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class _File:
    results_by_feature: tuple[Any, ...]
    experiment_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Feature:
    feature_index_in_sae: int
    feature_label: str | None = None
    threshold: float | None = None
    error: Any = None
    trials: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class _Result:
    prompt: str
    response: str
    threshold: float | None
    seed: int | None = None
    score: Any = None


def read_results(path: Path | str, arm: str) -> Imported:
    """Read an `experiment_results_*.json`.

    A trial whose strength is 0 is `unsteered`; one at another strength than its latent's threshold is a
    `boost_x…`. Strengths are raw ones: the files hold no residual norms. Tokens were not counted. Trials alike in
    prompt, latent, strength and seed are repeats, told apart by the row's `seed`.

    Raises:
        InputError: naming the key, for another form.
    """
    try:
        made = _read(read_json(path), arm)
    except ValueError as error:
        raise InputError(f"this is not a result file: {error}", str(path)) from None
    if not made.trials:
        raise InputError("there is no trial in the file", str(path), "Name a file whose features have trials.")
    return made


def _read(value: Any, arm: str) -> Imported:
    file = _known(_File, value, "")
    config = file.experiment_config or {}
    judge = next((str(config[name]) for name in _JUDGES if config.get(name)), "imported")
    trials: list[Trial] = []
    failed: dict[str, str] = {}
    seen: Counter[TrialCell] = Counter()
    for number, feature_value in enumerate(file.results_by_feature):
        name = f"results_by_feature[{number}]"
        feature = _known(_Feature, feature_value, name)
        if feature.error:
            failed[str(feature.feature_index_in_sae)] = str(feature.error)
        for index, trial in enumerate(feature.trials or ()):
            at = f"{name}.trials[{index}]"
            given = {"threshold": feature.threshold, **trial} if isinstance(trial, dict) else trial
            cell, condition = _cell(feature, result := _known(_Result, given, at))
            trials.append(_trial(f"{arm}/{at}", condition, seen[cell], cell, judge, result))
            seen[cell] += 1
    return Imported(trials, failed, config)


def _known(kind: type[_Kind], value: Any, name: str) -> _Kind:
    """The keys that we read; the files hold many others."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return typed(kind, {key: value[key] for key in value if key in names} if isinstance(value, dict) else value, name)


def _cell(feature: _Feature, result: _Result) -> tuple[TrialCell, str]:
    """What was run, and under which condition."""
    seed, strength, threshold = result.seed or 0, result.threshold, feature.threshold
    if not strength:
        return TrialCell(result.prompt, result.prompt, None, None, None, seed), "unsteered"
    used, latent, label = UsedStrength(strength, None), feature.feature_index_in_sae, feature.feature_label
    cell = TrialCell(result.prompt, topic=result.prompt, latent=latent, label=label, strength=used, seed=seed)
    if not threshold or math.isclose(strength, threshold, rel_tol=1e-6):
        return cell, "steered"
    return cell, f"boost_x{strength / threshold:.3g}"


def _trial(key: str, condition: str, repeat: int, cell: TrialCell, judge: str, result: _Result) -> Trial:
    attempts, error = _attempts(result.score, result.response)
    return Trial(
        key=key,
        arm=key.partition("/")[0],
        condition=condition,
        seed=repeat,
        cell=cell,
        engine="imported",
        sampling=None,
        response=result.response,
        finish_reason=None,
        tokens=None,
        steered_tokens=None,
        attempts=attempts,
        cue=bool(find_cues(result.response)),
        judge=judge,
        judge_raw="",
        flags={},
        error=error,
    )


def _attempts(score: Any, response: str) -> tuple[tuple[Attempt, ...], str | None]:
    """Attempts as character ranges, or why there are none."""
    if not isinstance(score, dict):
        return (), "the file has no score"
    if score.get("error"):
        return (), str(score["error"])
    named = score.get("attempts")
    if not isinstance(named, list) or not named or not all(isinstance(each, dict) for each in named):
        return (), "the judge named no attempt"
    starts = _starts([str(each.get("attempt_text") or "") for each in named], response)
    scores = [_score(each.get("score")) for each in named]
    return tuple(map(Attempt, starts, [*starts[1:], len(response)], scores)), None


def _starts(texts: Sequence[str], response: str) -> list[int]:
    """Where attempts begin; one that the judge did not quote as it stands begins at the next cue, or else where
    the texts' lengths put it."""
    cues = [start for start, _ in find_cues(response)]
    lengths = [len(text) for text in texts]
    starts = [0]
    for number, text in enumerate(texts[1:], start=1):
        after = starts[-1] + 1
        found = locate(text[:200], response, after)
        if found is None:
            share = sum(lengths[:number]) / max(sum(lengths), 1)
            found = next((cue for cue in cues if cue >= after), max(after, round(share * len(response))))
        starts.append(min(found, len(response)))
    return starts


def _score(value: Any) -> float | None:
    """A score of 0 to 100; None for what is none, so that the trial is unscored and not 0."""
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        value = float(match[1]) if match else None
    return float(value) if type(value) in (int, float) and 0 <= value <= 100 else None
