"""`latents.concreteness`: a language model rates labels, and latents whose label is too abstract do not steer."""

import json
import re

import pytest

from data_gen.latents.concreteness import LABELS_PER_QUESTION, rate_labels
from data_gen.latents.latent_choice import SURPLUS, choose, in_turn
from esr_train.errors import InputError
from esr_train.files import read_json
from esr_train.recipe import load_recipe
from eval.cells import split_latents
from eval.llm import Asker, InspectLlm, Ledger
from recipes.experiment import open_experiment
from recipes.resources import Resources
from recipes.stages.steering_latents import ABSTRACT, FUNNELS, LATENTS, UNRATED, choose_latents
from tests.conftest import ROOT
from tests.llm_stub import LlmStub, Messages
from tests.test_latents import SECTION, TOPICS, apart, side

QUICKSTART = ROOT / "recipes" / "tiny" / "quickstart.yaml"


def rated(messages: Messages) -> str:
    """Every line's score is the number at the label's end; labels without one get 90."""
    lines = re.findall(r'^\d+\. "(.*)"$', messages[-1]["content"], re.MULTILINE)
    numbers = (re.search(r"(\d+)$", line) for line in lines)
    return json.dumps({"scores": [int(number[0]) if number else 90 for number in numbers]})


@pytest.fixture
def stub(monkeypatch):
    with LlmStub(rated) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def asker() -> Asker:
    return Asker(InspectLlm(LlmStub.model), Ledger(LlmStub.model))


def test_every_label_gets_its_own_rating_and_twice_the_same_is_asked_once(stub):
    labels = [f"label {number}" for number in range(LABELS_PER_QUESTION + 3)]
    assert rate_labels([*labels, "label 7"], asker()) == [*map(float, range(len(labels))), 7.0]
    assert len(stub.requests) == 2


def test_labels_of_a_reply_that_stays_unusable_are_unrated_and_others_are_not(stub):
    stub.answer = lambda messages: '{"scores": [50]}' if "label 0" in messages[-1]["content"] else rated(messages)
    found = rate_labels([f"label {number}" for number in range(LABELS_PER_QUESTION + 2)], asker())
    assert found == [None] * LABELS_PER_QUESTION + [20.0, 21.0]


def test_latents_with_a_fault_are_left_out_with_its_reason_and_others_take_their_places(monkeypatch):
    given = apart([f"free{number}" for number in range(60)])
    monkeypatch.setattr("data_gen.latents.latent_choice.ASKED_AT_ONCE", 8)
    asked: list[int] = []

    def faults(latents):
        asked.extend(latent.latent for latent in latents)
        return ["too odd" if latent.latent % 2 else None for latent in latents]

    found = choose(given, set(), TOPICS, SECTION, 10, faults)
    chosen = side(found.splits)
    assert len(chosen) == 10
    assert all(latent % 2 == 0 for latent in chosen)
    order = [latent.latent for latent in in_turn(split_latents(given, TOPICS, SECTION), SECTION.seed)]
    assert asked == order[: len(asked)]
    assert len(asked) < 60
    odd = sum(latent % 2 for latent in asked)
    assert found.left_out == {"too odd": odd, SURPLUS: 60 - 10 - odd}
    more = side(choose(given, set(), TOPICS, SECTION, 20, faults).splits)
    assert chosen.items() <= more.items()
    assert len(side(choose(given, set(), TOPICS, SECTION, None, faults).splits)) == 30


def test_a_judge_that_is_no_language_model_cannot_rate_labels():
    with pytest.raises(InputError, match=r"latents\.concreteness: a language model rates labels.*'lexical' is none"):
        load_recipe(QUICKSTART, ["latents.concreteness=65"])


def test_a_run_leaves_out_what_its_judge_finds_too_abstract_and_says_so(stub, tmp_path, capsys, monkeypatch):
    stub.answer = lambda messages: json.dumps(
        {"scores": [80 if number % 4 else 20 for number in range(messages[-1]["content"].count('. "'))]}
    )
    changes = [f"runs={tmp_path}", f"judge={{kind: model, model: {LlmStub.model}}}", "latents.limit=null"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Resources, "residual_norm", lambda _: 1.0)

    def chosen(least: int) -> tuple[dict[str, int], dict]:
        with open_experiment(load_recipe(QUICKSTART, [*changes, f"latents.concreteness={least}"])) as experiment:
            choose_latents(experiment)
            return read_json(experiment.directory / FUNNELS["latents"]), read_json(experiment.directory / LATENTS)

    every, _ = chosen(10)
    assert ABSTRACT not in every
    asked = len(stub.requests)
    kept, values = chosen(65)
    scores = values["concreteness"]
    assert kept[ABSTRACT] == sum(score < 65 for score in scores.values()) > 10
    assert kept["kept"] == every["kept"] - kept[ABSTRACT]
    assert UNRATED not in kept
    assert f"{len(scores) - kept[ABSTRACT]} of {len(scores)} labels are rated 65 or more" in capsys.readouterr().out
    assert len(stub.requests) == asked > 0
