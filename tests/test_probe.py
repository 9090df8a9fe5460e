"""The probe reports what the engine wrote and the judge said, steered and unsteered apart."""

import json
from pathlib import Path

import pytest
from test_trials import JUDGE, PROMPTS, SAMPLING, FakeDirection, FakeEngine
from training_world import SAE, probed, recipe, write_world

from esr_train.__main__ import main
from esr_train.errors import InputError
from esr_train.recipe import LocalJudgeSection, dump_recipe
from esr_train.steering.direction_files import load_sae
from esr_train.steering.engine import Sampling
from esr_train.training.trainer import train
from eval.cells import make_cells
from eval.judging.judge import Judgement
from eval.trials import Steerer
from recipes.stages.training_probe import calibrated_probe, observe, probing

DIRECTIONS = {3: FakeDirection(3, "baking")}
STEERER = Steerer(DIRECTIONS, {3: 0.5})  # type: ignore[arg-type]


def test_a_training_is_probed_with_the_model_as_it_is(tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, family)
    args = {"max_steps": 2, "gradient_checkpointing": True}
    section = recipe(family.name, args=args, probe={"every": 1, "trials": 2})
    direction = load_sae(SAE).direction(3, residual_norm=1.0, label="baking")
    cells = make_cells(PROMPTS, [direction], 2, 0)
    make = probing(JUDGE, cells, Steerer({3: direction}, {3: 200.0}), Sampling(max_new_tokens=6), batch_rows=2)
    folder = train(section, "tuned", section.directory, probe=make)
    log = json.loads((folder / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "probe_restarts_steered" in entry] == [1, 2]
    samples = [json.loads(row) for row in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["condition"]) for row in samples] == [
        (1, "steered"), (1, "unsteered"), (2, "steered"), (2, "unsteered")
    ]  # fmt: skip
    assert len({row["response"] for row in samples}) > 1


def test_training_alone_probes_a_calibrated_run_and_loads_no_second_model(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    section = probed(recipe(args={"max_steps": 4}), every=2)
    Path("r.yaml").write_text(dump_recipe(section))
    monkeypatch.setattr("recipes.resources.load_model", None)
    assert main(["r.yaml"]) == 0
    folder = section.directory / "adapter" / "tuned"
    log = json.loads((folder / "training_log.json").read_text())
    found = [entry for entry in log if "probe_restarts_steered" in entry]
    assert [entry["step"] for entry in found] == [2, 4]
    assert all("probe_last_score_steered" in entry and "probe_last_score_unsteered" in entry for entry in found)
    samples = [json.loads(row) for row in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["condition"]) for row in samples] == [
        (2, "steered"), (2, "unsteered"), (4, "steered"), (4, "unsteered")
    ]  # fmt: skip


def test_a_run_that_is_not_calibrated_is_told_what_its_probe_needs(tmp_path, llama, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    section = probed(recipe(args={"max_steps": 1}))
    (section.directory / "thresholds.json").unlink()
    Path("r.yaml").write_text(dump_recipe(section))
    assert main(["r.yaml"]) == 2
    assert "Run `esr eval calibrate` with this recipe first, or set train.probe=null." in capsys.readouterr().err
    assert main(["r.yaml", "train.probe=null"]) == 0


def test_a_judge_of_our_own_is_not_loaded_beside_several_processes(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    section = probed(recipe())
    local = section.model_copy(update={"judge": LocalJudgeSection(model="model")})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"train\.probe: the judge cannot be loaded"):
        calibrated_probe(local, local.directory)


def test_only_the_process_that_logs_asks_the_judge():
    cells = make_cells(PROMPTS, list(DIRECTIONS.values()), 4, 0)
    assert observe(FakeEngine(), None, cells, STEERER, SAMPLING).figures.keys() == {
        "restarts_steered",
        "restarts_unsteered",
    }


class Silent:
    name = "silent"

    def judge(self, items):
        return [Judgement((), "silent", error="no answer") for _ in items]


def test_steered_and_unsteered_responses_are_counted_apart_and_one_of_each_is_shown():
    cells = make_cells(PROMPTS, list(DIRECTIONS.values()), 4, 0)
    found = observe(FakeEngine(), JUDGE, cells, STEERER, SAMPLING)
    assert found.figures["restarts_steered"] == 1.0
    assert found.figures["restarts_unsteered"] == 0.0
    assert 0 <= found.figures["last_score_unsteered"] <= 100
    assert [(row["condition"], row["label"]) for row in found.samples] == [("steered", "baking"), ("unsteered", None)]
    assert all(row["prompt"] == cells[0].prompt and row["response"] for row in found.samples)


def test_a_silent_judge_is_no_score_of_zero():
    cells = make_cells(PROMPTS, list(DIRECTIONS.values()), 4, 0)
    assert observe(FakeEngine(), Silent(), cells, STEERER, SAMPLING).figures.keys() == {
        "restarts_steered",
        "restarts_unsteered",
    }
