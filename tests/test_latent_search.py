"""`esr latents search` and the arms that edit what it finds, on the tiny world."""

import json
from dataclasses import replace

import pytest

from esr_train.errors import InputError
from esr_train.recipe import Recipe
from esr_train.steering.interventions import Ablate, Amplify
from eval.cells import Prompt
from eval.detectors import Detector, DetectorSet, read_detectors
from recipes.cli import main
from recipes.experiment import open_experiment, read_recipe
from recipes.noticing import latent_search
from recipes.noticing.latent_search import pairs
from recipes.pipeline import prepare
from recipes.resources import open_resources
from recipes.stages.steering_latents import NO_LATENTS, NOT_CALIBRATED, Shared
from recipes.stages.weights import arm_variant, form, needs_frequency, takes_detectors
from tests.conftest import ROOT

SMALL = ("sae.labels=null", "sampling.max_new_tokens=32", "engine.batch_rows=64")


def prompts(*topics: str) -> list[Prompt]:
    return [Prompt(f"{topic} {number}?", topic) for number, topic in enumerate(topics)]


def test_every_prompt_is_paired_with_one_of_another_topic_and_each_is_used_once():
    given = prompts(*"aaabbcccd")
    made = pairs(given, 100, 0)
    assert {prompt for prompt, _ in made} == {other for _, other in made} == set(given)
    assert all(prompt.topic != other.topic for prompt, other in made)
    assert len(pairs(given, 6, 0)) == 6
    assert pairs(given, 6, 0) == pairs(given, 6, 0) != pairs(given, 6, 1)


def test_prompts_that_are_mostly_of_one_topic_cannot_be_paired():
    with pytest.raises(InputError, match="4 prompts of 2 topics cannot be paired"):
        pairs(prompts(*"aaab"), 100, 0)


