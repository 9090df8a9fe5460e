"""The whole road on a cut-down quickstart: it ends in a report, does nothing twice, and survives being killed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from esr_train.files import read_json, write_jsonl
from esr_train.transcript import read_transcripts
from eval.store import read_trials, trial_to_json
from recipes.cli import main
from recipes.noticing import monitors
from tests.small_run import CONDITIONS, TRIALS, Run, dying, new_run

pytestmark = pytest.mark.slow

METRICS = {
    "multi_attempt_rate", "esr_rate", "esr10_rate", "worsening_rate", "restart_rate", "first_score", "last_score",
    "improvement", "silent_recovery_rate", "degenerate_rate", "parroting_rate", "hijack_rate",
}  # fmt: skip
REWRITTEN = {".lock", "run.log"}
"""What every call writes; all else is a stage's."""


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody interrupted."""
    run = new_run(tmp_path_factory.mktemp("whole"), assets)
    result = dying(run, 0)
    assert result.returncode == 0, result.stderr[-3000:]
    return Run(run.folder, run.words, int(result.stdout.rpartition("moments: ")[2]))


def stage_files(folder: Path) -> dict[str, int]:
    """Every file of a stage and when it was written last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in REWRITTEN]
    kept = [path for path in files if path.parent.name not in ("figures", "tables")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in kept}


def test_the_road_ends_in_metrics_with_the_documented_keys(finished):
    metrics = read_json(finished.folder / "metrics.json")
    assert metrics["schema"] == 1
    assert set(metrics["arms"]) == {"base", "tuned"}
    assert set(metrics["arms"]["base"]) == {"steered", "unsteered"}
    assert set(metrics["arms"]["tuned"]) == set(CONDITIONS)
    assert set(metrics["paired"]) == {"tuned-base"}
    for arms in (metrics["arms"], metrics["paired"]):
        for conditions in arms.values():
            for found in conditions.values():
                assert set(found) >= METRICS
                assert all(set(each) == {"value", "low", "high", "n", "unscored"} for each in found.values())
    steered = metrics["arms"]["tuned"]["steered"]["multi_attempt_rate"]
    assert steered["n"] + steered["unscored"] == TRIALS
    assert metrics["paired"]["tuned-base"]["steered"]["last_score"]["n"] == TRIALS
    kept = metrics["retention"]
    assert (kept["base"]["value"], kept["base"]["n"], kept["tuned"]["n"]) == (1, TRIALS, TRIALS)
    assert 0.5 < kept["tuned"]["value"] != 1
    own, base = (read_json(finished.folder / name) for name in ("calibration/tuned.json", "thresholds.json"))
    within = {each["latent"] for each in base["thresholds"] if not each["bound"]}
    assert metrics["resistance"]["tuned"]["n"] == len(within & {each["latent"] for each in own["thresholds"]})


def test_the_run_directory_holds_what_is_documented(finished):
    folder = finished.folder
    names = ("recipe.yaml", "stages.json", "thresholds.json", "metrics.json", "report.html")
    assert all((folder / name).is_file() for name in names)
    assert (folder / "adapter" / "tuned" / "adapter_model.safetensors").is_file()
    assert list((folder / "figures").glob("*.svg"))
    rows = read_transcripts(folder / "data" / "tuned.jsonl")
    assert (sum(row.corrects for row in rows), len(rows)) == (6, 12)
    assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]


def test_both_arms_ran_the_same_cells_and_none_that_training_knew(finished):
    base, tuned = (read_trials(finished.folder / "trials" / f"{arm}.jsonl") for arm in ("base", "tuned"))
    cells = [{row.cell for row in rows if row.condition == "steered"} for rows in (base, tuned)]
    assert cells[0] == cells[1]
    assert len(cells[0]) == TRIALS
    assert all((row.steered_tokens > 0) == (row.condition != "unsteered") for row in (*base, *tuned))
    rows = read_transcripts(finished.folder / "data" / "tuned.jsonl")
    taught = {row.steering.label for row in rows if row.steering}
    assert taught
    assert not {row.prompt for row in rows} & {row.cell.prompt for row in base}
    assert not taught & {row.cell.label for row in base}


