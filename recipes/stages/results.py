"""What an experiment found: the trials of all its seeds combined, further judges' scores, and the report."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from esr_train.errors import InputError, RunError
from esr_train.files import read_json, write_json
from esr_train.provenance import digest, sha256, source_hashes
from esr_train.recipe import Recipe
from esr_train.values import typed
from eval.beginnings import noticed_store
from eval.calibration import Threshold, read_thresholds
from eval.conditions import GOALS, measured_conditions
from eval.course import read_token_sums
from eval.harness import TaskResult, kept
from eval.judging.agreement import Agreement, Panel, agreement, judge_again, judgement_store
from eval.judging.judge import Judge
from eval.judging.model_judge import ModelJudge
from eval.metrics import pair_key
from eval.obedience import OBEDIENCE, good_steering, reading_store
from eval.report.drawing import save_for_print
from eval.report.figures import Material, draw_figures
from eval.report.page import Notes, write_report
from eval.report.story import Bar, progress_bar
from eval.resistance import resistance, thresholds_paired
from eval.retention import Reply, reply_store, retention
from eval.statistics import Estimate
from eval.store import Trial, read_trials
from eval.summary import RECALIBRATED, Summary, Table, read_summary, summarise
from recipes.experiment import Experiment, write_recipe
from recipes.noticing.given_beginnings import FOLDER as BEGINNINGS
from recipes.noticing.latent_course import FOLDER as COURSE
from recipes.noticing.latent_course import TOKENS
from recipes.stages.goal_steering import left_out, read_scales
from recipes.stages.measure import RETENTION
from recipes.stages.report_facts import facts, held_out, losses
from recipes.stages.stage_cache import Stage
from recipes.stages.steering_latents import THRESHOLDS, direction_noun, latent_facts, nearest_trained
from recipes.stages.weights import form

AGREEMENT, METRICS = "agreement.json", "metrics.json"
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
    recipe, arms = experiment.recipe, ("base", *experiment.recipe.arms)
    inputs = {
        "trials": [_trial_fingerprints(part) for part in parts],
        "eval": recipe.eval.model_dump(mode="json"),
        "arms": {name: arm.model_dump(mode="json") for name, arm in recipe.arms.items()},
        "judges": [judge.name for judge in experiment.resources.further_judges()],
        "name": recipe.name,
        "outdated": outdated_lines((experiment, *parts)),
        "course": {arm: sha256(file) for arm in arms if (file := _token_file(experiment, arm)).is_file()},
        "code": digest(source_hashes(("recipes.stages.results",))),
    }
    stage = Stage("report", inputs, ("metrics.json", "report.html"), ("recipes.stages.results",))
    experiment.cache.do(stage, lambda: report(experiment, parts))
    return experiment.directory / "report.html"


def _trial_fingerprints(part: Experiment) -> dict[str, str]:
    records = part.cache.records()
    decide = ("trials/", f"{RETENTION}/", "calibrate/", f"{BEGINNINGS}/", f"{OBEDIENCE}/")
    return {name: record["fingerprint"] for name, record in records.items() if name.startswith(decide)}


def report(experiment: Experiment, parts: Sequence[Experiment]) -> None:
    """Write `metrics.json`, `agreement.json` (with further judges) and `report.html` into the run directory.

    Raises:
        RunError: if there is no trial.
    """
    rows = _rows(parts)
    if not rows["base"]:
        raise RunError("there is no trial to report.")
    write_recipe(experiment)
    summary = _summary(experiment, parts, rows)
    write_json(experiment.directory / METRICS, summary.to_json())
    material = _material(experiment, parts, rows, summary)
    write_report(experiment.directory, experiment.recipe.name, material, _notes(experiment, parts, rows))


def write_print_figures(experiment: Experiment, parts: Sequence[Experiment], width: float, font: float) -> Path:
    """Write the report's figures as PDF, SVG and PNG; returns their folder.

    Args:
        parts: its runs.
        width: inches.
        font: points.
    """
    folder, summary = experiment.directory / "figures" / "print", read_summary(experiment.directory / METRICS)
    save_for_print(folder, draw_figures(_material(experiment, parts, _rows(parts), summary)), width, font)
    return folder


def _rows(parts: Sequence[Experiment]) -> dict[str, list[Trial]]:
    """Every arm's finished trials of all runs."""
    rows: dict[str, list[Trial]] = {arm: [] for arm in ("base", *parts[0].recipe.arms)}
    for part in parts:
        for arm, trials in finished_trials(part).items():
            rows[arm] += trials
    return rows


