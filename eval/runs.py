"""Trials of finished runs, read from their folders; several runs put together, if they measured the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esr_train.errors import InputError
from eval.metrics import pair_key
from eval.store import Trial, read_trials
from eval.summary import RECALIBRATED

Run = Mapping[str, list[Trial]]
"""Arm -> its trials."""


def read_run(folder: Path) -> dict[str, list[Trial]]:
    """Every arm's trials, those of all seeds together.

    Raises:
        InputError: if there are none.
    """
    parts = [each for each in [folder, *sorted(folder.glob("seed-*"))] if (each / "trials").is_dir()]
    found: dict[str, list[Trial]] = {}
    for part in parts:
        for path in sorted((part / "trials").glob("*.jsonl")):
            found.setdefault(path.stem, []).extend(read_trials(path))
    if not any(found.values()):
        raise InputError("there are no trials here", str(folder / "trials"), "Name a folder in which a run lies.")
    return {arm: found[arm] for arm in sorted(found, key=lambda arm: (arm != "base", arm))}


def together(runs: Mapping[str, Run], anyway: bool = False) -> dict[str, list[Trial]]:
    """The arms of several runs as `run/arm`. The first run's base is `base`; another's is left out if it is the same.

    Args:
        runs: name -> the run.
        anyway: do not refuse runs that measured differently; only cells that two arms share are paired.

    Raises:
        InputError: for runs that differ in cells, judge or sampling, saying in which.
    """
    first, *others = runs
    if not anyway:
        for other in others:
            _require_alike(first, runs[first], other, runs[other])
    base = runs[first].get("base")
    found: dict[str, list[Trial]] = {}
    for name, run in runs.items():
        for arm, trials in run.items():
            if arm != "base" or base is None:
                found[f"{name}/{arm}"] = trials
            elif trials is base:
                found["base"] = trials
            elif _responses(trials) != _responses(base):
                found[f"{name}/base"] = trials
    return found


def run_names(folders: Sequence[Path]) -> list[str]:
    """What the runs are called: by their folders, or by their whole paths where these are alike."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _require_alike(name: str, run: Run, other_name: str, other: Run) -> None:
    wrong = []
    ours, theirs = _cells(run), _cells(other)
    for condition in sorted({*ours} & {*theirs}):
        one, two = ours[condition], theirs[condition]
        if one != two:
            wrong.append(f"they share {len(one & two)} of {len(one)} and {len(two)} cells of '{condition}'")
    if not {*ours} & {*theirs}:
        wrong.append("they have no condition in common")
    told_of: dict[str, Callable[[Trial], str]] = {
        "judge": lambda trial: repr(trial.judge),
        "sampling": lambda trial: repr(asdict(trial.sampling) if trial.sampling else None),
    }
    for what, told_by in told_of.items():
        said, told = ({told_by(trial) for trials in each.values() for trial in trials} for each in (run, other))
        if said != told:
            wrong.append(f"{what}: {', '.join(sorted(said))} and {', '.join(sorted(told))}")
    if wrong:
        raise InputError(
            f"the runs {name} and {other_name} did not measure the same: {'; '.join(wrong)}",
            fix="Compare runs of the same cells, or add --anyway: then only shared cells are paired.",
        )


def _cells(run: Run) -> dict[str, set[tuple[Any, ...]]]:
    """Per condition the cells that any arm ran; strengths of an arm's own are left out."""
    found: dict[str, set[tuple[Any, ...]]] = {}
    for trials in run.values():
        for trial in trials:
            if trial.condition != RECALIBRATED:
                found.setdefault(trial.condition, set()).add(pair_key(trial))
    return found


def _responses(trials: Sequence[Trial]) -> set[tuple[Any, ...]]:
    return {(*pair_key(trial), trial.response) for trial in trials}