def test_a_finished_run_started_again_does_nothing_new(finished):
    before, metrics = stage_files(finished.folder), (finished.folder / "metrics.json").read_bytes()
    assert len(before) > 10
    assert main(finished.words) == 0
    assert stage_files(finished.folder) == before
    assert (finished.folder / "metrics.json").read_bytes() == metrics


def test_the_single_commands_find_the_same_run_done(finished, capsys):
    before, metrics = stage_files(finished.folder), (finished.folder / "metrics.json").read_bytes()
    words = finished.words[1:]
    assert main(["eval", "calibrate", *words]) == 0
    assert main(["data", "generate", *words]) == 0
    assert main(["eval", "run", *words, "--arm", "tuned"]) == 0
    names = ("thresholds.json", "data/tuned.jsonl", "trials/tuned.jsonl")
    said = capsys.readouterr().out.splitlines()
    assert [str(finished.folder / name) for name in names] == [line for line in said if Path(line).is_file()]
    (finished.folder / "metrics.json").unlink()
    assert main(["eval", "report", str(finished.folder)]) == 0
    assert (finished.folder / "metrics.json").read_bytes() == metrics
    assert main(["data", "stats", str(finished.folder)]) == 0
    assert "self-correction: 6 (50.0%)" in capsys.readouterr().out
    after = stage_files(finished.folder)
    assert {name for name in before if after[name] != before[name]} == {"metrics.json", "report.html", "stages.json"}


def test_a_changed_setting_repeats_its_stage_and_what_follows_only(finished, tmp_path):
    copy = tmp_path / "quickstart"
    shutil.copytree(finished.folder, copy)
    before = stage_files(copy)
    assert main([*finished.words, f"runs={tmp_path}", "train.lora.r=8"]) == 0
    after = stage_files(copy)
    changed = {name for name in before if after.get(name) != before[name]}
    kept = {"thresholds.json", "data/tuned.jsonl", "trials/base.jsonl"}
    assert kept <= set(before)
    assert not changed & kept
    assert {"adapter/tuned/adapter_model.safetensors", "trials/tuned.jsonl"} <= changed


def test_monitors_are_fitted_on_a_run_measured_on_its_trials_and_act_in_an_arm(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monitors, "EPISODES", 8)
    monkeypatch.setattr(monitors, "LEVEL_REPLIES", 40)
    copy = tmp_path / "quickstart"
    shutil.copytree(finished.folder, copy)
    assert main(["monitor", "eval", str(copy)]) == 2
    assert "esr monitor fit" in capsys.readouterr().err
    assert main(["monitor", "fit", str(copy), "--false-alarms", "0.1"]) == 0
    replies = next((copy / "monitor").glob("replies-*.jsonl"))
    made = replies.read_bytes()
    assert made.count(b"\n") == 2 * 8 + 40
    assert main(["monitor", "fit", str(copy), "--false-alarms", "0.1", "--layer", "4"]) == 0
    assert replies.read_bytes() == made, "replies are made once"
    assert main(["monitor", "eval", str(copy)]) == 0
    found = read_json(copy / "monitor" / "eval.json")
    assert {arm: [each["name"] for each in rows] for arm, rows in found["arms"].items()} == {
        "base": ["probe", "perplexity"], "tuned": ["probe"],
    }  # fmt: skip
    assert found["arms"]["base"][0]["caught"]["n"] == TRIALS
    assert set(found["milliseconds_per_token"]) == {"none", "probe"}
    file = copy / "monitor" / "probe.json"
    file.write_text(json.dumps({**read_json(file), "threshold": 0.0}))
    arms = {"guarded": {"of": "base", "monitor": {"file": str(file)}}, "tuned": {}}
    words = [*finished.words[1:], f"runs={tmp_path}", f"arms={json.dumps(arms)}", "--arm", "guarded"]
    assert main(["eval", "run", *words]) == 0
    trials = read_trials(copy / "trials" / "guarded.jsonl")
    assert {trial.variant.monitor for trial in trials} == {"restart"}
    assert any(trial.alarms and trial.cue for trial in trials if trial.condition == "steered")
    file.write_text(json.dumps({**read_json(file), "threshold": 9.0}))
    assert main(["eval", "run", *words]) == 0, "another monitor makes the trials anew"
    assert not any(trial.alarms for trial in read_trials(copy / "trials" / "guarded.jsonl"))


