"""`esr eval adapter`: what somebody gave you is measured without a recipe, from a folder or the hub, to a report."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model

from esr_train.adapters import adapter_source
from esr_train.errors import InputError
from esr_train.files import write_jsonl
from esr_train.models import load_model
from esr_train.steering.latent_labels import read_labels
from eval.__main__ import main as evaluate
from eval.store import read_trials
from recipes.using.given_adapter import PROMPTS, Given, adapter_recipe

SMALL = (
    "model.dtype=float32",
    "model.device=cpu",
    "latents.limit=3",
    "calibration={rounds: 2, prompts: 2, bounds: [0.1, 2.0], max_new_tokens: 16, verify: 0}",
    "sampling.max_new_tokens=16",
    "eval.trials=6",
    "eval.bootstrap=20",
)


@pytest.fixture
def adapter(assets: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny Llama that changes what it says a little."""
    torch.manual_seed(0)
    tuned = get_peft_model(
        load_model(assets / "llama", dtype="float32", device="cpu"), LoraConfig(r=2, target_modules="all-linear")
    )
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data = 0.01 * torch.randn_like(weight)
    tuned.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_an_adapter_is_measured_without_a_recipe_on_every_latent_and_ends_in_a_report(
    assets, adapter, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    labels = read_labels(assets / "llama-sae" / "labels.jsonl")
    first = {latent: labels[latent] for latent in list(labels)[:3]}
    write_jsonl("labels.jsonl", ({"index": latent, "description": label} for latent, label in first.items()))
    vocabulary = f"judge.vocabulary={assets / 'vocabulary.json'}"
    measured = [f"runs={tmp_path}", vocabulary, *SMALL]
    sae = ["--sae", str(assets), "llama-sae", "--labels", "labels.jsonl"]
    words = ["adapter", str(assets / "llama"), str(adapter), *sae, "--judge", "lexical"]
    assert evaluate([*words, "--prompts", str(assets / "prompts.jsonl"), *measured]) == 0
    said, run = capsys.readouterr().out, tmp_path / "adapter-theirs"
    assert f"report: {run / 'report.html'}" in said
    assert "all of them are measured" in said
    trials = read_trials(run / "trials" / "given.jsonl")
    assert {trial.condition for trial in trials} == {"steered", "unsteered"}
    assert set(json.loads((run / "metrics.json").read_text())["arms"]) == {"base", "given"}
    chosen = json.loads((run / "latents.json").read_text())["splits"]
    assert (len(chosen["test"]), chosen["train"], chosen["validation"]) == (len(first), [], [])
    page = (run / "report.html").read_text()
    assert "What was held out" not in page
    assert "training had not seen" not in page
    assert "whether what was given was trained on these prompts or latents" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing says what steers.*esr vectors make"),
        ({"vectors": "v.npy", "sae": ("r", "i")}, "exclude each other"),
        ({"sae": ("r", "i")}, "only labelled latents steer.*esr data labels"),
        ({"vectors": "v.npy", "labels": "l.jsonl"}, "names of vectors are their labels"),
        ({"sae": ("r", "i"), "labels": "l", "layer": 3}, "says itself for which layer"),
        ({"vectors": "v.npy", "judge": "likelyhood"}, "'likelyhood' is neither a judge nor a language model"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_give(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapter_recipe(Given("m", "a", **given))


def test_shipped_names_and_defaults_make_a_recipe_that_trains_nothing() -> None:
    recipe = adapter_recipe(Given("smollm2-135m-instruct", "me/ad.apter", "v.npy", 3), ["eval.trials=8"])
    assert (recipe.name, recipe.trained_arms, recipe.eval.trials) == ("adapter-ad.apter", (), 8)
    assert recipe.prompts is not None
    assert Path(recipe.prompts.path) == PROMPTS
    assert PROMPTS.is_file()
    assert adapter_recipe(Given("m", "a", "v.npy", judge="anthropic/claude-haiku-4-5")).judge.kind == "model"


def test_an_adapter_may_be_a_hub_id_and_what_the_hub_says_is_told(monkeypatch, tmp_path, adapter) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda id, **_: asked.append(id) or str(adapter))
    assert adapter_source("me/esr-adapter") == adapter
    assert adapter_source("./me/esr-adapter") is None
    assert adapter_source("theirs") == adapter
    assert asked == ["me/esr-adapter"]

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("404: no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=r"me/other: this is neither a folder nor an adapter.*404"):
        adapter_source("me/other")
