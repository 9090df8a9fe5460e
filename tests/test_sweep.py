"""Arms that differ in the share of self-correction rows alone are a sweep, which a figure puts in order."""

import yaml

from esr_train.recipe import load_recipe
from recipes.stages.results import mixtures, scales


def swept(tmp_path, arms):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "t", "model": {"path": "model"}, "arms": arms}))
    return mixtures(load_recipe(path))


def scaled(tmp_path, arms):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "t", "model": {"path": "model"}, "arms": arms}))
    return scales(load_recipe(path))


def test_arms_of_one_adapter_at_several_scales_are_a_curve_that_begins_at_base(tmp_path):
    half = {"of": "tuned", "scale": 0.5}
    arms = {"tuned": {}, "half": half, "asked": {**half, "prompt": "{prompt} Look."}, "other": {}}
    assert scaled(tmp_path, arms) == {"tuned": {"base": 0.0, "tuned": 1.0, "half": 0.5}}
    given = {name: {"adapter": "a", "scale": value} for name, value in (("low", 0.2), ("high", 0.9))}
    assert scaled(tmp_path, given) == {"a": {"base": 0.0, "low": 0.2, "high": 0.9}}


def share(value, **more):
    return {"data": {"self_correction": value}, **more}


def test_arms_that_differ_in_their_share_alone_are_a_sweep_named_after_them(tmp_path):
    live = {f"live-{percent}": share(percent / 100) for percent in (10, 90)}
    paper = {f"paper-{percent}": share(percent / 100, train={"loss": "unmasked"}) for percent in (10, 90)}
    found = swept(tmp_path, {"half": share(0.5), **live, **paper, "plain": {}})
    assert found == {
        "live": {"half": 0.5, "live-10": 0.1, "live-90": 0.9},
        "paper": {"paper-10": 0.1, "paper-90": 0.9},
    }


def test_one_share_is_no_sweep(tmp_path):
    assert swept(tmp_path, {"tuned": share(0.5), "other": share(0.5)}) == {}
