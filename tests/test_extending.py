"""A source, a condition, a judge, a metric and a figure from outside the package, named by a recipe's `plugins`."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_gen.sources import register_source
from esr_train.errors import InputError
from esr_train.recipe import JudgeSection, SourceSection, import_plugin
from esr_train.transcript import SpanKind, read_transcripts
from eval.conditions import CONDITIONS, register_condition
from eval.judging.judge import register_judge
from eval.metrics import metric
from eval.report.figures import figure
from eval.store import read_trials
from tests.conftest import ROOT
from tests.small_run import command, new_run

PLUGINS = sorted((ROOT / "examples" / "plugins").glob("*.py"))
DETOURS = ("The web is sticky.", "The tarantula naps.")
PROGRAM = """
import json, sys
from recipes.cli import main
for words in json.loads(sys.argv[1]):
    if code := main(words):
        sys.exit(code)
"""
"""In a process of its own: what plug-ins register stays there."""


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory) -> Path:
    """The directory of a small run with rows by the new source, and trials of the base model alone."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "detours.txt").write_text("\n".join(DETOURS))
    new_run(folder, assets)
    common = [*command(assets, folder, folder / "prompts.jsonl")[1:], f"plugins={json.dumps([*map(str, PLUGINS)])}"]
    planted = f"data={{planted: {{rows: 6, texts: {folder / 'detours.txt'}}}, min_answer_score: 0}}"
    rows = [
        "data",
        "generate",
        *common,
        planted,
        "sae=null",
        "train.live=null",
        "eval.conditions=[unsteered]",
        "name=rows",
    ]
    trials = [
        *("run", *common, "arms={asked: {of: base, prompt: '{prompt} Please.'}}", "judges=[{kind: overlap}]"),
        *("name=trials", "eval={trials: 8, conditions: [steered, unsteered, opposite], bootstrap: 20}"),
    ]
    program = [sys.executable, "-c", PROGRAM, json.dumps([rows, trials])]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_every_kind_of_thing_that_can_be_added_has_an_example():
    assert [path.stem for path in PLUGINS] == ["condition", "figure", "judge", "metric", "source"]


def test_a_source_from_outside_makes_the_rows_that_a_recipe_asks_for(run):
    rows = read_transcripts(run / "rows" / "data" / "tuned.jsonl")
    assert len(rows) == 6
    assert all([span.kind for span in row.spans] == list(SpanKind) and row.spans[0].text in DETOURS for row in rows)


def test_a_condition_from_outside_is_run_by_every_arm(run):
    for arm in ("base", "asked"):
        rows = read_trials(run / "trials" / "trials" / f"{arm}.jsonl")
        opposite = {row.cell.strength.norm for row in rows if row.condition == "opposite"}
        assert opposite
        assert max(opposite) < 0 < min(row.cell.strength.norm for row in rows if row.condition == "steered")


def test_a_judge_from_outside_is_compared_with_the_recipe_s_own(run):
    assert "overlap-4" in (run / "trials" / "agreement.json").read_text()


def test_a_metric_and_a_figure_from_outside_stand_in_the_report(run):
    metrics = json.loads((run / "trials" / "metrics.json").read_text())
    assert metrics["arms"]["asked"]["opposite"]["early_restart_rate"]["n"] == 8
    with (run / "trials" / "figures" / "response_lengths.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"base", "asked"}
    assert "How long responses are" in (run / "trials" / "report.html").read_text()


@pytest.mark.parametrize(
    "register",
    [
        lambda: register_source("steered", SourceSection),
        lambda: register_condition(CONDITIONS["steered"]),
        lambda: register_judge("lexical", JudgeSection),
        lambda: metric("esr_rate", "ESR")(lambda trial: 0.0),
        lambda: figure("rates", "Rates")(lambda material: None),
    ],
    ids=["source", "condition", "judge", "metric", "figure"],
)
def test_a_name_that_is_taken_is_refused(register):
    with pytest.raises(ValueError, match=r"taken|already"):
        register()


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("import os\n\nraise KeyError('x')\n", 3, "KeyError: 'x'"),
        ("x = 1\ndef f(:\n", 2, "SyntaxError"),
        ("import json\n\n\njson.loads('{')\n", 4, "JSONDecodeError"),
    ],
)
def test_a_plug_in_that_cannot_be_imported_is_named_with_its_line(tmp_path, text, line, said):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"plugins: {file}:{line}: importing it fails \({said}"):
        import_plugin(str(file))
