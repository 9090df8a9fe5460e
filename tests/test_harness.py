"""Tasks of lm-evaluation-harness: what is asked of every arm, what is refused, and what is made of the answers."""

import importlib.util
import json

import pytest

from esr_train.errors import InputError
from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection, RetentionSection
from eval.harness import TaskResult, kept, open_tasks, run_tasks
from eval.report.story import tables
from eval.report.tables import save_tables
from eval.summary import read_summary, summarise
from recipes.cli import main
from tests.conftest import ROOT
from tests.trial_maker import made

TASKS = ROOT / "recipes" / "tiny" / "tasks"
NAMING = RetentionSection(tasks=("tiny_naming",), limit=24)
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is NOT INSTALLED (extra `retention`)"
)


def result(*values: float) -> TaskResult:
    return TaskResult(sum(values) / len(values), {str(number): value for number, value in enumerate(values)})


def test_an_arm_is_compared_with_base_on_the_documents_that_both_have():
    base, own = [{"t/acc": result(*[1.0] * 20)}], [{"t/acc": result(*[1.0] * 10, *[0.0] * 12)}]
    found = kept(own, base)["t/acc"]
    assert found["own"].value == pytest.approx(10 / 22)
    assert found["own"].n == 22
    assert (found["minus_base"].value, found["minus_base"].n) == (-0.5, 20)
    assert found["minus_base"].high < 0
    assert set(kept(base, base)["t/acc"]) == {"own"}


def test_documents_are_the_clusters_and_several_runs_no_more_documents():
    once, thrice = (kept([{"t/acc": result(*[0.0, 1.0] * 12)}] * runs, [])["t/acc"]["own"] for runs in (1, 3))
    assert thrice.n == 3 * once.n
    assert thrice.low == pytest.approx(once.low, abs=0.02)


def test_a_number_of_all_documents_together_has_no_interval():
    found = kept([{"t/perplexity": TaskResult(7.5, {})}], [{"t/perplexity": TaskResult(7.0, {})}])["t/perplexity"]
    assert (found["own"].value, found["own"].low) == (7.5, None)


def test_tasks_stand_beside_the_arms_and_come_back_from_metrics_json(tmp_path):
    rows = {arm: [made(arm=arm, key=arm)] for arm in ("base", "tuned")}
    summary = summarise(rows, 20)
    base = [{"t/acc": result(1, 0)}]
    found = {"base": kept(base, base), "tuned": kept([{"t/acc": result(0, 0)}], base)}
    object.__setattr__(summary, "tasks", found)
    (tmp_path / "metrics.json").write_text(json.dumps(summary.to_json()))
    again = read_summary(tmp_path / "metrics.json")
    assert again.tasks == found
    said = "\n".join(tables(again))
    assert "Tasks, nobody steering" in said
    assert "t/acc  tuned  0.000" in said
    assert "-0.500" in said
    save_tables(tmp_path, again)
    assert (tmp_path / "tasks.csv").read_text().splitlines()[0] == "task,arm,of,value,low,high,n"


def test_without_the_harness_it_is_named(monkeypatch):
    monkeypatch.setattr("eval.harness.importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"not installed.*\[retention\]"):
        open_tasks(NAMING, TASKS)


@needs_harness
def test_a_task_or_folder_that_is_not_there_is_refused_with_a_near_one(tmp_path):
    with pytest.raises(InputError, match=r"no task 'tiny_namig'\. Did you mean tiny_naming"):
        open_tasks(RetentionSection(tasks=("tiny_namig",)), TASKS)
    with pytest.raises(InputError, match="no such folder of tasks"):
        open_tasks(NAMING, tmp_path / "none")


@needs_harness
def test_the_tiny_world_names_subjects(assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # data files are found from the task's folder on
    section = ModelSection(path=str(assets / "llama"), dtype="float32", device="cpu")
    found = run_tasks(load_model(section), load_tokenizer(section), NAMING, TASKS, 24)
    assert set(found) == {"tiny_naming/acc"}
    assert found["tiny_naming/acc"].value > 0.8
    assert len(found["tiny_naming/acc"].documents) == 24


@needs_harness
def test_a_run_asks_every_arm_and_reports_it(tmp_path, capsys):
    words = [f"runs={tmp_path / 'runs'}", "eval.trials=4", "eval.conditions=[unsteered]", "arms={}"]
    retention = f"eval.retention={{tasks: [tiny_naming], include: {TASKS}, limit: 8}}"
    assert main(["run", "tiny/quickstart", *words, retention]) == 0
    metrics = read_summary(tmp_path / "runs" / "quickstart" / "metrics.json")
    assert metrics.tasks["base"]["tiny_naming/acc"]["own"].n == 8
    capsys.readouterr()
    assert main(["run", "tiny/quickstart", *words, retention]) == 0
    assert "tiny_naming" not in capsys.readouterr().out.replace(retention, "")
