"""`esr eval import`: the paper's result files become trials whose rates our statistics compute."""

import json
from pathlib import Path
from typing import Any

import pytest

from esr_train.files import read_json, write_json
from eval.__main__ import main as evaluate
from eval.paper_results import read_results
from eval.store import read_trials
from tests.conftest import ROOT

REAL = sorted((ROOT.parent / "shared" / "data" / "paper").glob("experiment_results_*.json"))
FIRST, SECOND = "Bees swarm in spring.", "Wait, that was about bees. Fold the corners in first."


def result(seed: int, score: Any, response: str = f"{FIRST} {SECOND}", **changes: Any) -> dict[str, Any]:
    return {"prompt": "How do I fold a sheet?", "threshold": 80.0, "seed": seed, "response": response, "score": score,
            **changes}  # fmt: skip


def split(*scores: Any, texts: tuple[str, ...] = (FIRST, SECOND)) -> dict[str, Any]:
    return {"attempts": [{"attempt_text": text, "score": score} for text, score in zip(texts, scores, strict=False)]}


def feature(latent: int, *trials: Any, **changes: Any) -> dict[str, Any]:
    return {"feature_index_in_sae": latent, "feature_label": "bees", "threshold": 80.0, "error": None,
            "trials": list(trials), **changes}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "experiment_results_test.json"
    features = [
        feature(7, result(1, split("20", "90")), result(2, {"error": "the judge timed out"})),
        feature(8, result(1, split(30)), result(1, split("N/A", 250)), result(1, split("25/100", 10))),
        feature(9, error="no threshold found", trials=None),
        feature(10, result(1, split(95), threshold=0), result(1, split(15), threshold=120)),
    ]
    config = {"model_name": "m", "judge_model_name": "j"}
    write_json(path, {"experiment_config": config, "results_by_feature": features})
    return path


def test_the_rates_are_computed_anew_from_the_imported_trials(results, tmp_path, capsys):
    assert evaluate(["import", str(results), "--out", str(tmp_path / "run")]) == 0
    found = read_json(tmp_path / "run" / "metrics.json")["arms"]["base"]
    steered = found["steered"]
    assert (steered["multi_attempt_rate"]["value"], steered["multi_attempt_rate"]["n"]) == (0.75, 4)
    assert steered["multi_attempt_rate"]["unscored"] == 1
    assert (steered["esr_rate"]["n"], steered["esr_rate"]["unscored"]) == (3, 2)
    assert steered["esr_rate"]["value"] == pytest.approx(1 / 3)
    assert steered["esr_rate"]["low"] is not None
    assert steered["first_score"]["value"] == pytest.approx((20 + 30 + 25) / 3)
    assert steered["restart_position"]["n"] == 0
    assert found["unsteered"]["first_score"]["value"] == 95
    assert found["boost_x1.5"]["first_score"]["value"] == 15
    said = capsys.readouterr().out
    assert "7 trials imported" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "1: 9" in page


def test_attempts_are_ranges_of_the_response_and_repeats_keep_apart(results):
    trials = read_results(results, "paper").trials
    both = trials[0]
    ranges = [both.response[each.start : each.end].strip() for each in both.attempts]
    assert ranges == [FIRST, SECOND]
    assert [trial.seed for trial in trials if trial.cell.latent == 8] == [0, 1, 2]
    assert len({trial.key for trial in trials}) == len(trials)
    assert {trial.judge for trial in trials} == {"j"}


def test_an_attempt_that_is_not_quoted_as_it_stands_begins_at_the_restart(tmp_path):
    path = tmp_path / "experiment_results_test.json"
    told = split(10, 60, texts=("something about insects", "an improved answer"))
    write_json(path, {"results_by_feature": [feature(1, result(1, told))]})
    start = read_results(path, "paper").trials[0].attempts[1].start
    assert start == len(FIRST) + 1


def test_a_second_import_is_another_arm_of_the_same_run(results, tmp_path):
    run = tmp_path / "run"
    for arm in ("base", "tuned"):
        assert evaluate(["import", str(results), "--out", str(run), "--arm", arm]) == 0
    paired = read_json(run / "metrics.json")["paired"]["tuned-base"]["steered"]["multi_attempt_rate"]
    assert (paired["value"], paired["n"]) == (0, 4)
    assert len(read_trials(run / "trials" / "tuned.jsonl")) == 7


def test_the_run_of_a_recipe_is_left_alone(results, tmp_path, capsys):
    (tmp_path / "recipe.yaml").touch()
    assert evaluate(["import", str(results), "--out", str(tmp_path)]) == 2
    assert "a folder of its own" in capsys.readouterr().err
    assert not (tmp_path / "trials").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[]", "this is not an object: []"),
        ("{}", "the key 'results_by_feature' is missing"),
        ('{"results_by_feature": [{"feature_index_in_sae": 5.9}]}', "feature_index_in_sae is not a whole number: 5.9"),
        (
            '{"results_by_feature": [{"feature_index_in_sae": true}]}',
            "not a whole number: true",
        ),
        ('{"results_by_feature": [], "results_by_feature": []}', "comes twice"),
        (json.dumps({"results_by_feature": [feature(1, result(1.5, {}))]}), "trials[0].seed is not a whole number"),
        (json.dumps({"results_by_feature": [feature(1, result(1, {}), threshold=float("nan"))]}), "no finite number"),
        ("", "not valid JSON"),
        ('{"results_by_feature": []}', "no trial"),
        ('{"results_by_feature": [3]}', "results_by_feature[0]"),
        ('{"results_by_feature": [{"feature_index_in_sae": "x"}]}', "feature_index_in_sae"),
        (json.dumps({"results_by_feature": [feature(1, result(1, {}, response=3))]}), "trials[0].response"),
        (json.dumps({"results_by_feature": [feature(1, result(1, {}, threshold="far"))]}), "trials[0].threshold"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_of_another_form_is_refused_by_its_place(tmp_path, capsys, content, named):
    path = tmp_path / "experiment_results_test.json"
    path.write_text(content)
    assert evaluate(["import", str(path), "--out", str(tmp_path / "run")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not REAL, reason="the paper's result files are not here")
@pytest.mark.parametrize("path", REAL[:2], ids=lambda path: path.name)
def test_a_published_file_is_imported_whole(path):
    values = read_json(path)
    trials = read_results(path, "paper").trials
    assert len(trials) == sum(len(each.get("trials") or []) for each in values["results_by_feature"])