def _material(
    experiment: Experiment, parts: Sequence[Experiment], rows: Mapping[str, Sequence[Trial]], summary: Summary
) -> Material:
    frozen = experiment.directory / THRESHOLDS
    panel = judge_panel(experiment, parts, rows)
    return Material(
        summary,
        rows,
        read_thresholds(frozen).thresholds if frozen.is_file() else (),
        write_agreement(experiment, panel),
        mixtures(experiment.recipe),
        direction_noun(experiment.recipe),
        experiment.recipe.calibration.target,
        panel,
        losses(parts),
        {
            arm: [row for part in parts for row in noticed_store(part.directory / BEGINNINGS / f"{arm}.jsonl").rows()]
            for arm in rows
        },
        {arm: read_token_sums(file) for arm in rows if (file := _token_file(experiment, arm)).is_file()},
        scales(experiment.recipe),
        nearest_trained(experiment.directory),
    )


def _token_file(experiment: Experiment, arm: str) -> Path:
    return experiment.directory / COURSE / arm / TOKENS


def _summary(experiment: Experiment, parts: Sequence[Experiment], rows: Mapping[str, Sequence[Trial]]) -> Summary:
    """What the trials say, and beside it each arm's own thresholds and what it kept of ordinary answers."""
    section, seed = experiment.recipe.eval, experiment.recipe.seed
    pairs = {arm: _threshold_pairs(parts, arm) for arm in rows}
    replies = {arm: _replies(parts, arm) for arm in rows}
    results = {arm: _task_results(parts, arm) for arm in rows}
    return replace(
        summarise(rows, section.bootstrap, seed),
        resistance={arm: resistance(each, section.bootstrap, seed) for arm, each in pairs.items() if each},
        retention={
            arm: retention(each, replies["base"], section.bootstrap, seed)
            for arm, each in replies.items()
            if each and replies["base"]
        },
        tasks={arm: kept(each, results["base"], section.bootstrap, seed) for arm, each in results.items() if each},
        goals=_goals(experiment, parts, rows),
    )


def _goals(experiment: Experiment, parts: Sequence[Experiment], rows: Mapping[str, Sequence[Trial]]) -> Table[Estimate]:
    """How far replies obey goals that they were steered towards, and what else became of them."""
    section, found = experiment.recipe.eval, read_scales(experiment)
    trials = {arm: [row for row in own if row.condition == GOALS] for arm, own in rows.items()}
    obedience = {}
    for arm, own in trials.items():
        files = {part.recipe.seed: part.directory / OBEDIENCE / f"{arm}.jsonl" for part in parts}
        read = {seed: reading_store(file, writes=False).by_key() for seed, file in files.items()}
        readings = [(row, reading) for row in own if (reading := read[row.seed].get(row.key)) and reading.goal in found]
        obedience[arm] = {pair_key(row): found[reading.goal].obedience(reading) for row, reading in readings}
    return good_steering(trials, obedience, section.bootstrap, experiment.recipe.seed)


def _task_results(parts: Sequence[Experiment], arm: str) -> list[dict[str, TaskResult]]:
    """What an arm scored in tasks, of each run that asked it."""
    files = [part.directory / RETENTION / f"{arm}.tasks.json" for part in parts if part.recipe.eval.retention]
    return [typed(dict[str, TaskResult], read_json(file)) for file in files if file.is_file()]


