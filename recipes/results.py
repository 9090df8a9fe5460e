"""What an experiment found: the trials of all its seeds, combined."""

from collections.abc import Sequence
from pathlib import Path

from esr_train.errors import RunError
from esr_train.files import write_json
from eval.calibration import read_thresholds
from eval.judging.model_judge import ModelJudge
from eval.report.figures import Material
from eval.report.page import Notes, write_report
from eval.store import Trial
from eval.summary import summarise
from recipes.judge_panel import write_agreement
from recipes.pipeline import Experiment
from recipes.steering_latents import facts
from recipes.sweep import mixtures
from recipes.weights import form


def reports(top: Experiment, parts: Sequence[Experiment]) -> Path:
    """A report of every part, if the run has several, and one of them all; returns the latter's path."""
    for part in parts:
        if part is not top:
            report(part, [part])
    return report(top, parts)


def report(top: Experiment, parts: Sequence[Experiment]) -> Path:
    """Combine the parts' trials into `metrics.json` and `report.html` in the top directory."""
    rows: dict[str, list[Trial]] = {arm: [] for arm in ("base", *top.recipe.arms)}
    for part in parts:
        for arm, found in part.trials().items():
            rows[arm] += found
    if not rows["base"]:
        raise RunError("there is no trial to report.")
    summary = summarise(rows, top.recipe.eval.bootstrap, top.recipe.seed)
    write_json(top.directory / "metrics.json", summary.to_json())
    frozen = top.directory / "thresholds.json"
    thresholds = read_thresholds(frozen).thresholds if frozen.is_file() else ()
    material = Material(summary, rows, thresholds, write_agreement(top, parts, rows), mixtures(top.recipe))
    path = write_report(top.directory, top.recipe.name, material, _notes(top, parts, rows))
    for line in spent(top):
        print(line, flush=True)
    print(f"report: {path}", flush=True)
    return path


def spent(top: Experiment) -> list[str]:
    """What this process has asked its model judges, and what it cost, a line each."""
    judges = (top.world.judge, *top.world.other_judges)
    return [f"judge {judge.spent}" for judge in judges if isinstance(judge, ModelJudge)]


def _notes(top: Experiment, parts: Sequence[Experiment], rows: dict[str, list[Trial]]) -> Notes:
    topics = top.world.pools.topics
    held_out = sorted(topic for topic, split in topics.items() if split == "test")
    cells = [row.cell for row in rows["base"] if row.cell.latent is not None]
    latents = {cell.latent for cell in cells}
    prompts = {cell.prompt for cell in cells}
    return {
        "held_out": {
            "topics": f"{len(held_out)} of {len(topics)}: {', '.join(held_out)}",
            "latents": f"{len(latents)} latents that stand for these topics",
            "prompts": f"{len(prompts)} prompts on these topics",
        },
        "latents": facts((top.shared or top).directory),
        "form": [f"{arm}: {form(top.recipe, arm)}" for arm in rows],
        "judge": top.world.judge.name,
        "model": top.recipe.model.path,
        "seeds": ", ".join(str(part.recipe.seed) for part in parts),
    }
