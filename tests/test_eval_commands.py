"""`esr eval compare` and `esr eval report`: what stands on disk, shown and reported anew."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from esr_train.files import write_json, write_jsonl
from eval.__main__ import main as evaluate
from eval.metrics import METRICS
from eval.store import Trial, TrialStore
from eval.summary import summarise
from tests.conftest import ROOT
from tests.trial_maker import made

TUNED_LAST = 80.0


def trial(arm: str, number: int, condition: str = "steered") -> Trial:
    """A response about sheets; the tuned arm's comes back at a second attempt."""
    restarts = arm == "tuned" and condition == "steered"
    attempts = [{"start": 0, "end": 10, "score": 20.0}]
    if restarts:
        attempts.append({"start": 10, "end": 20, "score": TUNED_LAST})
    steered = condition == "steered"
    cell = {
        "prompt": f"How do I fold a sheet? ({number})",
        "topic": "folding",
        "latent": number % 4 if steered else None,
        "label": "baking" if steered else None,
        "strength": {"raw": 2.0, "norm": 0.5} if steered else None,
        "seed": number,
    }
    return made(
        key=f"{arm}/{condition}/{number}", arm=arm, condition=condition, seed=number, cell=cell,
        response="Knead it. " * 2, tokens=8, steered_tokens=8 if steered else 0, attempts=attempts, cue=restarts,
        judge="j",
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run directory's inputs: resolved recipe, thresholds and trials."""
    folder = tmp_path / "moved"
    prompts, vocabulary = tmp_path / "prompts.jsonl", tmp_path / "vocabulary.json"
    topics = ("folding", "baking", "sailing", "chess")
    write_jsonl(prompts, ({"prompt": f"How about {topic}?", "topic": topic} for topic in topics))
    write_json(vocabulary, {topic: [f"{topic}word"] for topic in topics})
    values = {
        "name": "t", "model": {"path": "model"}, "prompts": {"path": str(prompts)},
        "judge": {"vocabulary": str(vocabulary)}, "eval": {"bootstrap": 50},
    }  # fmt: skip
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    write_json(folder / "thresholds.json", {"key": {}, "thresholds": []})
    for arm in ("base", "tuned"):
        store = TrialStore(folder / "trials" / f"{arm}.jsonl")
        store.add(trial(arm, n, condition) for condition in ("steered", "unsteered") for n in range(8))
    return folder


def test_a_report_is_written_anew_from_the_trials_on_disk(run, capsys):
    assert evaluate(["report", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["arms"]["tuned"]["steered"]["last_score"]["value"] == TUNED_LAST
    assert set(metrics["paired"]["tuned-base"]["unsteered"]) == set(METRICS)
    first = (run / "metrics.json").read_bytes()
    (run / "metrics.json").unlink()
    assert "<html" in (run / "report.html").read_text()
    assert evaluate(["report", str(run)]) == 0
    assert (run / "metrics.json").read_bytes() == first


def test_a_report_without_trials_says_how_to_get_them(run, capsys):
    (run / "trials" / "tuned.jsonl").unlink()
    assert evaluate(["report", str(run)]) == 2
    assert "esr eval run" in capsys.readouterr().err
    assert not (run / "metrics.json").exists()
    assert not (run / "report.html").exists()


def test_compare_shows_every_arm_with_its_interval_and_the_difference_on_shared_cells(tmp_path, capsys):
    rows = {arm: [trial(arm, number) for number in range(8)] for arm in ("base", "tuned")}
    write_json(tmp_path / "metrics.json", summarise(rows, bootstrap=50).to_json())
    assert evaluate(["compare", str(tmp_path)]) == 0
    steered, paired = capsys.readouterr().out.split("\n\n")
    lines = {line.split()[0]: line for line in steered.splitlines()[2:]}
    assert steered.splitlines()[1].split() == ["base", "tuned"]
    assert "100" in lines["multi_attempt_rate"]
    assert "80 [80 to 80] (n 8)" in lines["last_score"]
    assert "restart_rate" not in lines
    difference = {line.split()[0]: line for line in paired.splitlines()[2:]}
    assert "+60 [+60 to +60] (n 8)" in difference["last_score"]


def test_compare_gives_latex_and_a_page(tmp_path, capsys):
    runs = [str(finished(tmp_path / name)) for name in ("one", "two")]
    assert evaluate(["compare", *runs, "--latex", "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert out.count(r"\begin{tabular}") == out.count(r"\end{tabular}") == 2
    assert "one/tuned" in out
    assert 'id="headline"' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_figures_for_print_are_written_on_request_and_refused_in_a_silly_size(run, capsys):
    assert evaluate(["report", str(run), "--width", "3.3"]) == 0
    made = {path.suffix for path in (run / "figures" / "print").iterdir()}
    assert made == {".pdf", ".svg", ".png"}
    assert evaluate(["report", str(run), "--font", "0"]) == 2
    assert "--font" in capsys.readouterr().err


def test_compare_shows_every_metric_on_request(tmp_path, capsys):
    write_json(tmp_path / "metrics.json", summarise({"base": [trial("base", 1)]}, bootstrap=10).to_json())
    assert evaluate(["compare", str(tmp_path), "--all"]) == 0
    assert set(METRICS) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("content", ["[]", '{"arms": {"base": {"steered": {"last_score": 3}}}, "paired": {}}'])
def test_compare_refuses_what_is_no_metrics_file(tmp_path, capsys, content):
    (tmp_path / "metrics.json").write_text(content)
    assert evaluate(["compare", str(tmp_path)]) == 2
    assert "not a metrics.json" in capsys.readouterr().err


def finished(folder: Path, base: int = 8, **changes: str) -> Path:
    """A run directory with the trials of a base and a tuned arm."""
    for arm in ("base", "tuned"):
        rows = [replace(trial(arm, number), **changes) for number in range(base)]
        TrialStore(folder / "trials" / f"{arm}.jsonl").add(rows)
    return folder


def test_compare_sets_the_arms_of_several_runs_beside_each_other(tmp_path, capsys):
    runs = [str(finished(tmp_path / name)) for name in ("one", "two")]
    assert evaluate(["compare", *runs]) == 0
    steered, paired = capsys.readouterr().out.split("\n\n")
    assert steered.splitlines()[1].split() == ["base", "one/tuned", "two/tuned"]
    assert paired.splitlines()[1].split() == ["one/tuned-base", "two/tuned-base"]
    assert paired.count("+60 [+60 to +60] (n 8)") >= 2


def test_compare_keeps_another_base_whose_responses_differ(tmp_path, capsys):
    runs = [str(finished(tmp_path / "one")), str(finished(tmp_path / "two", response="Fold it again. "))]
    assert evaluate(["compare", *runs]) == 0
    assert "two/base" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"base": 5}, "share 5 of 8 and 5 cells of 'steered'"), ({"judge": "other"}, "judge: 'j' and 'other'")],
)
def test_compare_refuses_runs_that_measured_differently_unless_told(tmp_path, capsys, changes, named):
    runs = [str(finished(tmp_path / "one")), str(finished(tmp_path / "two", **changes))]
    assert evaluate(["compare", *runs]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "--anyway" in said
    assert evaluate(["compare", *runs, "--anyway"]) == 0
    shared = changes.get("base", 8)
    assert f"+60 [+60 to +60] (n {shared})" in capsys.readouterr().out


def test_compare_finds_the_trials_of_every_seed(tmp_path, capsys):
    several = finished(tmp_path / "several" / "seed-0").parent
    assert evaluate(["compare", str(several), str(finished(tmp_path / "one"))]) == 0
    assert "several/tuned" in capsys.readouterr().out


def test_compare_says_where_a_run_has_no_trials(tmp_path, capsys):
    assert evaluate(["compare", str(finished(tmp_path / "one")), str(tmp_path / "nowhere")]) == 2
    assert "nowhere/trials" in capsys.readouterr().err


def test_the_shipped_quickstart_can_be_named_where_a_report_is_asked_for(tmp_path, capsys):
    recipe = ROOT / "recipes" / "tiny" / "quickstart.yaml"
    assert evaluate(["report", str(recipe), f"runs={tmp_path}"]) == 2
    assert f"{tmp_path}/quickstart/trials/base.jsonl" in capsys.readouterr().err


def test_power_says_how_many_trials_and_latents_a_difference_takes(capsys):
    words = ["power", "--base", "0.01", "--icc", "0", "--other", "0.05", "--per-latent", "10"]
    assert evaluate(words) == 0
    few = int(capsys.readouterr().out.splitlines()[-1].split()[1])
    assert 280 <= few <= 300
    assert evaluate([*words[:3], "--icc", "0.1", *words[5:]]) == 0
    assert int(capsys.readouterr().out.splitlines()[-1].split()[1]) == pytest.approx(1.9 * few, rel=0.05)


def test_power_takes_rate_and_clustering_from_a_run(run, capsys):
    assert evaluate(["power", "--run", str(run)]) == 0
    said = capsys.readouterr().out
    assert "from 0.0%" in said
    assert "correlation 0.000" in said
    assert [line.split()[0] for line in said.splitlines()[3:]] == ["1.0%", "2.0%", "5.0%", "10.0%", "20.0%"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--base"),
        (["--base", "1.5"], "--base: 1.5 is not a share"),
        (["--base", "0.1", "--other", "0.1"], "no other rate"),
        (["--base", "0.1", "--per-latent", "0"], "--per-latent"),
        (["--run", "nowhere"], "nowhere/trials/base.jsonl"),
    ],
)
def test_power_names_what_is_wrong(words, named, capsys):
    assert evaluate(["power", *words]) == 2
    assert named in capsys.readouterr().err


def test_power_refuses_a_metric_that_is_no_rate(run, capsys):
    assert evaluate(["power", "--run", str(run), "--metric", "first_score"]) == 2
    assert "'first_score' is not a rate" in capsys.readouterr().err
