"""What resistance costs good steering: how far replies are what the base model writes when it is asked in words."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from test_given_adapter import SMALL, adapter  # noqa: F401 - a fixture
from test_vector_making import LAYER, mean_state

from esr_train.errors import InputError
from esr_train.recipe import EvalSection
from esr_train.steering.directions import Direction
from esr_train.steering.engine import Request
from esr_train.steering.vector_making import Reply, vectors_of_instructions
from esr_train.template import prompt_text
from esr_train.transcript import SaeRef
from eval.cells import Cell, Prompt
from eval.conditions import CONDITIONS, Setting, is_attack
from eval.metrics import pair_key
from eval.obedience import Reading, Written, good_steering, read_replies, reading_store, scales
from eval.report.story import tables
from eval.report.tables import save_tables
from eval.store import Trial, read_trials
from eval.summary import read_summary, summarise
from eval.trials import Steerer
from recipes.cli import main
from recipes.experiment import read_recipe
from recipes.planning.preflight import check
from recipes.planning.workload import Lengths, workload
from recipes.resources import Resources
from recipes.stages.goal_steering import PROMPTS
from tests.trial_maker import made


@dataclass
class FakeScorer:
    """Every token has log-probability −2, but −1 behind "Be brief." where the reply is "Yes."."""

    asked: list[tuple[str, str]] = field(default_factory=list)

    def log_probabilities(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[tuple[float, ...]]:
        pairs = [(request.prompt, text) for request, text in zip(requests, continuations, strict=True)]
        self.asked += pairs
        return [(-1.0 if prompt.endswith("Be brief.") and text == "Yes." else -2.0,) * 3 for prompt, text in pairs]


def reading(goal: str, prompt: str, gain: float, asked: bool = False) -> Reading:
    return Reading(f"{goal} {prompt} {asked}", goal, prompt, asked, -2.0, -2.0 + gain)


def test_a_reply_obeys_by_how_much_likelier_the_instruction_makes_a_token_of_it(tmp_path):
    scorer, file = FakeScorer(), tmp_path / "readings.jsonl"
    written = [
        Written("a", "terse", "How?", "Yes."),
        Written("b", "terse", "How?", "You"),
        Written("c", "terse", "", ""),
    ]
    read_replies(scorer, {"terse": "Be brief."}, written, reading_store(file))
    found = reading_store(file).by_key()
    assert {key: each.instructed - each.plain for key, each in found.items()} == {"a": 1.0, "b": 0.0}
    assert {prompt for prompt, _ in scorer.asked} == {"How?", "How? Be brief."}
    read_replies(again := FakeScorer(), {"terse": "Be brief."}, written, reading_store(file))
    assert again.asked == [], "what was read is not read again"


def test_the_base_models_own_replies_are_0_and_100():
    own = [reading("terse", f"p{n}", -0.1 + 0.01 * (n % 3)) for n in range(12)]
    own += [reading("terse", f"p{n}", 0.3 + 0.01 * (n % 2), asked=True) for n in range(12)]
    scale = scales(own)["terse"]
    assert scale.differs
    assert (scale.plain, scale.instructed) == (pytest.approx(-0.09), pytest.approx(0.305))
    middle = (scale.plain + scale.instructed) / 2
    values = [scale.obedience(reading("terse", "x", gain)) for gain in (scale.plain, middle, scale.instructed)]
    assert values == pytest.approx([0, 50, 100])


def test_an_instruction_that_changes_nothing_sets_no_scale():
    gains = [0.2 * (-1) ** n for n in range(12)]
    own = [reading("deaf", f"p{n}", gain) for n, gain in enumerate(gains)]
    own += [reading("deaf", f"p{n}", -gain, asked=True) for n, gain in enumerate(gains)]
    assert not scales(own)["deaf"].differs
    assert "silent" not in scales([reading("silent", "p", 0.1)]), "nothing was written behind its instruction"


def trial(arm: str, goal: str, number: int, score: float, attempts: int = 1) -> Trial:
    cell = {
        "prompt": f"How do I fold sheet {number}?", "topic": "linen", "latent": len(goal), "label": goal,
        "strength": {"raw": 1.0, "norm": 0.2}, "seed": number,
    }  # fmt: skip
    found = [{"start": n, "end": n + 1, "score": score} for n in range(attempts)]
    return made(key=f"{arm}/goals/{goal}{number}", arm=arm, condition="goals", cell=cell, attempts=found)


@pytest.fixture
def measured():
    """Base obeys by 60 and 80; tuned by 20 less, restarts in every reply to `list`, and once says nothing."""
    rows = {
        arm: [
            trial(arm, goal, n, 90, 1 + (arm == "tuned" and goal == "list"))
            for goal in ("terse", "list")
            for n in range(8)
        ]
        for arm in ("base", "tuned")
    }
    level = {("base", "terse"): 60.0, ("base", "list"): 80.0, ("tuned", "terse"): 40.0, ("tuned", "list"): 60.0}
    obedience = {
        arm: {pair_key(row): level[arm, row.cell.label] + row.cell.seed % 2 for row in own} for arm, own in rows.items()
    }
    del obedience["tuned"][pair_key(rows["tuned"][0])]
    return rows, good_steering(rows, obedience, 200)


def test_arms_are_compared_goal_by_goal_and_on_the_cells_that_both_have(measured):
    _, found = measured
    assert [*found] == ["base", "tuned", "tuned-base"]
    assert [*found["base"]] == ["terse", "list", "all"]
    assert found["base"]["terse"]["obedience"].value == pytest.approx(60.5)
    assert found["base"]["all"]["obedience"].value == pytest.approx(70.5)
    assert found["tuned"]["terse"]["obedience"].n == 7, "an empty reply obeys nothing and disobeys nothing"
    lost = found["tuned-base"]["all"]["obedience"]
    assert (lost.value, lost.n) == (pytest.approx(-20), 15)
    assert lost.high < 0
    assert found["tuned"]["list"]["multi_attempt_rate"].value == 1
    assert found["tuned-base"]["list"]["multi_attempt_rate"].value == 1
    assert found["tuned-base"]["all"]["last_score"].value == 0


def test_good_steering_stands_in_metrics_tables_and_on_the_terminal(measured, tmp_path):
    rows, found = measured
    summary = summarise(rows, 20)
    object.__setattr__(summary, "goals", found)
    (tmp_path / "metrics.json").write_text(json.dumps(summary.to_json()))
    again = read_summary(tmp_path / "metrics.json")
    assert again.goals == found
    said = "\n".join(tables(again))
    assert "Good steering" in said
    (line,) = [each for each in said.splitlines() if each.startswith("list   tuned") and "100" in each]
    assert "−20" in line
    save_tables(tmp_path, again)
    (row,) = [
        each
        for each in csv.DictReader((tmp_path / "goals.csv").open())
        if (each["goal"], each["arm"], each["measure"]) == ("all", "tuned-base", "obedience")
    ]
    assert float(row["value"]) == pytest.approx(-20)


def test_goals_steer_test_prompts_at_half_their_threshold():
    directions = {n: Direction(1, name, torch.eye(4)[n], 2.0, 5.0, SaeRef("s", "0"), n) for n, name in enumerate("ab")}
    cells = [Cell(f"latents' {n}", "linen", 7, "baking", 1.0, n) for n in range(6)]
    prompts = [Prompt(f"How do I fold sheet {n}?", "linen") for n in range(3)]
    steerer = Steerer(directions, {0: 0.4, 1: 0.8})
    given = Setting("tuned", cells, steerer, 0, None, None, None, prompts=prompts, goals=steerer)
    plan = CONDITIONS["goals"].plan(given)
    assert len(plan.cells) == 6
    assert {(cell.label, cell.prompt) for cell in plan.cells} == {
        (name, each.text) for name in "ab" for each in prompts
    }
    assert {cell.label: plan.steerer.strength(cell).norm for cell in plan.cells} == {"a": 0.2, "b": 0.4}
    assert not {cell.seed for cell in plan.cells} & {cell.seed for cell in cells}
    assert not is_attack("goals")


def test_an_instructions_vector_is_the_mean_over_its_replies_tokens_minus_that_without_it(llama):
    asked, plain = (prompt_text(llama.tokenizer, f"How do I fold a sheet?{more}") for more in (" Be brief.", ""))
    said = {"terse": [Reply(asked, "Knead the dough."), Reply(asked, "Raise the mast."), Reply(asked, " ")]}
    without = [Reply(plain, "Trim the jib.")]
    (vector,) = vectors_of_instructions(llama.model, llama.tokenizer, said, without, LAYER, 3.0)

    def state(reply: Reply) -> torch.Tensor:
        start = len(llama.tokenizer.encode(reply.asked, add_special_tokens=False)) - 1
        return mean_state(llama, reply.asked + reply.text, start)

    expected = torch.stack([state(each) for each in said["terse"][:2]]).mean(dim=0) - state(without[0])
    torch.testing.assert_close(vector.add(raw=1.0).vector, expected, atol=1e-4, rtol=1e-3)
    assert (vector.label, vector.layer, vector.residual_norm) == ("terse", LAYER, 3.0)


@pytest.mark.parametrize(
    ("goals", "message"),
    [
        ({}, r"'goals' needs goals in eval\.goals"),
        ({"all": "Be brief."}, r"not 'all'"),
        ({"terse": " "}, "a goal has a name .* and an instruction"),
    ],
)
def test_goals_that_say_nothing_are_refused(goals, message):
    with pytest.raises(ValueError, match=message):
        EvalSection(conditions=("unsteered", "goals"), goals=goals)


WANTED = ("eval.conditions=[steered, unsteered, goals]", "eval.goals={terse: Be brief., list: Write a list.}")


def test_vllm_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match="how far replies obey a goal is read from their log-probabilities"):
        check(read_recipe("tiny/quickstart", [f"runs={tmp_path}", *WANTED, "engine.kind=vllm"]))


def test_the_plan_counts_replies_thresholds_and_readings(tmp_path):
    recipe = read_recipe("tiny/quickstart", [f"runs={tmp_path}", *WANTED, "eval.control_trials=10"])
    works = {each.name: each for each in workload(Resources(recipe, asks=False), Lengths(20.0, 30.0, {}))}
    assert [(batch.kind, batch.requests) for batch in works["goals"].batches] == [
        ("goals", 2 * PROMPTS * 3),
        ("calibrate", 2 * 6 * 3),
    ]
    assert works["goals"].read == 2 * PROMPTS * 2 * 2 * 50
    assert works["goals"].covers("goals-calibrate")
    assert works["trials tuned"].covers("obedience/tuned")
    assert works["trials tuned"].read == 128 * 50 + 2 * 10 * (20 + 128)


@pytest.mark.slow
def test_an_adapter_is_measured_towards_goals_and_a_second_run_does_nothing(adapter, tmp_path, capsys):  # noqa: F811
    goals = "eval.goals={bread: Tell me how to knead the dough., paint: Tell me how to paint the wallpaper.}"
    arms = f"arms={{given: {{adapter: {adapter}}}, asked: {{of: given, prompt: '{{prompt}} Why?'}}}}"
    words = ["run", "tiny/quickstart", f"runs={tmp_path}", *SMALL, WANTED[0], goals, arms, "eval.trials=8"]
    assert main(words) == 0, capsys.readouterr().err
    folder = tmp_path / "quickstart"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"base", "given", "given-base", "asked", "asked-base"} == {*metrics["goals"]}
    trials = [each for each in read_trials(folder / "trials" / "given.jsonl") if each.condition == "goals"]
    assert {each.cell.label for each in trials} == {"bread", "paint"} - {*left_out(capsys.readouterr().out)}
    assert all(each.steered_tokens for each in trials)
    assert metrics["goals"]["base"]["all"]["obedience"]["n"] == 8
    assert 'id="goals"' in (folder / "report.html").read_text()
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.parent.name in ("goals", "obedience")}
    assert len(files) == 5 + 3
    (folder / "goals" / "vectors.safetensors").unlink()
    trials_before = (folder / "trials" / "given.jsonl").stat().st_mtime_ns
    assert main(words) == 0
    assert {path: path.read_bytes() for path in files} == files, "an interrupted stage goes on where it stopped"
    assert (folder / "trials" / "given.jsonl").stat().st_mtime_ns == trials_before


def left_out(said: str) -> list[str]:
    return [line.split()[1] for line in said.splitlines() if line.startswith("goal ") and "is left out" in line]
