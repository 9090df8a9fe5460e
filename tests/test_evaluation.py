"""An evaluation with every condition and every kind of arm, very small: by one process, by two, killed, by inspect."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from esr_train.files import read_json, write_jsonl
from esr_train.steering.latent_labels import read_labels
from eval.beginnings import SQUARE
from eval.cells import read_prompts
from eval.conditions import CORRECTION, MATCHED
from eval.store import read_trials
from recipes.cli import main
from tests.conftest import ROOT
from tests.test_generate import free_port

pytestmark = pytest.mark.slow

TOPICS, TRIALS, CONTROLS = 12, 10, 6
FULL = {"steered": TRIALS, "unsteered": TRIALS}
SWEEP = ("boost_x0.5", "boost_x1.5")
ATTACKS = ("mid_answer", "three_layers", "adaptive")  # the others are conditions of one line: see test_conditions
BEGUN = (*SQUARE, CORRECTION, MATCHED)
OTHERS = (*ATTACKS, "random_direction", "random_latents", *BEGUN, "switched_off")
EVERY = FULL | dict.fromkeys((*SWEEP, *OTHERS), CONTROLS)
FIGURES = {
    "rates", "first_scores", "last_scores", "first_vs_last", "restart_position", "restart_likelihood", "boost_sweep",
    "prompt_variants", "prompting_and_tuning", "ablations", "thresholds", "training_loss", "unsteered_scores",
    "feel_or_read", "sustained_resistance", "attack_success", "attack_hijack",
}  # fmt: skip
HERE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def changes(assets: Path, runs: Path, prompts: Path) -> list[str]:
    """What makes `recipes/tiny/evaluation.yaml` as small as its stages allow."""
    cues = str(prompts.with_name("cues.txt"))
    short = {"start": [2, 3], "cut_words": [2, 3], "mid_sentence": 1.0}
    edit = {"ablate": [3, 17]}
    arms = {
        "tuned": {},
        "merged": {"of": "tuned", "merged": True, "conditions": ["steered", "unsteered"]},
        "half": {"of": "tuned", "scale": 0.5, "conditions": ["unsteered"]},
        "off": {"of": "tuned", "scale": 0, "conditions": ["unsteered"]},
        "asked": {"of": "tuned", "prompt": "{prompt} Check it.", "conditions": ["steered"]},
        "ablated": {"of": "tuned", "edit": edit, "conditions": ["steered"]},
        "control": {"of": "tuned", "edit": edit | {"matched_random": True}, "conditions": ["steered"]},
    }
    values = {
        "name": "all",
        "runs": str(runs),
        "prompts.path": str(prompts),
        "prompts.splits.validation": 0.2,
        "engine.batch_rows": 24,
        "sampling.max_new_tokens": 40,
        "calibration": {"rounds": 3, "prompts": 2, "bounds": [0.1, 2.0], "max_new_tokens": 32, "verify": 0},
        # Short detours, few cues, a loss on all of it and a steep rate: restarts after few steps.
        "data": {
            "steered": short | {"rows": 48},
            "normal": {"rows": 4},
            "cues": cues,
            "max_detour_score": 100,
            "min_answer_score": 0,
        },
        "train.loss": "unmasked",
        "train.args.max_steps": 40,
        "train.args.per_device_train_batch_size": 12,
        "train.args.learning_rate": 4e-3,
        "train.args.warmup_steps": 4,
        "train.args.save_steps": 40,
        "eval.trials": TRIALS,
        "eval.control_trials": CONTROLS,
        "eval.conditions": [*FULL, "boost", *OTHERS],
        "eval.boost": [0.5, 1.5],
        "eval.bootstrap": 50,
        "eval.restart_phrases": cues,
        "arms": arms,
    }
    return [str(ROOT / "recipes/tiny/evaluation.yaml"), *(f"{key}={json.dumps(each)}" for key, each in values.items())]


@pytest.fixture(scope="module")
def words(assets: Path, tmp_path_factory: pytest.TempPathFactory):
    """The recipe with its overrides, for a folder of runs."""
    folder = tmp_path_factory.mktemp("world")
    topics = sorted(set(read_labels(assets / "llama-sae" / "labels.jsonl").values()))[:TOPICS]
    rows = [each for each in read_prompts(assets / "prompts.jsonl") if each.topic in topics]
    write_jsonl(folder / "prompts.jsonl", ({"prompt": each.text, "topic": each.topic} for each in rows))
    (folder / "cues.txt").write_text("Wait, that is not right.\nHold on, that was wrong.\n")
    return lambda runs: changes(assets, runs, folder / "prompts.jsonl")


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, by one process."""
    runs = tmp_path_factory.mktemp("one")
    assert main(["eval", "run", *words(runs)]) == 0
    return runs / "all"


