"""The probe reports what the engine wrote and the judge said, steered and unsteered apart."""

import json

from test_trials import JUDGE, PROMPTS, SAMPLING, FakeDirection, FakeEngine
from training_world import SAE, recipe, write_world

from esr_train.steering.engine import Sampling
from esr_train.steering.sae import load_sae
from esr_train.training.trainer import train
from eval.cells import make_cells
from eval.judging.judge import Judgement
from eval.probe import observe, probing
from eval.trials import Steerer

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
