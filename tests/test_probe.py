"""The probe reports what the engine wrote and the judge said, steered and unsteered apart."""

from test_trials import JUDGE, PROMPTS, SAMPLING, FakeDirection, FakeEngine

from eval.cells import make_cells
from eval.judging.judge import Judgement
from eval.probe import observe
from eval.trials import Steerer

DIRECTIONS = {3: FakeDirection(3, "baking")}
STEERER = Steerer(DIRECTIONS, {3: 0.5})  # type: ignore[arg-type]


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
