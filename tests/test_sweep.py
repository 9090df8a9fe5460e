"""A list of shares in a recipe is a sweep: an arm for each, and a figure that puts them in order."""

import pytest
import yaml

from esr_train.errors import InputError
from esr_train.recipe import dump_recipe, load_recipe
from recipes.sweep import mixtures

RECIPE = {"name": "t", "model": {"path": "model"}, "data": {"normal": {"rows": 8}, "self_correction": [0.1, 0.5, 0.9]}}


def loaded(tmp_path, overrides=(), **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return load_recipe(path, list(overrides))


def shares(recipe):
    return {arm: recipe.for_arm(arm).data.self_correction for arm in recipe.arms}


def test_a_list_of_shares_makes_an_arm_of_each(tmp_path):
    recipe = loaded(tmp_path)
    assert shares(recipe) == {"tuned-10": 0.1, "tuned-50": 0.5, "tuned-90": 0.9}
    assert recipe.for_arm("tuned-10").data.normal.rows == 8
    assert mixtures(recipe) == {"tuned": shares(recipe)}


def test_the_resolved_recipe_means_the_same(tmp_path):
    recipe = loaded(tmp_path)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


def test_a_sweep_may_be_asked_for_on_the_command_line(tmp_path):
    recipe = loaded(tmp_path, ["data.self_correction=[0.25, 0.75]"])
    assert shares(recipe) == {"tuned-25": 0.25, "tuned-75": 0.75}


def test_every_arm_is_swept_but_those_with_a_share_of_their_own(tmp_path):
    arms = {"half": {"data": {"self_correction": 0.5}}, "live": {}, "paper": {"train": {"loss": "unmasked"}}}
    recipe = loaded(tmp_path, arms=arms, data={"self_correction": [0.1, 0.9]})
    assert list(recipe.arms) == ["half", "live-10", "live-90", "paper-10", "paper-90"]
    assert recipe.for_arm("paper-90").train.loss == "unmasked"
    found = mixtures(recipe)
    assert list(found) == ["live", "paper"]
    assert found["live"] == {"live-10": 0.1, "live-90": 0.9, "half": 0.5}


def test_one_arm_may_be_swept_alone(tmp_path):
    arms = {"a": {"data": {"self_correction": [0.2, 0.4]}}, "b": {}}
    recipe = loaded(tmp_path, arms=arms, data={})
    assert shares(recipe) == {"a-20": 0.2, "a-40": 0.4, "b": None}


def test_a_recipe_without_a_list_stays_as_it_is(tmp_path):
    recipe = loaded(tmp_path, data={"self_correction": 0.5})
    assert shares(recipe) == {"tuned": 0.5}
    assert mixtures(recipe) == {}


@pytest.mark.parametrize(
    ("listed", "arms", "named"),
    [
        ([], {"tuned": {}}, "shares that differ"),
        ([0.5, 0.5], {"tuned": {}}, "shares that differ"),
        ([10, 50], {"tuned": {}}, "10 is no share"),
        (["half"], {"tuned": {}}, "'half' is no share"),
        ([0.1], {"tuned": {}, "tuned-10": {"data": {"self_correction": 0.3}}}, "arms.tuned-10"),
    ],
)
def test_a_list_that_makes_no_sweep_is_refused(tmp_path, listed, arms, named):
    with pytest.raises(InputError, match=named):
        loaded(tmp_path, data={"self_correction": listed}, arms=arms)
