"""What an arm changes beside its weights, and how a recipe names an arm's weights."""

from pathlib import Path

import pytest
import torch

from esr_train.errors import InputError
from esr_train.recipe import Recipe
from esr_train.steering.directions import Add
from esr_train.steering.engine import Request
from eval.arms import PLAIN, PROMPTS, Variant, prompt_text
from recipes.experiment import read_recipe
from recipes.stages.weights import form

ADD, EDIT = Add(1, torch.zeros(1)), Add(2, torch.zeros(1))


def request() -> Request:
    return Request("r", "How do I fold {a} sheet?", interventions=(ADD,), seed=4)


def test_a_plain_arm_leaves_requests_as_they_are_and_says_nothing_in_its_rows():
    assert PLAIN.apply(request(), "baking") == request()
    assert PLAIN.to_json() is None


def test_a_variant_wraps_the_prompt_names_the_label_and_adds_its_interventions_last():
    variant = Variant("About {label}? No: {prompt} Not {label}.", (EDIT,), {"ablate": [3], "clamp": {}})
    made = variant.apply(request(), "baking")
    assert made.prompt == "About baking? No: How do I fold {a} sheet? Not baking."
    assert made.interventions == (ADD, EDIT)
    assert (made.seed, made.id) == (4, "r")
    assert variant.apply(request(), None).prompt.startswith("About something else?")
    assert variant.to_json() == {"prompt": variant.prompt, "ablate": [3], "clamp": {}}


def test_a_prompt_that_itself_says_label_is_not_rewritten():
    asked = Request("r", "What is a {label} for?")
    assert Variant("{prompt} ({label})").apply(asked, "baking").prompt == "What is a {label} for? (baking)"


def test_shipped_variants_hold_the_prompt_and_others_are_refused_by_name():
    assert all("{prompt}" in text for text in PROMPTS.values())
    assert any("{label}" in text for text in PROMPTS.values())
    assert prompt_text("monitor", "arms.a.prompt") == PROMPTS["monitor"]
    assert prompt_text("{prompt} Mind the topic.", "x") == "{prompt} Mind the topic."
    with pytest.raises(InputError, match=r"arms\.a\.prompt: there is no prompt variant 'montior'.*monitor"):
        prompt_text("montior", "arms.a.prompt")


def recipe(tmp_path: Path, arms: str, evaluation: str = "{}") -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\nmodel: {{path: m}}\nsae: {{release: s, id: t}}\neval: {evaluation}\narms: {arms}\n")
    return read_recipe(path)


def test_an_arm_cannot_change_how_it_is_sampled(tmp_path):
    assert recipe(tmp_path, "{tuned: {}}").sampling.repetition_penalty == 1.0
    for section in ("sampling", "engine", "model_section", "judge"):
        with pytest.raises(InputError, match=rf"arms\.tuned\.{section}"):
            recipe(tmp_path, f"{{tuned: {{{section}: {{repetition_penalty: 1.1}}}}}}")


def test_only_arms_without_weights_of_others_are_trained(tmp_path):
    found = recipe(
        tmp_path,
        "{tuned: {}, merged: {of: tuned, merged: true}, asked: {of: base, prompt: monitor}, given: {adapter: a},"
        " whole: {model: b}, other: {train: {loss: unmasked}}}",
    )
    assert found.trained_arms == ("tuned", "other")
    assert form(found, "merged") == "adapter, merged into the weights"
    assert form(found, "asked") == "the weights of base; prompt variant: monitor"
    assert form(found, "base") == "the model as it is"


def test_the_form_names_changed_latents(tmp_path):
    found = recipe(tmp_path, "{a: {of: base, edit: {ablate: [1, 2, 3, 4, 5, 6, 7], matched_random: true}}}")
    assert form(found, "a") == ("the weights of base; random latents matched to 1, 2, 3, 4, 5 and 2 more ablated")


@pytest.mark.parametrize(
    ("arms", "named"),
    [
        ("{a: {of: nobody}}", "arms.a.of: 'nobody' is no arm"),
        ("{a: {}, b: {of: a}, c: {of: b}}", "arms.c.of: 'b' is no arm with weights of its own"),
        ("{a: {of: base, adapter: x}}", "weights come from of and from adapter"),
        ("{a: {model: x, train: {loss: masked}}}", "it is not trained, because model is set"),
        ("{a: {of: base, train: {loss: masked}}}", "it is not trained, because of is set"),
        ("{a: {adapter: x, train: {lora: {r: 4}}}}", "the adapter of adapter, which has its shape: remove train.lora"),
        ("{a: {of: b, train: {loss: masked}}, b: {model: x}}", "arms.a.of: 'b' has no adapter from which"),
        ("{a: {of: b, train: {loss: masked}}, b: {of: a, train: {loss: masked}}}", "'b' itself goes on from 'a'"),
        ("{a: {of: base, merged: true}}", "there is no adapter to merge"),
        ("{a: {of: base, prompt: 'Mind {topic}'}}", "leaves out {prompt}"),
        ("{a: {of: base, edit: {}}}", "name latents under ablate or clamp"),
        ("{a: {of: base, edit: {ablate: [1], clamp: {1: 2.0}}}}", "latent 1 stands under ablate and under clamp"),
        ("{a: {of: base, edit: {ablate: [-1]}}}", "arms.a.edit.ablate.0"),
    ],
)
def test_arms_that_contradict_themselves_are_refused(tmp_path, arms, named):
    with pytest.raises(InputError) as caught:
        recipe(tmp_path, arms)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("evaluation", "named"),
    [
        ("{conditions: [steered, steered_continues]}", "add that condition"),
        ("{conditions: [switched_off]}", "responses of 'steered'"),
        ("{conditions: [steered, boost], boost: []}", "needs multiples in eval.boost"),
        ("{conditions: [stered]}", "there is no condition 'stered'"),
        ("{boost: [0]}", "eval.boost.0"),
    ],
)
def test_conditions_that_lack_something_are_refused(tmp_path, evaluation, named):
    with pytest.raises(InputError) as caught:
        recipe(tmp_path, "{}", evaluation)
    assert named in str(caught.value)