def test_every_condition_is_in_the_metrics_with_all_its_trials(finished):
    found = read_json(finished / "metrics.json")
    for arm, conditions in found["arms"].items():
        expected = EVERY if arm in ("base", "tuned") else {name: TRIALS for name in conditions}
        assert set(conditions) == set(expected)
        for condition, metrics in conditions.items():
            assert metrics["restart_rate"]["n"] == expected[condition], (arm, condition)
            assert metrics["first_score"]["n"] + metrics["first_score"]["unscored"] == expected[condition]


def test_arms_pair_cell_by_cell_in_every_condition(finished):
    found = read_json(finished / "metrics.json")
    for arm, conditions in found["arms"].items():
        if arm != "base":
            assert {name: each["restart_rate"]["n"] for name, each in found["paired"][f"{arm}-base"].items()} == {
                name: each["restart_rate"]["n"] for name, each in conditions.items()
            }
    assert {"merged", "asked", "ablated", "control"} < set(found["arms"])
    logprobs = found["paired"]["tuned-base"]["steered"]["restart_logprob"]
    assert logprobs["n"] == TRIALS
    assert logprobs["low"] <= logprobs["value"] <= logprobs["high"]


def test_a_condition_steers_as_its_name_says(finished):
    rows = read_trials(finished / "trials" / "tuned.jsonl")
    assert any(len(row.attempts) > 1 for row in rows if row.condition == "steered")
    by = {name: {row.cell.seed: row for row in rows if row.condition == name} for name in EVERY}
    for name, cells in by.items():
        begun = {seed for seed, row in cells.items() if row.prefix}
        steers = not name.startswith("unsteered")
        for seed, row in cells.items():
            assert (row.steered_tokens > 0) == (steers and not (name == "switched_off" and seed in begun))
        if name in BEGUN:
            assert begun == set(cells)
    for seed, row in by["boost_x1.5"].items():
        assert row.cell.strength.norm == pytest.approx(1.5 * by["steered"][seed].cell.strength.norm)
    assert all(
        by["random_latents"][seed].cell.latent != by["steered"][seed].cell.latent for seed in by["random_latents"]
    )
    merged = {row.key: row.response for row in read_trials(finished / "trials" / "merged.jsonl")}
    same = [merged[row.key.replace("tuned", "merged")] == row.response for row in rows if row.condition in FULL]
    assert sum(same) > 0.8 * len(same) == 0.8 * 2 * TRIALS


def test_an_adapter_that_is_switched_off_leaves_the_base_model_token_for_token(finished):
    def replies(arm: str) -> dict[int, str]:
        trials = read_trials(finished / "trials" / f"{arm}.jsonl")
        return {row.cell.seed: row.response for row in trials if row.condition == "unsteered"}

    base, half, off, tuned = map(replies, ("base", "half", "off", "tuned"))
    assert off == base
    assert len({str(each) for each in (base, half, tuned)}) == 3


def test_every_arm_is_attacked_along_directions_of_its_own_within_the_base_s_thresholds(finished):
    found = {arm: load_file(finished / "attacks" / f"{arm}.safetensors") for arm in ("base", "tuned")}
    searches = {arm: read_json(finished / "attacks" / f"{arm}.json") for arm in found}
    assert found["base"].keys() == found["tuned"].keys() == searches["base"].keys() == searches["tuned"].keys()
    assert any(not torch.equal(each, found["tuned"][latent]) for latent, each in found["base"].items())
    for search in (each for arm in searches.values() for each in arm.values()):
        assert all(min(curve) < curve[0] for curve in search["losses"].values())
        assert search["scores"][search["taken"]] == min(search["scores"].values())
    for row in read_trials(finished / "trials" / "tuned.jsonl"):
        if row.condition == "adaptive":
            assert row.cell.label
            assert row.steered_tokens > 0


