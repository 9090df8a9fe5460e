"""One YAML file says what an experiment is; mistakes are all named at once."""

from pathlib import Path

import pytest
import yaml

from esr_train.errors import InputError
from esr_train.recipe import EvalSection, Recipe, dump_recipe, load_recipe

SMALL = "name: small\nmodel: {path: some/model}\n"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_name_and_model_are_enough(small: Path) -> None:
    recipe = load_recipe(small)
    assert (recipe.name, recipe.model.path, recipe.directory) == ("small", "some/model", Path("runs/small"))
    assert list(recipe.arms) == ["tuned"]


def test_every_mistake_is_named_with_its_key(small: Path) -> None:
    small.write_text("name: a/b\nmodel: {dtype: float16}\neval: {trials: 0}\ntrian: {}\n")
    with pytest.raises(InputError) as caught:
        load_recipe(small)
    message = str(caught.value)
    assert message.startswith(f"{small}: 5 mistakes in the recipe: ")
    for part in ("name: ", "model.path: required", "model.dtype: ", "eval.trials: ", "trian: unknown key"):
        assert part in message


def test_overrides_reach_into_sections_and_their_values_are_yaml(small: Path) -> None:
    changed = load_recipe(
        small, ["seed=3", "train.args.learning_rate=0.002", "train.live.strength=[0.7, 1.6]", "sae=null"]
    )
    assert changed.seed == 3
    assert changed.train.args == {"learning_rate": 0.002}
    assert changed.train.live is not None
    assert changed.train.live.strength == (0.7, 1.6)
    assert changed.sae is None


def test_later_overrides_win(small: Path) -> None:
    assert load_recipe(small, ["seed=1", "seed=2"]).seed == 2


def test_an_override_that_is_no_assignment_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match=r"'seed' is not of the form key\.sub=value"):
        load_recipe(small, ["seed"])


def test_an_override_through_a_plain_value_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match="goes through 'name', which is not a section"):
        load_recipe(small, ["name.sub=1"])


def test_an_unknown_key_in_an_override_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match=r"1 mistake in the recipe: train\.lose: unknown key"):
        load_recipe(small, ["train.lose=masked"])


def test_broken_yaml_is_refused_with_its_line(small: Path) -> None:
    small.write_text("name: a\nmodel: [\n")
    with pytest.raises(InputError, match=r"small\.yaml:\d+: not valid YAML"):
        load_recipe(small)


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(small: Path, text: str) -> None:
    small.write_text(text)
    with pytest.raises(InputError, match="a recipe is a mapping of keys to values"):
        load_recipe(small)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_a_dumped_recipe_loads_as_the_same_recipe(small: Path) -> None:
    recipe = load_recipe(small, ["train.live.share=0.5", "arms.paper.train.loss=unmasked", "seeds=[0, 1]"])
    small.write_text(dump_recipe(recipe))
    assert load_recipe(small) == recipe
    assert yaml.safe_load(dump_recipe(recipe))["calibration"]["target"] == 30.0


def test_an_arm_changes_what_it_names_and_keeps_the_rest(small: Path) -> None:
    recipe = load_recipe(
        small,
        [
            "train.args={max_steps: 5, learning_rate: 0.1}",
            "arms.paper.train={loss: unmasked, args: {learning_rate: 0.2}}",
            "arms.paper.data.normal.rows=4",
        ],
    )
    arm = recipe.for_arm("paper")
    assert (arm.train.loss, arm.train.args) == ("unmasked", {"max_steps": 5, "learning_rate": 0.2})
    assert arm.data.normal.rows == 4
    assert (arm.data.min_answer_score, arm.model) == (80.0, recipe.model)
    assert recipe.train.args == {"max_steps": 5, "learning_rate": 0.1}


def test_an_arm_can_switch_live_injection_off(small: Path) -> None:
    recipe = load_recipe(small, ["train.live={}", "arms.paper.train.live=null"])
    assert recipe.train.live is not None
    assert recipe.for_arm("paper").train.live is None


def test_a_mistake_in_an_arm_is_found_when_the_recipe_loads(small: Path) -> None:
    with pytest.raises(InputError, match="lose"):
        load_recipe(small, ["arms.paper.train.lose=masked"])


def test_the_base_model_cannot_be_an_arm_that_is_trained(small: Path) -> None:
    with pytest.raises(InputError, match="'base' is always there"):
        load_recipe(small, ["arms.base={}"])


def test_an_unknown_arm_is_a_key_error() -> None:
    recipe = Recipe.model_validate(yaml.safe_load(SMALL))
    with pytest.raises(KeyError, match="other"):
        recipe.for_arm("other")


def test_several_workers_cannot_each_start_a_vllm(small: Path) -> None:
    with pytest.raises(InputError, match="set workers to 1"):
        load_recipe(small, ["workers=2", "engine.kind=vllm"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plugins=my/source.py", "plugins: input should be a valid list (got 'my/source.py')"),
        ("data.steered.cut=[1]", "data.steered.cut.1: required"),
        ("arms={x: {of: nobody}}", "recipe: arms.x.of: 'nobody' is no arm with weights of its own"),
    ],
)
def test_a_mistake_is_told_without_the_section_around_it(small: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(small, [override])
    assert f"1 mistake in the recipe: {message}" in str(caught.value)
    assert "value error" not in str(caught.value).lower()
    assert "{'name'" not in str(caught.value)


def test_the_prompt_of_welcomed_names_the_label() -> None:
    with pytest.raises(ValueError, match=r"the prompt in eval\.welcome leaves out \{label\}"):
        EvalSection(welcome="Tell me about it.")