def _threshold_pairs(parts: Sequence[Experiment], arm: str) -> list[tuple[Threshold, Threshold]]:
    """(own, base) thresholds of a recalibrated arm in all runs."""
    recipe = parts[0].recipe
    own: Sequence[str] | None = recipe.arms[arm].conditions if arm != "base" else []
    if RECALIBRATED not in (recipe.eval.conditions if own is None else own):
        return []
    files = [(part.directory / "calibration" / f"{arm}.json", part.directory / THRESHOLDS) for part in parts]
    return [
        pair
        for mine, base in files
        if mine.is_file() and base.is_file()
        for pair in thresholds_paired(read_thresholds(mine).thresholds, read_thresholds(base).thresholds)
    ]


def _replies(parts: Sequence[Experiment], arm: str) -> dict[str, Reply]:
    """What an arm was read of the base model's replies, by run and trial."""
    if "unsteered" not in parts[0].recipe.eval.conditions:
        return {}
    stores = {part.recipe.seed: reply_store(part.directory / RETENTION / f"{arm}.jsonl") for part in parts}
    return {f"{seed}/{reply.key}": reply for seed, store in stores.items() for reply in store.rows()}


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


def write_agreement(experiment: Experiment, panel: Panel) -> Agreement | None:
    """Write `agreement.json` if several judges were asked, else remove an old one."""
    path = experiment.directory / AGREEMENT
    if len(panel) < 2:
        path.unlink(missing_ok=True)
        return None
    compared = agreement(panel, experiment.recipe.eval.bootstrap, experiment.recipe.seed)
    write_json(path, asdict(compared))
    return compared


def judge_panel(experiment: Experiment, parts: Sequence[Experiment], rows: Mapping[str, Sequence[Trial]]) -> Panel:
    """The trials as each judge of the recipe scores them; what further ones said lies in the parts' `judgements/`."""
    panel = {experiment.resources.judge().name: rows}
    for number, judge in enumerate(experiment.resources.further_judges()):
        if judge.name in panel:
            raise InputError(
                f"the judge {judge.name} is named twice",
                f"judges.{number}",
                "Remove it; a model is asked a second time (test-retest) under another `repeat`.",
            )
        panel[judge.name] = _judged_again(judge, parts)
    return panel


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


def _unseen(experiment: Experiment, trials: Sequence[Trial], noun: str) -> Notes:
    if experiment.recipe.latents.held_out:
        return {"held_out": held_out(experiment, trials, noun)}
    return {"not known": f"whether what was given was trained on these prompts or {noun}s"}


def _notes(experiment: Experiment, parts: Sequence[Experiment], rows: Mapping[str, Sequence[Trial]]) -> Notes:
    noun = direction_noun(experiment.recipe)
    return {
        "run": facts(experiment, parts, rows),
        **_unseen(experiment, rows["base"], noun),
        f"{noun}s": latent_facts(experiment.directory, noun),
        "form": [f"{arm}: {form(experiment.recipe, arm)}" for arm in rows],
        "seeds": ", ".join(str(part.recipe.seed) for part in parts),
        **({"goals left out": lost} if (lost := left_out(experiment)) else {}),
        **({"outdated": lines} if (lines := outdated_lines((experiment, *parts))) else {}),
    }


def scales(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Adapter -> arm -> the share of it that is at work; base is at 0. Only where arms differ in that alone."""
    found: dict[str, dict[str, float]] = {}
    for name, arm in recipe.arms.items():
        if not (arm.model or arm.merged or arm.prompt or arm.edit or arm.monitor or arm.of == "base"):
            origin = name if arm.is_trained else str(arm.of or arm.adapter)
            found.setdefault(origin, {"base": 0.0})[name] = arm.scale
    return {origin: arms for origin, arms in found.items() if len(set(arms.values())) > 2}


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