def test_the_course_of_a_run_is_read_around_its_restarts(finished, tmp_path, capsys):
    copy = tmp_path / "quickstart"
    shutil.copytree(finished.folder, copy)
    path = copy / "trials" / "tuned.jsonl"
    text = "Explain the sheet and fold it. Wait, that is not right. Then fold the sheet."
    rows = [
        replace(row, response=text)
        if number % 2 and row.condition == "steered"
        else replace(row, response="Fold. " * 20)
        for number, row in enumerate(read_trials(path))
    ]
    write_jsonl(path, map(trial_to_json, rows))
    assert main(["latents", "course", str(copy)]) == 2
    assert "esr latents search" in capsys.readouterr().err
    assert main(["latents", "course", str(copy), "--latents", "3", "17"]) == 0
    found = read_json(copy / "course" / "tuned" / "course.json")
    restarts = sum(row.response == text for row in rows)
    assert (found["latents"], found["regions"]["cue"]["n"]) == ([3, 17], restarts)
    assert (copy / "course" / "tuned" / "episodes.html").read_text().count("│") == restarts
    assert 'name="colour"' not in (copy / "report.html").read_text()
    assert main(["eval", "report", str(copy)]) == 0
    assert 'name="colour"' in (copy / "report.html").read_text()


def test_a_run_killed_again_and_again_ends_in_the_same_metrics(finished, assets, tmp_path):
    wanted = (finished.folder / "metrics.json").read_bytes()
    run, rng = new_run(tmp_path, assets), Random(finished.moments)
    # The second run has fewer moments left than the first, and the last ones write the report.
    for limit in (2 * finished.moments // 3, finished.moments // 8):
        result = dying(run, rng.randrange(1, limit))
        assert result.returncode == -9, result.stderr[-3000:]
        assert not (run.folder / "metrics.json").exists()
    result = dying(run, 0)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (run.folder / "metrics.json").read_bytes() == wanted


def test_several_seeds_share_the_base_s_thresholds_and_end_in_one_report(finished, assets, tmp_path):
    run = new_run(tmp_path, assets)
    shutil.copytree(finished.folder, run.folder)  # what the seeds share is there
    small = ("train.args.max_steps=3", f"eval={{trials: {TRIALS}, conditions: [steered], bootstrap: 50}}")
    result = dying(Run(run.folder, [*run.words, *small, "seeds=[3, 4]", "workers=2"]), 0)
    assert result.returncode == 0, result.stderr[-3000:]
    parts = [run.folder / f"seed-{seed}" for seed in (3, 4)]
    counts = [read_json(folder / "metrics.json")["arms"]["tuned"]["steered"]["last_score"]["n"] for folder in parts]
    assert counts == [TRIALS, TRIALS]
    together = read_json(run.folder / "metrics.json")
    assert together["arms"]["tuned"]["steered"]["last_score"]["n"] == 2 * TRIALS
    assert together["paired"]["tuned-base"]["steered"]["last_score"]["n"] == 2 * TRIALS
    thresholds = [read_json(folder / "thresholds.json")["thresholds"] for folder in (run.folder, *parts)]
    assert thresholds[0] == thresholds[1] == thresholds[2]
    cells = [{row.cell.seed for row in read_trials(folder / "trials" / "base.jsonl")} for folder in parts]
    assert not cells[0] & cells[1]
