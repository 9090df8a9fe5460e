"""Thresholds are measured when something needs them, and no latent is asked twice."""

from pathlib import Path

import pytest
from test_bad_input import world  # noqa: F401 - the fixture

from esr_train.files import read_json
from eval.store import read_trials
from recipes.cli import main


@pytest.fixture
def run(world: Path) -> Path:  # noqa: F811
    split = "prompts: {path: prompts.jsonl, splits: {validation: 0.34, test: 0.3}}\narms: {}\n"
    text = Path("recipe.yaml").read_text().replace("prompts:\n  path: prompts.jsonl\n", "")
    Path("recipe.yaml").write_text(text + split)
    return world / "runs" / "t"


def thresholds(run: Path) -> dict[int, float]:
    return {each["latent"]: each["norm"] for each in read_json(run / "thresholds.json")["thresholds"]}


def scores(run: Path) -> list[str]:
    (file,) = (run / "calibration").glob("base-*.jsonl")
    return file.read_text().splitlines()


def test_more_latents_leave_the_thresholds_that_are_known(run):
    assert main(["eval", "calibrate", "recipe.yaml", "latents.limit=3"]) == 0
    few, known = thresholds(run), scores(run)
    assert len(few) == len(known) == 3
    assert read_json(run / "latents.json")["funnel"] == {"kept": 3, "beyond latents.limit": 3}
    assert main(["eval", "calibrate", "recipe.yaml", "latents.limit=null"]) == 0
    assert len(thresholds(run)) == 6
    assert few.items() <= thresholds(run).items()
    assert scores(run)[:3] == known
    assert len(scores(run)) == 6


def test_cues_do_not_change_thresholds(run):
    assert main(["eval", "calibrate", "recipe.yaml"]) == 0
    before = (run / "thresholds.json").stat().st_mtime_ns
    Path("cues.txt").write_text("Wait, no.\n")
    assert main(["eval", "calibrate", "recipe.yaml", "data.cues=cues.txt"]) == 0
    assert (run / "thresholds.json").stat().st_mtime_ns == before
    Path("prompts.jsonl").write_text(Path("prompts.jsonl").read_text() + '{"prompt": "New?", "topic": "new"}\n')
    assert main(["eval", "calibrate", "recipe.yaml"]) == 0
    assert (run / "thresholds.json").stat().st_mtime_ns > before


def test_an_evaluation_that_steers_nothing_calibrates_nothing(run):
    words = ["recipe.yaml", "eval.conditions=[unsteered]"]
    assert main(["eval", "run", *words]) == 0
    assert len(read_trials(run / "trials" / "base.jsonl")) == 2
    assert not (run / "thresholds.json").exists()
    assert main(["eval", "report", str(run)]) == 0
    assert "6 of 6 labelled latents are in play" in (run / "report.html").read_text()


def test_a_latent_at_a_bound_is_left_out_and_counted(run, capsys):
    assert main(["eval", "calibrate", "recipe.yaml", "calibration.rounds=40"]) == 0
    left_out = sum(each["bound"] is not None for each in read_json(run / "thresholds.json")["thresholds"])
    funnel = read_json(run / "data" / "thresholds.funnel.json")
    assert left_out > 0
    assert funnel["kept"] == 6 - left_out
    assert sum(funnel.values()) == 6
    assert f"{left_out} left out at a bound" in capsys.readouterr().out
