"""`esr bench`: the same prompts, directions and attacks for every model, and one file of results."""

import json
from pathlib import Path

import pytest
from test_given_adapter import SMALL, adapter  # noqa: F401 - a fixture

from esr_train.errors import InputError
from recipes.cli import main
from recipes.using.bench import Contender, bench_recipe

CONDITIONS = "eval.conditions=[steered, unsteered]"


def test_a_contender_is_measured_and_one_file_says_who_on_what_and_how_well(adapter, tmp_path, capsys):  # noqa: F811
    words = ["bench", "tiny/quickstart", f"runs={tmp_path / 'runs'}", *SMALL, CONDITIONS]
    assert main([*words, "--adapter", str(adapter)]) == 0
    said = capsys.readouterr().out
    assert "Steered at the base model's thresholds" in said
    assert "report: " in said
    found = json.loads((tmp_path / "runs" / "quickstart-theirs" / "bench.json").read_text())
    assert set(found["metrics"]["arms"]) == {"base", "given"} == set(found["inputs"])
    assert found["contender"]["adapter"] == str(adapter)
    assert found["versions"]["torch"]
    assert CONDITIONS in found["overrides"]
    assert found["inputs"]["given"]["weights"] != found["inputs"]["base"]["weights"]


def test_without_an_adapter_the_model_alone_is_measured(tmp_path):
    recipe = bench_recipe("tiny/evaluation", Contender(), [f"runs={tmp_path}"])
    assert not recipe.arms
    assert recipe.name == "evaluation-llama"


def test_vectors_are_made_for_another_model_than_the_recipes(assets, tmp_path):
    recipe = bench_recipe("resistance", Contender(str(assets / "llama")), [f"runs={tmp_path}"])
    assert recipe.vectors
    assert recipe.vectors.layer == 3
    assert Path(recipe.vectors.file) == tmp_path / "vectors-llama-3.safetensors"
    assert bench_recipe("resistance", Contender(str(assets / "llama"), layer=1)).vectors.layer == 1
    own = bench_recipe("resistance", Contender()).vectors
    assert own
    assert own.file == "recipes/smollm2-135m-instruct/vectors.safetensors"


@pytest.mark.parametrize(("recipe", "model"), [("resistance", None), ("tiny/evaluation", "somebody/model")])
def test_a_layer_is_refused_where_no_vectors_are_made(recipe, model):
    with pytest.raises(InputError, match="--layer: the layer is that of vectors made for another model"):
        bench_recipe(recipe, Contender(model, layer=1))


def test_a_monitor_is_measured_on_the_model_alone_or_with_an_adapter(tmp_path):
    recipe = bench_recipe("tiny/evaluation", Contender(monitor="probe.json"), [f"runs={tmp_path}"])
    assert recipe.name == "evaluation-llama-monitored"
    assert recipe.arms["given"].of == "base"
    assert recipe.arms["given"].monitor
    assert recipe.arms["given"].monitor.file == "probe.json"
    both = bench_recipe("tiny/evaluation", Contender(adapter="theirs", monitor="probe.json"), [f"runs={tmp_path}"])
    assert (both.arms["given"].adapter, both.arms["given"].of) == ("theirs", None)
