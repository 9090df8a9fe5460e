"""Vectors made from activations: between two sets of texts, and one for each subject of a list."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from esr_train.errors import InputError
from esr_train.steering.direction_files import load_sae
from esr_train.steering.latent_labels import read_labels
from esr_train.steering.readout import hidden_states, measure_residual_norm
from esr_train.steering.vector_files import load_vectors
from esr_train.steering.vector_making import (
    ASKED,
    Reply,
    cosines,
    difference_of_means,
    make_vectors,
    vectors_of_replies,
)
from esr_train.template import prompt_text
from recipes.cli import main
from tests.conftest import Family

LAYER = 2
WARM = ("Knead the dough and dust the flour.", "Shape the loaf near the oven.", "The dough is in the oven.")
WET = ("Raise the mast and trim the jib.", "Trim the jib before the gale.", "The gale is near the mast.")
SHOWN = "esr_train.steering.vector_making.hidden_states"


def mean_state(family: Family, text: str, start: int = 0) -> torch.Tensor:
    (states,) = hidden_states(family.model, family.tokenizer, [text], LAYER)
    return states[start:].mean(dim=0)


def test_a_difference_of_means_leads_from_one_set_of_texts_to_the_other(family):
    made = difference_of_means(family.model, family.tokenizer, WARM, WET[:2], LAYER, label="warm", rows=2)
    warm, wet = (torch.stack([mean_state(family, text) for text in texts]).mean(dim=0) for texts in (WARM, WET[:2]))
    torch.testing.assert_close(made.add(raw=1.0).vector, warm - wet, atol=1e-4, rtol=1e-3)
    assert (made.layer, made.label) == (LAYER, "warm")
    assert made.residual_norm == measure_residual_norm(family.model, family.tokenizer, LAYER)


def planted(monkeypatch, states: dict[str, torch.Tensor]) -> None:
    """Texts whose states are known."""
    monkeypatch.setattr(SHOWN, lambda model, tokenizer, texts, layer, rows: (states[text] for text in texts))


def test_a_principal_component_is_what_the_pairs_differ_in_most_towards_the_positive_texts(llama, monkeypatch):
    torch.manual_seed(0)
    along = torch.nn.functional.normalize(torch.randn(64), dim=0)
    steps, states = (6.0, 9.0, 5.0), {}
    for number, step in enumerate(steps):
        # The pairs have something else in common on average, in which they differ less.
        base, noise = torch.randn(1, 64), 0.05 * torch.randn(1, 64)
        states |= {WET[number]: base, WARM[number]: base + step * along + noise}
    planted(monkeypatch, states)
    made = difference_of_means(llama.model, llama.tokenizer, WARM, WET, LAYER, method="pca")
    assert float(made.unit @ along) > 0.999
    assert made.length == pytest.approx(sum(steps) / 3, rel=0.01)
    back = difference_of_means(llama.model, llama.tokenizer, WET, WARM, LAYER, method="pca")
    assert float(back.unit @ along) < -0.999


@pytest.mark.parametrize(
    ("positive", "negative", "method", "message"),
    [
        ((), WET, "mean", "there is no text on one of the two sides"),
        (WARM, (), "mean", "there is no text on one of the two sides"),
        (WARM, WARM, "mean", "the texts of the two sides do not differ"),
        (WARM, WET[:2], "pca", "3 positive and 2 negative texts make no pairs"),
        ((*WARM, ""), WET, "mean", "text 4 has no token to read"),
    ],
)
def test_texts_between_which_there_is_no_vector_are_refused(positive, negative, method, message, llama):
    with pytest.raises(InputError, match=message):
        difference_of_means(llama.model, llama.tokenizer, positive, negative, LAYER, method=method)


def replies(family: Family, said: dict[str, tuple[str, ...]]) -> dict[str, list[Reply]]:
    asked = prompt_text(family.tokenizer, "How do I fold a fitted sheet?")
    return {subject: [Reply(asked, text) for text in texts] for subject, texts in said.items()}


def test_a_subjects_vector_is_the_mean_of_its_replies_tokens_alone_minus_that_of_all_subjects(family):
    given = replies(family, {"baking": WARM, "sailing": WET[:2], "folding": ("Tuck one corner.",)})
    made = vectors_of_replies(family.model, family.tokenizer, given, LAYER, rows=3)
    start = len(family.tokenizer.encode(given["baking"][0].asked, add_special_tokens=False)) - 1
    means = [
        torch.stack([mean_state(family, reply.asked + reply.text, start) for reply in group]).mean(dim=0)
        for group in given.values()
    ]
    centre = sum(means) / 3
    assert [vector.label for vector in made.vectors] == ["baking", "sailing", "folding"]
    for vector, mean in zip(made.vectors, means, strict=True):
        torch.testing.assert_close(vector.add(raw=1.0).vector, mean - centre, atol=1e-4, rtol=1e-3)


def test_of_two_subjects_with_much_the_same_vector_the_later_is_left_out_and_named(llama):
    given = replies(llama, {"baking": WARM, "sailing": WET, "bread": WARM, "folding": ("Tuck one corner.",) * 3})
    made = vectors_of_replies(llama.model, llama.tokenizer, given, LAYER)
    assert dict(made.twins) == {"bread": "baking"}
    assert [vector.label for vector in made.vectors] == ["baking", "sailing", "folding"]
    assert float(cosines(made.vectors).max()) < 0.65


def test_one_subject_or_a_silent_model_gives_no_vectors(llama):
    with pytest.raises(InputError, match="1 subject has no others to differ from"):
        vectors_of_replies(llama.model, llama.tokenizer, replies(llama, {"baking": WARM}), LAYER)
    given = replies(llama, {"baking": WARM, "sailing": ("", " ")})
    with pytest.raises(InputError, match="said nothing about 'sailing'"):
        vectors_of_replies(llama.model, llama.tokenizer, given, LAYER)


def test_made_vectors_are_the_same_for_a_seed_and_others_for_another(llama):
    subjects = ("baking", "sailing", "folding")
    first, again, other = (
        make_vectors(llama.model, llama.tokenizer, subjects, LAYER, seed=seed, rows=4).vectors for seed in (1, 1, 2)
    )
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.unit, two.unit)
    assert not torch.equal(first[0].unit, other[0].unit)


def test_subjects_of_the_tiny_world_get_the_directions_that_its_sae_has_for_them(assets):
    from esr_train.models import load_model, load_tokenizer

    path = str(assets / "llama")
    world = Family("llama", load_model(path, dtype="float32", device="cpu"), load_tokenizer(path))
    sae, labels = load_sae(str(assets), "llama-sae"), read_labels(assets / "llama-sae" / "labels.jsonl")
    words = json.loads((assets / "vocabulary.json").read_text(encoding="utf-8"))
    topics = sorted(set(labels.values()))[:8]
    said = {topic: tuple(f"First, use the {word} with the {word}." for word in words[topic][:6]) for topic in topics}
    made = vectors_of_replies(world.model, world.tokenizer, replies(world, said), sae.layer)
    first = {label: latent for latent, label in reversed(labels.items()) if label in topics}
    rows = torch.stack([sae.direction(latent).unit for latent in first.values()])
    found = {str(vector.label): [*first][int((rows @ vector.unit).argmax())] for vector in made.vectors}
    assert len(found) == 8
    assert sum(topic == nearest for topic, nearest in found.items()) >= 7


@pytest.fixture
def here(tmp_path: Path, llama: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    llama.model.save_pretrained("model")
    llama.tokenizer.save_pretrained("model")
    model, vectors = "{path: model, dtype: float32, device: cpu}", "{file: own.safetensors, layer: 1}"
    Path("recipe.yaml").write_text(f"name: own\nmodel: {model}\nvectors: {vectors}\n")
    Path("subjects.txt").write_text("baking\nsailing\nfolding\n")
    Path("warm.txt").write_text("\n".join(WARM))
    Path("wet.txt").write_text("\n".join(WET))
    return tmp_path


def test_the_command_writes_the_recipes_file_shows_a_table_and_overwrites_nothing(here, capsys):
    words = ["vectors", "make", "recipe.yaml", "--subjects", "subjects.txt"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[:4]] == ["label", "baking", "sailing", "folding"]
    assert "own.safetensors: 3 vectors for the output of layer 1" in said
    assert {vector.label for vector in load_vectors("own.safetensors")} == {"baking", "sailing", "folding"}
    with safe_open("own.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["command"] == "esr vectors make recipe.yaml --subjects subjects.txt"
    assert (facts["layer"], facts["model"]) == ("1", "model")
    assert float(facts["residual_norm"]) > 0
    before = Path("own.safetensors").read_bytes()
    assert main(words) == 2
    assert "the file exists" in capsys.readouterr().err
    assert Path("own.safetensors").read_bytes() == before


def test_the_command_makes_one_vector_between_two_files_of_texts(here, capsys):
    words = ["vectors", "make", "recipe.yaml", "--layer", "2", "--out", "warm.safetensors"]
    assert main([*words, "--positive", "warm.txt", "--negative", "wet.txt", "--method", "pca"]) == 0
    (vector,) = load_vectors("warm.safetensors")
    assert (vector.label, vector.layer) == ("warm", 2)
    assert "warm  length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", "9"], "there is no layer 9: the model has 4"),
        (["--out", "own.npy"], "written as safetensors"),
        (["--positive", "warm.txt"], "--negative: this key is missing"),
        (["--positive", "warm.txt", "--negative", "none.txt"], "none.txt: the file does not exist"),
        (["--positive", "warm.txt", "--negative", "wet.txt", "--subjects", "subjects.txt"], "exclude each other"),
        (["--subjects", "twice.txt"], "twice.txt: the line 'tea' comes twice"),
        (["--subjects", "empty.txt"], "empty.txt: there is no line in the file"),
        (["vectors=null"], "--layer: this key is missing"),
    ],
)
def test_what_cannot_be_made_is_refused_before_a_model_is_loaded(words, message, here, capsys, monkeypatch):
    monkeypatch.setattr("recipes.resources.load_model", lambda *_: pytest.fail("a model was loaded"))
    Path("twice.txt").write_text("tea\nrain\ntea\n")
    Path("empty.txt").write_text("\n")
    overrides, options = [w for w in words if "=" in w], [w for w in words if "=" not in w]
    assert main(["vectors", "make", "recipe.yaml", *overrides, *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("own.safetensors").exists()


def test_the_questions_name_the_subject_once_each():
    assert len(set(ASKED)) == 3
    assert all(question.count("{subject}") == 1 for question in ASKED)