@pytest.fixture(scope="module")
def found(assets, tmp_path_factory):
    """The folder of a small search, off-topic against own replies."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_search, "SEARCHED", 100)
        patch.setattr(latent_search, "HELD_OUT", 40)
        assert main(["latents", "search", str(ROOT / "recipes/tiny/evaluation.yaml"), *SMALL, f"runs={runs}"]) == 0
        yield runs / "evaluation" / "detectors"


def test_the_tiny_worlds_detectors_hold_on_other_topics_and_random_latents_do_not(found):
    (off_topic,) = read_detectors(found / "detectors.json").sets
    assert off_topic.contrast == "off_topic"
    assert off_topic.pairs == 100
    assert off_topic.held_out.n == 40
    assert off_topic.held_out.value > max(off_topic.random_aucs)
    assert off_topic.held_out.value > 0.9
    assert all("<<" in detector.name for detector in off_topic.detectors)
    table = (found / "detectors.csv").read_text().splitlines()
    assert len(table) == 1 + len(off_topic.detectors)
    assert (found / "detectors.svg").read_text().startswith("<?xml")
    assert not list(found.glob("tmp*")), "the matrix of means is gone"


def test_an_interrupted_search_makes_no_reply_twice(found, capsys):
    replies = found / "replies.jsonl"
    whole = replies.read_text()
    kept = whole.splitlines(keepends=True)
    stages = json.loads((found.parent / "stages.json").read_text())
    stages["detectors"]["done"] = False
    (found.parent / "stages.json").write_text(json.dumps(stages))
    replies.write_text("".join(kept[:110]))
    before = read_detectors(found / "detectors.json")
    runs = found.parent.parent
    assert main(["latents", "search", str(ROOT / "recipes/tiny/evaluation.yaml"), *SMALL, f"runs={runs}"]) == 0
    assert sorted(replies.read_text().splitlines()) == sorted(whole.splitlines())
    assert read_detectors(found / "detectors.json") == before
    assert "AUC" in capsys.readouterr().out


def test_a_run_whose_arms_edit_detectors_searches_for_them_first(found):
    runs = found.parent.parent
    arms = ("{deaf: {of: base, edit: {ablate: detectors}}}", "eval.conditions=[unsteered]", f"runs={runs}", *SMALL)
    with pytest.MonkeyPatch.context() as patch, open_experiment(recipe(*arms)) as experiment:
        patch.setattr(latent_search, "_found", None)  # the search that is there is taken
        shared = prepare(experiment)
        assert shared.detectors == read_detectors(found / "detectors.json").of("off_topic")
        (ablate,) = arm_variant(experiment, "deaf", shared).interventions
        assert ablate.latents == shared.detectors.chosen


def recipe(arms: str, *more: str) -> Recipe:
    return read_recipe(ROOT / "recipes/tiny/evaluation.yaml", [f"arms={arms}", *more])


def test_a_number_of_random_sets_becomes_as_many_arms():
    made = recipe("{tuned: {}, control: {of: tuned, edit: {ablate: detectors, matched_random: 3}}}")
    assert list(made.arms) == ["tuned", "control_1", "control_2", "control_3"]
    assert [arm.edit.draw for arm in made.arms.values() if arm.edit] == [0, 1, 2]
    assert Recipe.model_validate(made.model_dump()) == made
    assert form(made, "control_2") == "the weights of tuned; random latents matched to detectors ablated"
    assert takes_detectors(made)
    assert not needs_frequency(made.model_copy(update={"eval": made.eval.model_copy(update={"conditions": ()})}))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ("{ablate: detector}", "arms.a.edit.ablate.0"),
        ("{ablate: detectors, clamp: {detectors: 1.0}}", "latent detectors stands under ablate and under clamp"),
        ("{ablate: [detectors, 5], matched_random: true}", "name no other latents"),
        ("{ablate: detectors, matched_random: 21}", "arms.a.edit.matched_random"),
    ],
)
def test_edits_of_detectors_that_mean_nothing_are_refused(edit, named):
    with pytest.raises(InputError) as caught:
        recipe(f"{{a: {{of: base, edit: {edit}}}}}")
    assert named in str(caught.value)


def detectors(*latents: int) -> DetectorSet:
    made = tuple(Detector(k, "", 0.9, 0.1, 0.0, 0.0, 0.9, 0.0, 1.0, 0.1, 0, (0.0, 0.0)) for k in latents)
    sets = ((11, 12), (21, 22))
    return DetectorSet("off_topic", made, None, sets, (0.5, 0.5), (), 1024, 60)


def test_an_arm_ablates_what_was_found_and_its_controls_the_matched_sets(assets, tmp_path):
    edits = "{ablate: detectors, amplify: {5: 2.0}}", "{ablate: detectors, matched_random: 2}"
    arms = "{{a: {{of: base, edit: {}}}, c: {{of: base, edit: {}}}}}".format(*edits)
    shared = Shared(NO_LATENTS, NOT_CALIBRATED, None, detectors(3, 4))
    with open_experiment(recipe(arms, f"runs={tmp_path}")) as experiment:
        found = arm_variant(experiment, "a", shared)
        ablate, amplify = found.interventions
        assert isinstance(ablate, Ablate)
        assert isinstance(amplify, Amplify)
        assert (ablate.latents, amplify.latents, amplify.factor) == ((3, 4), (5,), 2.0)
        assert found.edits == {"ablate": [3, 4], "clamp": {}, "amplify": {"5": 2.0}}
        controls = [arm_variant(experiment, name, shared).edits["ablate"] for name in ("c_1", "c_2")]
        assert controls == [[11, 12], [21, 22]]
        none = replace(shared, detectors=detectors())
        with pytest.raises(InputError, match=r"arms\.a\.edit: none of the 1,024 latents"):
            arm_variant(experiment, "a", none)


def test_what_is_read_may_be_another_sae_than_what_steers(assets):
    other = "{sae: {release: recipes/tiny/assets, id: gemma-sae}}"
    with open_resources(recipe("{a: {of: base, edit: {ablate: detectors}}}", f"read={other}")) as resources:
        assert resources.read_sae().ref.id == "gemma-sae"
        assert resources.sae().ref.id == "llama-sae"
        assert resources.read_labels() == {}
    with open_resources(recipe("{}")) as resources:
        assert resources.read_sae() is resources.sae()