def test_the_control_arm_ablates_other_latents(finished):
    edits = {
        arm: [row.variant.ablate for row in read_trials(finished / "trials" / f"{arm}.jsonl")]
        for arm in ("ablated", "control")
    }
    assert edits["ablated"] == [(3, 17)] * TRIALS
    assert len({*edits["control"][0]} - {3, 17}) == 2


def test_the_page_carries_every_figure_and_its_numbers_lie_beside_it(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f'<figure id="{name}">' in page, name
        table = list(csv.reader((finished / "figures" / f"{name}.csv").open(encoding="utf-8")))
        assert len(table) > 1
    assert {path.stem for path in (finished / "figures").glob("*.svg")} == FIGURES


def launched(words: list[str]) -> subprocess.Popen[str]:
    """`accelerate launch` on two processes."""
    door = ["--num_processes", "2", "--main_process_port", free_port(), "-m", "eval", "run"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/ddp.yaml"]
    command = [sys.executable, *launch, *door, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=HERE, **pipes)  # type: ignore[call-overload, no-any-return]


def described(folder: Path) -> dict[str, object]:
    """Every trial by its key; how likely restarts were may differ in the last decimal with the batch."""
    rows = [row for path in sorted((folder / "trials").glob("*.jsonl")) for row in read_trials(path)]
    return {row.key: (replace(row, restart_logprobs=()), len(row.restart_logprobs)) for row in rows}


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


def test_two_processes_killed_and_started_again_end_like_one(finished, words, tmp_path):
    (tmp_path / "all").mkdir()
    for name in ("latents.json", "thresholds.json", "stages.json", "calibration", "data"):
        part = finished / name
        (shutil.copytree if part.is_dir() else shutil.copy)(part, tmp_path / "all" / name)
    running = launched(words(tmp_path))
    base = tmp_path / "all" / "trials" / "base.jsonl"
    while not (base.is_file() and b"unsteered" in base.read_bytes()):
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    everyone = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    assert len(everyone) == 3
    for process in everyone:
        process.kill()
    psutil.wait_procs(everyone)
    assert not (tmp_path / "all" / "metrics.json").exists()
    told, errors = (again := launched(words(tmp_path))).communicate()
    assert again.returncode == 0, errors[-3000:]
    assert told.count("2 processes share the cells") == 1
    assert described(tmp_path / "all") == described(finished)
    assert read_json(tmp_path / "all" / "metrics.json") == rounded(read_json(finished / "metrics.json"))
    assert told.count("tuned, steered: 10 trials, second attempt") == 1
    assert errors.count("tuned: steered:   0%") == 1


def test_inspect_evaluates_an_arm_from_the_command_line_and_finds_the_same(finished, tmp_path):
    copy = tmp_path / "all"
    shutil.copytree(finished, copy)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(finished.parent), str(tmp_path)))
    command = [Path(sys.executable).parent / "inspect", "eval", "recipes/using/inspect_task.py", "--model", "none"]
    given = [f"-T{key}={value}" for key, value in {"recipe": recipe, "arm": "tuned", "condition": "unsteered"}.items()]
    logs = tmp_path / "logs"
    done = subprocess.run(
        [*command, *given, "--log-dir", logs, "--display", "plain"], cwd=ROOT, env=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    from inspect_ai.log import read_eval_log

    [path] = logs.glob("*.eval")
    log = read_eval_log(str(path))
    assert log.status == "success"
    rows = [row for row in read_trials(finished / "trials" / "tuned.jsonl") if row.condition == "unsteered"]
    assert {sample.output.completion for sample in log.samples or ()} == {row.response for row in rows}
    found = read_json(finished / "metrics.json")["arms"]["tuned"]["unsteered"]["last_score"]["value"]
    assert log.results
    assert log.results.scores[0].metrics["last_score"].value == pytest.approx(found)
