"""Every shipped recipe, wherever it lies, is valid down to the SAE, the trainer's fields and the commands it names."""

import re
from pathlib import Path

import pytest
import yaml
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from esr_train import load_vectors
from esr_train.recipe import load_recipe
from esr_train.training.settings import lora_config, trainer_config
from recipes import FOLDER, shipped

ROOT = Path(__file__).parent.parent
FOURFOLD = ("gemma-2-9b-it", "llama-3.1-8b-instruct", "llama-3-8b-instruct")
LARGE = (*FOURFOLD, "qwen2.5-7b-instruct")
KINDS = {"paper.yaml", "onpolicy.yaml", "live.yaml", "qlora.yaml"}


recipes = pytest.mark.parametrize("path", shipped().values(), ids=list(shipped()))


def test_no_recipe_is_overlooked():
    """Every YAML file that has a `model` is a recipe, at any depth."""
    found = {path for path in FOLDER.rglob("*.yaml") if "model" in (yaml.safe_load(path.read_text()) or {})}
    assert found == set(shipped().values())
    assert len(found) >= 13
    for folder in FOURFOLD:
        assert {path.name for path in found if path.parent.name == folder} == KINDS
    assert all((path.parent / "README.md").is_file() for path in found if path.parent.name in LARGE)


@recipes
def test_a_recipe_and_the_trainers_settings_in_it_are_valid(path, tmp_path):
    recipe = load_recipe(path, ["model.device=cpu"])
    for arm in recipe.trained_arms:
        section = recipe.for_arm(arm)
        assert trainer_config(section, tmp_path).output_dir == str(tmp_path)
        assert lora_config(section).r == section.train.lora["r"]


@recipes
def test_what_steers_is_shipped_or_in_sae_lens_directory(path):
    recipe = load_recipe(path)
    if recipe.vectors:
        vectors = load_vectors(recipe.vectors.file, recipe.vectors.layer)
        assert len({vector.label for vector in vectors}) == len(vectors) >= 90
        return
    sae = recipe.sae
    assert sae is not None
    if path.parent.name in (*LARGE, "paper"):
        assert sae.id in get_pretrained_saes_directory()[sae.release].saes_map
    else:
        assert sae.release.startswith("recipes/")


@pytest.mark.parametrize("folder", LARGE)
def test_the_sae_belongs_to_the_model(folder):
    """The paper's Gemma SAE alone was trained on the base model."""
    for path in (FOLDER / folder).glob("*.yaml"):
        recipe = load_recipe(path)
        trained_on = get_pretrained_saes_directory()[recipe.sae.release].model
        model = recipe.model.path.rpartition("/")[2]
        if (folder, path.name) == ("gemma-2-9b-it", "paper.yaml"):
            assert trained_on == "gemma-2-9b"
        else:
            assert trained_on.rpartition("/")[2] == model


@pytest.mark.parametrize("folder", FOURFOLD)
def test_the_four_recipes_of_a_model_are_what_their_names_say(folder):
    paper, onpolicy, live, qlora = (
        load_recipe(FOLDER / folder / f"{kind}.yaml") for kind in ("paper", "onpolicy", "live", "qlora")
    )
    assert (paper.train.args["num_train_epochs"], paper.train.max_length) == (4, 4096)
    assert paper.train.args["optim"] == "adamw_bnb_8bit"
    assert [each.train.live is not None for each in (paper, onpolicy, live, qlora)] == [False, False, True, True]
    assert [each.train.quantization for each in (paper, onpolicy, live, qlora)] == [None, None, None, "nf4"]
    assert onpolicy.data == live.data
    assert len({each.name for each in (paper, onpolicy, live, qlora)}) == 4
    assert all(each.model.dtype == "bfloat16" for each in (paper, onpolicy, live, qlora))


@recipes
def test_a_recipe_begins_with_commands_whose_files_exist(path):
    head = path.read_text().partition("\nname:")[0]
    own = str(path.relative_to(ROOT))
    assert head.startswith("# ")
    assert all(line.startswith("#") for line in head.splitlines())
    named = set(re.findall(r"recipes/[\w./-]+\.(?:yaml|json|sbatch)", head))
    assert own in named
    assert [name for name in named if not (ROOT / name).is_file()] == []
    if path.parent.name in LARGE:
        assert f"esr train {own} --dry-run" in head
        assert re.search(rf"(-m esr_train|esr train) {re.escape(own)}( \w[\w.]*=\S+)+ name=", head)


def test_the_files_that_readmes_and_the_job_script_name_exist():
    texts = [*FOLDER.glob("*/README.md"), FOLDER / "README.md", *FOLDER.glob("slurm/*.sbatch")]
    assert len(texts) >= 5
    for text in texts:
        named = set(re.findall(r"recipes/[\w./-]+\.(?:yaml|json|sbatch)", text.read_text()))
        assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_flaw_of_the_published_measurement_has_a_test_that_exists():
    rows = [line for line in (ROOT / "eval" / "README.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(line.split("|")[1]) for line in rows] == list(range(1, 12))
    for line in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text()
