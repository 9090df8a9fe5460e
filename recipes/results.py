"""What an experiment found: the trials of all its seeds combined, further judges' scores, and the report."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from esr_train.errors import InputError, RunError
from esr_train.files import write_json
from esr_train.provenance import digest, source_hashes
from esr_train.recipe import Recipe
from eval.calibration import read_thresholds
from eval.conditions import measured_conditions
from eval.judging.agreement import Agreement, agreement, judge_again, judgement_store
from eval.judging.judge import Judge
from eval.judging.model_judge import ModelJudge
from eval.report.figures import Material
from eval.report.page import Notes, write_report
from eval.report.story import Bar, progress_bar
from eval.store import Trial, read_trials
from eval.summary import summarise
from recipes.experiment import Experiment, write_recipe
from recipes.stage_cache import Stage
from recipes.steering_latents import THRESHOLDS, direction_noun, latent_facts
from recipes.weights import form

AGREEMENT = "agreement.json"
MOST_LABELS = 24
"""Labels of held-out directions that the report names."""
_NUMBER = re.compile(r"[-_]?\d+(\.\d+)?$")
"""What numbers an arm of a sweep."""


def write_reports(experiment: Experiment, parts: Sequence[Experiment]) -> Path:
    """A report of every seed, if the run has several, and one of them all; returns the latter's path."""
    for part in parts:
        if part is not experiment:
            _report_stage(part, [part])
    path = _report_stage(experiment, parts)
    for line in (*spent(experiment), *outdated_lines((experiment, *parts))):
        experiment.say(line)
    experiment.say(f"report: {path}")
    return path


def _report_stage(experiment: Experiment, parts: Sequence[Experiment]) -> Path:
    """Combine the parts' trials into `metrics.json` and `report.html`; made anew with new code, as it costs seconds."""
    recipe = experiment.recipe
    inputs = {
        "trials": [_trial_fingerprints(part) for part in parts],
        "eval": recipe.eval.model_dump(mode="json"),
        "arms": {name: arm.model_dump(mode="json") for name, arm in recipe.arms.items()},
        "judges": [judge.name for judge in experiment.resources.further_judges()],
        "name": recipe.name,
        "outdated": outdated_lines((experiment, *parts)),
        "code": digest(source_hashes(("recipes.results",))),
    }
    stage = Stage("report", inputs, ("metrics.json", "report.html"), ("recipes.results",))
    experiment.cache.do(stage, lambda: report(experiment, parts))
    return experiment.directory / "report.html"


def _trial_fingerprints(part: Experiment) -> dict[str, str]:
    records = part.cache.records()
    return {name: record["fingerprint"] for name, record in records.items() if name.startswith("trials/")}


def report(experiment: Experiment, parts: Sequence[Experiment]) -> None:
    """Write `metrics.json`, `agreement.json` (with further judges) and `report.html` into the run directory.

    Raises:
        RunError: if there is no trial.
    """
    rows: dict[str, list[Trial]] = {arm: [] for arm in ("base", *experiment.recipe.arms)}
    for part in parts:
        for arm, trials in finished_trials(part).items():
            rows[arm] += trials
    if not rows["base"]:
        raise RunError("there is no trial to report.")
    write_recipe(experiment)
    summary = summarise(rows, experiment.recipe.eval.bootstrap, experiment.recipe.seed)
    write_json(experiment.directory / "metrics.json", summary.to_json())
    frozen = experiment.directory / THRESHOLDS
    thresholds = read_thresholds(frozen).thresholds if frozen.is_file() else ()
    agreed = write_agreement(experiment, parts, rows)
    noun = direction_noun(experiment.recipe)
    material = Material(summary, rows, thresholds, agreed, mixtures(experiment.recipe), noun)
    write_report(experiment.directory, experiment.recipe.name, material, _notes(experiment, parts, rows))


def finished_trials(part: Experiment) -> dict[str, list[Trial]]:
    """The finished trials of every arm in the recipe's conditions; each trial's `seed` is this run's."""
    wanted = {measured.name for measured in measured_conditions(part.recipe.eval)}
    return {
        arm: [
            replace(trial, seed=part.recipe.seed)
            for trial in read_trials(part.directory / "trials" / f"{arm}.jsonl")
            if trial.condition in wanted
        ]
        for arm in ("base", *part.recipe.arms)
    }


def outdated_lines(parts: Sequence[Experiment]) -> list[str]:
    """A line for the stages that were kept although the code that makes them has changed since."""
    outdated: dict[str, set[str]] = {}
    for part in parts:
        for stage, modules in part.cache.outdated().items():
            outdated.setdefault(stage, set()).update(modules)
    if not outdated:
        return []
    modules = sorted(set().union(*outdated.values()))
    some = ", ".join(modules[:4]) + (f" and {len(modules) - 4} more" if len(modules) > 4 else "")
    return [
        f"kept, though code that makes them has changed since ({some}): {', '.join(sorted(outdated))}; "
        "--redo STAGE makes one anew"
    ]


