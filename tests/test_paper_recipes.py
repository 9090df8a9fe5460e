"""`recipes/paper/`: one recipe for each experiment of the paper, each of which runs, cut down, on the tiny world."""

import json
import re
from pathlib import Path

import pytest

from esr_train.files import read_json, write_jsonl
from esr_train.steering.latent_labels import read_labels
from eval.cells import read_prompts
from eval.conditions import measured_conditions
from recipes import FOLDER
from recipes.cli import main
from recipes.experiment import read_recipe
from recipes.noticing import latent_search
from recipes.stages.results import mixtures

FILES = sorted((FOLDER / "paper").glob("*.yaml"))
FAST = ("01", "08")
TRIALS = 6
SMALL = {
    "engine.batch_rows": 24,
    "model.dtype": "float32",
    "model.attn_implementation": "eager",
    "model.device": "cpu",
    "sampling.max_new_tokens": 24,
    "eval.trials": TRIALS,
    "eval.bootstrap": 20,
}
CALIBRATION = {"rounds": 2, "prompts": 2, "bounds": [0.1, 2.0], "max_new_tokens": 16, "verify": 0}
TRAINING = {
    "data": {"prompted": {"rows": 8}, "normal": {"rows": 8}, "max_detour_score": 100, "min_answer_score": 0,
             "trim_answers": True},
    "train.lora.r": 4,
    "train.args.max_steps": 2,
    "train.args.warmup_steps": 1,
    "train.args.optim": "adamw_torch",
    "prompts.splits.validation": 0.2,
    "arms": {"mix_50": {"data": {"self_correction": 0.5}}},
}  # fmt: skip


def test_there_is_one_recipe_for_each_experiment_and_the_table_names_it():
    assert [path.name[:2] for path in FILES] == [f"{number:02d}" for number in range(1, 11)]
    table = (FOLDER / "paper" / "README.md").read_text()
    for number, path in enumerate(FILES, start=1):
        head = path.read_text().partition("\nname:")[0]
        assert head.startswith(f"# Experiment {number} of the paper: ")
        assert re.findall(r"^# (Needs|Differs|Costs) ", head, re.MULTILINE) == ["Needs", "Differs", "Costs"]
        assert f"| {number} |" in table
        assert f"`{path.name}`" in table
        assert read_recipe(path).name == f"paper-{path.stem}"


def test_the_mixtures_differ_in_their_share_alone_and_are_drawn_as_one_sweep():
    shares = {f"mix_{number}": number / 100 for number in range(10, 100, 10)}
    assert mixtures(read_recipe(FOLDER / "paper" / "04-fine-tuning.yaml")) == {"mix": shares}


def changes(path: Path, assets: Path, folder: Path) -> list[str]:
    """What puts the tiny world in the place of model, SAE, judge and prompts, and makes everything small."""
    recipe = read_recipe(path)
    judge = {"kind": "lexical", "vocabulary": str(assets / "vocabulary.json")}
    values = SMALL | {"runs": str(folder), "model.path": str(assets / "llama"), "judge": judge}
    values |= {"prompts.path": str(folder / "prompts.jsonl"), "calibration": CALIBRATION}
    values |= {"latents.concreteness": None, "latents.limit": 4}
    values["sae"] = {"release": str(assets), "id": "llama-sae", "labels": str(assets / "llama-sae" / "labels.jsonl")}
    if recipe.judges:
        values["judges"] = [{"kind": "likelihood"}]
    return [f"{key}={json.dumps(each)}" for key, each in (values | (TRAINING if recipe.trained_arms else {})).items()]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem[:2] in FAST else [pytest.mark.slow]) for path in FILES],
    ids=[path.stem for path in FILES],
)
def test_a_recipe_runs_cut_down_on_the_tiny_world(path, assets, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_search, "SEARCHED", 40)
    monkeypatch.setattr(latent_search, "HELD_OUT", 20)
    topics = sorted(set(read_labels(assets / "llama-sae" / "labels.jsonl").values()))[:12]
    rows = [each for each in read_prompts(assets / "prompts.jsonl") if each.topic in topics]
    write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": each.text, "topic": each.topic} for each in rows))
    recipe, words = read_recipe(path), changes(path, assets, tmp_path)
    assert main(["run", str(path), *words]) == 0
    run = tmp_path / recipe.name
    found = read_json(run / "metrics.json")["arms"]
    assert (run / "report.html").is_file()
    arms = ("base", "mix_50") if recipe.trained_arms else ("base", *recipe.arms)
    assert list(found) == list(arms)
    for arm in arms:
        wanted = {measured.name for measured in measured_conditions(recipe.eval)}
        assert set(found[arm]) == wanted - ({"steered_recalibrated"} if arm == "base" else set())
    assert (run / "agreement.json").is_file() == bool(recipe.judges)
