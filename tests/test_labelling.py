"""`esr data labels`: latents are labelled by the text on which they are active."""

import json

import pytest
from test_bad_input import paragraph, world  # noqa: F401 - the fixture

from data_gen.__main__ import main as data
from data_gen.latents.latent_naming import label_latents
from esr_train.errors import InputError
from esr_train.files import read_jsonl, write_jsonl
from esr_train.recipe import load_recipe
from esr_train.steering.latent_labels import read_labels
from recipes.resources import Resources
from tests.conftest import ROOT
from tests.llm_stub import Faults, LlmStub, Messages
from tools.tiny_world.language import how_to, topics


@pytest.mark.slow
def test_latents_that_stand_for_a_topic_are_labelled_with_its_words(assets, tmp_path):
    from random import Random

    rng, known = Random(5), read_labels(assets / "llama-sae" / "labels.jsonl")
    texts = [how_to(topic, rng).reply for _ in range(2) for topic in topics()]
    made = Resources(load_recipe(ROOT / "recipes" / "tiny" / "quickstart.yaml"))
    rows = label_latents(made.base_model(), made.tokenizer(), made.sae(), texts, None, 0, rows=32)
    words = {topic.name: {topic.name, *topic.verbs, *topic.nouns} for topic in topics()}
    described = {row.latent: row.description.split(", ") for row in rows}
    right = [sum(w in words[label] for w in described[k]) >= 2 for k, label in known.items() if k in described]
    assert len(right) > 350
    assert sum(right) / len(right) > 0.7
    assert all("<<" in example for row in rows for example in row.examples)


def texts(count: int = 12) -> None:
    rows = ({"text": f"Knead the dough {i} times, then raise the mast."} for i in range(count))
    write_jsonl("texts.jsonl", rows)


def test_a_file_of_labels_is_one_that_a_recipe_can_name(world, capsys):  # noqa: F811
    texts()
    words = ["labels", "recipe.yaml", "sae.labels=null", "--texts", "texts.jsonl"]
    assert data([*words, "--out", "all.jsonl"]) == 0
    assert data([*words, "--out", "two.jsonl", "--latents", "2"]) == 0
    every, two = read_labels("all.jsonl"), read_labels("two.jsonl")
    assert 2 == len(two) < len(every)
    assert two.items() <= every.items()
    assert "two.jsonl: 2 latents labelled" in capsys.readouterr().out


def test_what_cannot_be_labelled_is_bad_input(world, capsys):  # noqa: F811
    texts()
    words = ("data", "labels", "recipe.yaml", "--out", "a.jsonl", "--texts")
    assert "none.jsonl: the file does not exist" in paragraph(capsys, *words, "none.jsonl")
    assert "the row has no 'body'" in paragraph(capsys, *words, "texts.jsonl", "--column", "body")
    assert "--latents: 0 is no number of them" in paragraph(capsys, *words, "texts.jsonl", "--latents", "0")
    (world / "empty.txt").write_text("\n \n")
    assert "there is no text to read" in paragraph(capsys, *words, "empty.txt")
    assert not (world / "a.jsonl").exists()


def names(messages: Messages) -> str:
    question = messages[-1]["content"]
    return json.dumps({"label": " kneading\n dough", "concreteness": 80 if "<<" in question else 0})


def test_a_namer_s_labels_are_kept_if_they_are_concrete(world, monkeypatch, capsys):  # noqa: F811
    texts()
    words = ["labels", "recipe.yaml", "--texts", "texts.jsonl", "--latents", "3", "--out", "named.jsonl"]
    with LlmStub(names, Faults(script=["prose"])) as stub:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        named = [*words, "--namer", stub.model]
        assert data([*named, "--concreteness", "65"]) == 0
        assert set(read_labels("named.jsonl").values()) == {"kneading dough"}
        assert [row["concreteness"] for row in read_jsonl("named.jsonl", dict)] == [80.0] * 3
        assert "no label is left" in paragraph(capsys, "data", *named, "--concreteness", "90")


def test_latents_that_are_never_active_have_no_label(world):  # noqa: F811
    made = Resources(load_recipe("recipe.yaml"))
    made.sae().module.W_enc.data.zero_()
    made.sae().module.b_enc.data.fill_(-1.0)
    with pytest.raises(InputError, match="no latent is active"):
        label_latents(made.base_model(), made.tokenizer(), made.sae(), ["Knead the dough."], None, 0)