def spent(experiment: Experiment) -> list[str]:
    """What this process has asked its model judges, and what it cost, a line each."""
    judges = (experiment.resources.judge(), *experiment.resources.further_judges())
    return [f"judge {judge.spent}" for judge in judges if isinstance(judge, ModelJudge)]


def write_agreement(
    experiment: Experiment, parts: Sequence[Experiment], rows: Mapping[str, Sequence[Trial]]
) -> Agreement | None:
    """Write `agreement.json` if the recipe names further judges, else remove an old one.

    Args:
        experiment: the run.
        parts: their judgements lie in `judgements/<judge>.jsonl` in their own directories.
        rows: arm -> the trials of all parts, as the recipe's first judge scores them.
    """
    path = experiment.directory / AGREEMENT
    if not experiment.resources.further_judges():
        path.unlink(missing_ok=True)
        return None
    panel = {experiment.resources.judge().name: rows}
    for number, judge in enumerate(experiment.resources.further_judges()):
        if judge.name in panel:
            raise InputError(
                f"the judge {judge.name} is named twice",
                f"judges.{number}",
                "Remove it; a model is asked a second time (test-retest) under another `repeat`.",
            )
        panel[judge.name] = _judged_again(judge, parts)
    compared = agreement(panel, experiment.recipe.eval.bootstrap, experiment.recipe.seed)
    write_json(path, asdict(compared))
    return compared


def _judged_again(judge: Judge, parts: Sequence[Experiment]) -> dict[str, list[Trial]]:
    judged: dict[str, list[Trial]] = {}
    for part in parts:
        name = re.sub(r"[^A-Za-z0-9.#-]+", "_", judge.name)
        store = judgement_store(part.directory / "judgements" / f"{name}.jsonl")
        for arm, trials in finished_trials(part).items():
            with progress_bar(len(trials), f"{judge.name} on {arm}") as bar:
                again = judge_again(judge, trials, store, partial(_count, bar))
            judged.setdefault(arm, []).extend(again)
    return judged


def _count(bar: Bar, rows: int) -> None:
    bar(rows, 0)


def _notes(experiment: Experiment, parts: Sequence[Experiment], rows: Mapping[str, Sequence[Trial]]) -> Notes:
    topics = experiment.resources.prompts().topics
    held_out = sorted(topic for topic, split in topics.items() if split == "test")
    cells = [trial.cell for trial in rows["base"] if trial.cell.latent is not None]
    records = [record["made"] for part in (experiment, *parts) for record in part.cache.records().values()]
    commits = {
        f"{(each.get('commit') or 'unknown')[:12]}{' with changes' if each.get('dirty') else ''}" for each in records
    }
    noun = direction_noun(experiment.recipe)
    labels = {cell.label for cell in cells}
    stand_for = "that stand for these topics" if labels <= {*held_out} else f"that stand for {_some(labels)}"
    return {
        "held_out": {
            "topics": f"{len(held_out)} of {len(topics)}: {', '.join(held_out)}",
            f"{noun}s": f"{len({cell.latent for cell in cells})} {noun}s {stand_for}",
            "prompts": f"{len({cell.prompt for cell in cells})} prompts on these topics",
        },
        f"{noun}s": latent_facts(experiment.directory, noun),
        "form": [f"{arm}: {form(experiment.recipe, arm)}" for arm in rows],
        "judge": experiment.resources.judge().name,
        "model": experiment.recipe.model.path,
        "seeds": ", ".join(str(part.recipe.seed) for part in parts),
        "made by": ", ".join(sorted(commits)),
        **({"outdated": lines} if (lines := outdated_lines((experiment, *parts))) else {}),
    }


def _some(labels: Collection[str | None]) -> str:
    names = sorted(filter(None, labels))
    more = len(names) - MOST_LABELS
    return ", ".join(names[:MOST_LABELS]) + (f" and {more} other subjects" if more > 0 else "") or "nothing known"


def mixtures(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Sweep -> arm -> share of self-correction rows; a sweep has two shares at least.

    A sweep is named after its first arm with a number at the end, without that number.
    """
    groups: dict[str, dict[str, float]] = {}
    for arm in recipe.trained_arms:
        section, seen = recipe.arms[arm], recipe.for_arm(arm)
        if seen.data.self_correction is None:
            continue
        data = seen.data.model_dump(mode="json", exclude={"self_correction"})
        other = section.model_dump(mode="json", exclude={"data", "train"})
        alike = json.dumps([data, seen.train.model_dump(mode="json"), other], sort_keys=True)
        groups.setdefault(alike, {})[arm] = seen.data.self_correction
    found: dict[str, dict[str, float]] = {}
    for arms in groups.values():
        if len(set(arms.values())) > 1:
            numbered = (arm for arm in arms if _NUMBER.search(arm))
            name = _NUMBER.sub("", next(numbered, next(iter(arms))))
            found[name if name and name not in found else "+".join(arms)] = arms
    return found
