"""The paper's published results as trials, so that their rates come from our statistics."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esr_train.errors import InputError
from esr_train.files import read_json
from esr_train.restarts import find_cues
from eval.judging.judge import Attempt
from eval.judging.rubric import locate
from eval.store import Trial, TrialCell, UsedStrength

_NUMBER = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*100)?\s*")
_JUDGES = ("judge_model_name", "judge_model", "judge")


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


def read_results(path: Path | str, arm: str) -> Imported:
    """Read an `experiment_results_*.json`.

    A trial whose strength is 0 is `unsteered`; one at another strength than its latent's threshold is a
    `boost_x…`. Strengths are raw ones: the files hold no residual norms. Tokens were not counted. Trials alike in
    prompt, latent, strength and seed are repeats, told apart by the row's `seed`.

    Raises:
        InputError: naming the place in the file, for another form.
    """
    values = read_json(path)
    features = values.get("results_by_feature") if isinstance(values, dict) else None
    if not isinstance(features, list):
        raise InputError("this is no result file: it has no list 'results_by_feature'", str(path))
    config = values.get("experiment_config")
    config = config if isinstance(config, dict) else {}
    judge = next((str(config[name]) for name in _JUDGES if config.get(name)), "imported")
    seen: Counter[str] = Counter()
    trials: list[Trial] = []
    failed: dict[str, str] = {}
    for number, feature in enumerate(features):
        where = f"{path}: results_by_feature[{number}]"
        latent = _whole(_of(feature, where).get("feature_index_in_sae"), f"{where}.feature_index_in_sae")
        if feature.get("error"):
            failed[str(latent)] = str(feature["error"])
        trials += [_row(arm, judge, latent, feature, each, at, seen) for at, each in _trials(feature, where)]
    if not trials:
        raise InputError("there is no trial in the file", str(path), "Name a file whose features have trials.")
    return Imported(trials, failed, config)


def _trials(feature: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    found = feature.get("trials") or []
    if not isinstance(found, list):
        raise InputError("the trials are no list", f"{where}.trials")
    for number, trial in enumerate(found):
        at = f"{where}.trials[{number}]"
        yield at, _of(trial, at)


def _row(
    arm: str,
    judge: str,
    latent: int,
    feature: Mapping[str, Any],
    trial: Mapping[str, Any],
    where: str,
    seen: Counter[str],
) -> Trial:
    prompt, response = (_text(trial.get(name), f"{where}.{name}") for name in ("prompt", "response"))
    threshold = _strength(feature.get("threshold"), where)
    strength = _strength(trial.get("threshold", feature.get("threshold")), where)
    condition = _condition(strength, threshold)
    seed = _whole(trial.get("seed") or 0, f"{where}.seed")
    steered = condition != "unsteered"
    cell = TrialCell(
        prompt,
        topic=prompt,
        latent=latent if steered else None,
        label=feature.get("feature_label") if steered else None,
        strength=UsedStrength(strength or 0.0, None) if steered else None,
        seed=seed,
    )
    alike = repr(cell)
    seen[alike] += 1
    attempts, error = _judged(trial.get("score"), response)
    return Trial(
        key=f"{arm}/{where.rsplit(': ', 1)[-1]}",
        arm=arm,
        condition=condition,
        seed=seen[alike] - 1,
        cell=cell,
        engine="imported",
        sampling=None,
        response=response,
        finish_reason=None,
        tokens=None,
        steered_tokens=None,
        attempts=attempts,
        cue=bool(find_cues(response)),
        judge=judge,
        judge_raw="",
        flags={},
        error=error,
    )


def _condition(strength: float | None, threshold: float | None) -> str:
    if not strength:
        return "unsteered"
    if not threshold or math.isclose(strength, threshold, rel_tol=1e-6):
        return "steered"
    return f"boost_x{strength / threshold:.3g}"


def _judged(score: Any, response: str) -> tuple[tuple[Attempt, ...], str | None]:
    """Attempts as character ranges, or why there are none."""
    if not isinstance(score, dict):
        return (), "the file has no score"
    if score.get("error"):
        return (), str(score["error"])
    named = score.get("attempts")
    if not isinstance(named, list) or not named or not all(isinstance(each, dict) for each in named):
        return (), "the judge named no attempt"
    starts = _starts([str(each.get("attempt_text") or "") for each in named], response)
    ends = [*starts[1:], len(response)]
    scores = [_score(each.get("score")) for each in named]
    ranges = zip(starts, ends, scores, strict=True)
    return tuple(Attempt(*each) for each in ranges), None


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
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100
    return float(value) if usable else None


def _strength(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"the strength {value!r} is no number", f"{where}.threshold")
    return found


def _whole(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"{value!r} is no whole number", where) from None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"a text is needed, not {type(value).__name__}", where)
    return value


def _of(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"an object is needed, not {type(value).__name__}", where)
    return value
