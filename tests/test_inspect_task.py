"""Cells as an inspect_ai task: the same responses and numbers as our own run, in its log."""

import pytest

pytest.importorskip("inspect_ai", reason="inspect_ai is missing: pip install '.[llm]'")

import anyio
from inspect_ai import eval as inspect_eval

from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection
from esr_train.steering.direction_files import load_sae
from esr_train.steering.engine import Sampling
from esr_train.steering.latent_labels import read_labels
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.transcript import SaeRef
from eval.arms import Arm, Variant
from eval.cells import make_cells, read_prompts, unsteered
from eval.inspect_cells import batches, cells_task
from eval.judging.lexical import LexicalJudge
from eval.store import TrialStore
from eval.summary import estimate
from eval.trials import Plan, Steerer, run_trials
from tests.conftest import ASSETS

SAMPLING = Sampling(max_new_tokens=12)
ASKED = Variant(prompt="{prompt} Check the answer from time to time.")


@pytest.fixture(scope="module")
def tiny():
    """Engine, judge, steerer and six cells of the tiny world."""
    section = ModelSection(path=str(ASSETS / "llama"), dtype="float32", device="cpu")
    engine = TransformersEngine(load_model(section), load_tokenizer(section), batch_rows=8)
    judge = LexicalJudge.from_file(ASSETS / "vocabulary.json")
    labels = read_labels(ASSETS / "llama-sae" / "labels.jsonl")
    sae = load_sae(SaeRef(str(ASSETS), "llama-sae"))
    directions = {latent: sae.direction(latent, 1.0, labels[latent]) for latent in list(labels)[:3]}
    steerer = Steerer(directions, dict.fromkeys(directions, 0.5))
    cells = make_cells(read_prompts(ASSETS / "prompts.jsonl")[:40], list(directions.values()), 6, seed=0)
    return engine, judge, steerer, cells


@pytest.mark.parametrize("condition", ["steered", "unsteered"])
def test_inspect_finds_the_responses_and_the_numbers_of_our_own_run(tiny, tmp_path, condition):
    engine, judge, steerer, cells = tiny
    chosen = cells if condition == "steered" else unsteered(cells)
    store = TrialStore(tmp_path / "base.jsonl")
    begun = {chosen[0].key: "Start by"}
    plan, arm = Plan(tuple(chosen), steerer, begun), Arm(engine, judge, SAMPLING, variant=ASKED)
    ours = run_trials(arm, condition, plan, store)
    task = cells_task(arm, condition, plan, rows=4)
    (log,) = inspect_eval(task, model=None, display="none", log_dir=str(tmp_path / "logs"))
    assert log.status == "success", log.error
    by_cell = {str(sample.id): sample for sample in log.samples}
    assert {key: begun.get(key, "") + sample.output.completion for key, sample in by_cell.items()} == {
        cell.key: trial.response for cell, trial in zip(chosen, ours, strict=True)
    }
    assert all(sample.input[0].text.endswith("time to time.") for sample in log.samples)
    assert {sample.output.metadata["steered_tokens"] > 0 for sample in log.samples} == {condition == "steered"}
    (score,) = log.results.scores
    expected = estimate(ours, "first_score")
    assert score.metrics["first_score"].value == pytest.approx(expected.value)
    assert score.metrics["first_score_low"].value == pytest.approx(expected.low)
    assert score.metrics["first_score_n"].value == 6


def test_concurrent_callers_share_batches_of_neighbours_and_each_gets_its_own():
    seen = []

    def run(keys):
        seen.append(list(keys))
        return [10 * int(key) for key in keys]

    async def ask():
        get, found = batches([str(number) for number in range(10)], run, rows=4), {}

        async def one(key):
            found[key] = await get(key)

        async with anyio.create_task_group() as group:
            for number in reversed(range(10)):
                group.start_soon(one, str(number))
        return found

    assert anyio.run(ask) == {str(number): 10 * number for number in range(10)}
    assert sorted(seen) == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]]


def test_what_goes_wrong_in_a_batch_is_raised_for_each_of_its_callers():
    def run(keys):
        raise OSError("no space left")

    async def ask():
        get, errors = batches(["a", "b", "c"], run, rows=4), []

        async def one(key):
            try:
                await get(key)
            except OSError as error:
                errors.append(str(error))

        async with anyio.create_task_group() as group:
            for key in "abc":
                group.start_soon(one, key)
        return errors

    assert anyio.run(ask) == ["no space left"] * 3
