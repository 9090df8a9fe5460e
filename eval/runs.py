"""Trials of finished runs, read from their folders; several runs put together, if they measured the same."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

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
    trials: dict[str, list[Trial]] = {}
    for part in [folder, *sorted(folder.glob("seed-*"))]:
        for path in sorted((part / "trials").glob("*.jsonl")):
            trials.setdefault(path.stem, []).extend(read_trials(path))
    if not any(trials.values()):
        raise InputError("there are no trials here", str(folder / "trials"), "Name a folder in which a run lies.")
    return {arm: trials[arm] for arm in sorted(trials, key=lambda arm: (arm != "base", arm))}


def read_runs(folders: Sequence[Path], anyway: bool = False) -> dict[str, list[Trial]]:
    """The arms of several runs as `run/arm`. The first run's base is `base`; another's is left out if it is the same.

    Args:
        folders: of the runs, which are called by their folders, or by their paths where these are alike.
        anyway: do not refuse runs that measured differently; only cells that two arms share are paired.

    Raises:
        InputError: for runs that differ in cells, judge or sampling, saying in which.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
    first, *others = runs
    for other in () if anyway else others:
        _require_alike(first, runs[first], other, runs[other])
    base = runs[first].get("base", [])
    merged = {"base": base} if base else {}
    for name, run in runs.items():
        merged |= {f"{name}/{arm}": trials for arm, trials in run.items() if arm != "base"}
        if "base" in run and _responses(run["base"]) != _responses(base):
            merged[f"{name}/base"] = run["base"]
    return merged


def _require_alike(name: str, run: Run, other_name: str, other: Run) -> None:
    wrong = []
    cells, other_cells = _cells(run), _cells(other)
    for condition in sorted({*cells} & {*other_cells}):
        one, two = cells[condition], other_cells[condition]
        if one != two:
            wrong.append(f"they share {len(one & two)} of {len(one)} and {len(two)} cells of '{condition}'")
    if not {*cells} & {*other_cells}:
        wrong.append("they have no condition in common")
    for what, of in HELD_ALIKE.items():
        said, told = ({of(trial) for trials in each.values() for trial in trials} for each in (run, other))
        if said != told:
            wrong.append(f"{what}: {', '.join(sorted(said))} and {', '.join(sorted(told))}")
    if wrong:
        raise InputError(
            f"the runs {name} and {other_name} did not measure the same: {'; '.join(wrong)}",
            fix="Compare runs of the same cells, or add --anyway: then only shared cells are paired.",
        )


HELD_ALIKE: dict[str, Callable[[Trial], str]] = {
    "judge": lambda trial: repr(trial.judge),
    "sampling": lambda trial: repr(asdict(trial.sampling)) if trial.sampling else "unknown",
}
"""What must be the same in runs that are compared."""


def _cells(run: Run) -> dict[str, set[tuple[Hashable, ...]]]:
    """Per condition the cells that any arm ran; strengths of an arm's own are left out."""
    cells: dict[str, set[tuple[Hashable, ...]]] = {}
    for trial in (trial for trials in run.values() for trial in trials if trial.condition != RECALIBRATED):
        cells.setdefault(trial.condition, set()).add(pair_key(trial))
    return cells


def _responses(trials: Sequence[Trial]) -> set[tuple[Hashable, ...]]:
    return {(*pair_key(trial), trial.response) for trial in trials}
