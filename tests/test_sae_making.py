"""`esr sae train` and `esr data labels --steer`: an SAE of one's own, and what its latents steer to."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_bad_input import TOPICS, paragraph, world  # noqa: F401 - the fixture

import recipes.making.sae_making
from data_gen.latents.sae_data import States, Text, ask_about, to_read
from data_gen.latents.sae_fitting import SaeSettings, _losses, fit, saved_aside
from data_gen.latents.steering_labels import SHORTLIST, STRENGTHS, Candidate, label_by_steering
from esr_train.errors import InputError
from esr_train.files import read_json, read_jsonl
from esr_train.recipe import load_recipe
from esr_train.steering.direction_files import load_sae
from esr_train.steering.engine import Completion
from esr_train.steering.transformers_engine import TransformersEngine
from eval.cells import Prompt
from recipes.cli import main
from recipes.resources import Resources

TRAIN = ["sae", "train", "recipe.yaml", "--layer", "1", "--width", "48", "--active", "4", "--tokens", "600"]
OUT = ["--subjects", "subjects.txt", "--out", "saes/own"]


@pytest.fixture
def subjects(world, monkeypatch):  # noqa: F811
    (world / "subjects.txt").write_text("owls\nkites\n")
    monkeypatch.setattr("data_gen.latents.sae_fitting.PASSES", 2)
    monkeypatch.setattr(recipes.making.sae_making, "REPLY_TOKENS", 8)
    return world


def planted(count: int = 4000, width: int = 24, rows: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """States that are three of 32 directions each, behind a common mean, and the directions."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)
    chosen = torch.rand(count, rows, generator=generator).argsort(dim=1)[:, :3]
    sizes = 20 + 20 * torch.rand(count, 3, generator=generator)
    return 50 + (directions[chosen] * sizes[:, :, None]).sum(dim=1), directions


def test_a_trained_sae_explains_what_was_planted_as_a_user_loads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("data_gen.latents.sae_fitting.PASSES", 30)
    monkeypatch.setattr("data_gen.latents.sae_fitting.BATCH", 128)
    monkeypatch.setattr("data_gen.latents.sae_fitting.RATE", 2e-3)
    values, directions = planted()
    states = States(values.to(torch.bfloat16), values[:8])
    with saved_aside(fit(states, SaeSettings(3, 64, 4, 0, "m"), "cpu"), tmp_path / "sae"):
        pass
    sae = load_sae(str(tmp_path / "sae"))
    assert (sae.layer, sae.d_model, sae.n_latents) == (3, 24, 64)
    error = values - sae.module.decode(sae.encode(values))
    assert 1 - error.pow(2).sum() / (values - values.mean(dim=0)).pow(2).sum() > 0.9
    rows = torch.stack([sae.direction(latent).unit for latent in range(64)])
    assert ((directions @ rows.T).max(dim=1).values > 0.9).float().mean() > 0.7


def test_the_command_writes_an_sae_that_a_recipe_can_name_and_says_how_good_it_is(subjects, capsys):
    assert main([*TRAIN, *OUT]) == 0
    said, told = capsys.readouterr().out, read_json("saes/own/training.json")
    assert "saes/own: " in said
    assert load_sae("saes", "own").layer == 1
    assert told["states"] == 600
    assert told["width"] == 48
    assert told["texts"]["trained"] > 0 < told["texts"]["held_out"]
    quality = told["quality"]
    assert quality["variance_explained"] <= 1
    assert {"l0", "dead", "loss_clean", "loss_spliced", "loss_zeroed", "loss_recovered"} <= quality.keys()
    assert {path.name for path in Path("saes/own").iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "training.json",
    }
    assert "the folder exists" in paragraph(capsys, *TRAIN, *OUT)


def test_no_held_out_prompt_of_the_recipe_is_read(subjects):
    assert main([*TRAIN, *OUT]) == 0
    pools = Resources(load_recipe("recipe.yaml")).prompts()
    asked = {row["prompt"] for row in read_jsonl("saes/own.replies.jsonl", dict)}
    held_out = {prompt.text for prompt in (*pools.validation, *pools.test)}
    assert held_out
    assert not asked & held_out
    assert asked & {prompt.text for prompt in pools.train}
    assert "Tell me about owls." in asked


def test_what_is_measured_on_is_not_trained_on(llama):
    asked = ask_about([], [f"subject {number}" for number in range(40)], 0)
    texts = to_read(llama.tokenizer, [SimpleNamespace(prompt=each.text, reply="Well.") for each in asked], [], 0)
    trained, held_out = ({text.text for text in texts if text.held_out is held} for held in (False, True))
    assert 5 < len(held_out) < 40 < len(trained)
    assert not trained & held_out


def test_an_interrupted_run_leaves_no_folder_and_keeps_the_replies(subjects, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recipes.making.sae_making, "measure", interrupted)
        assert main([*TRAIN, *OUT]) == 130
    assert not [path for path in Path("saes").iterdir() if "own" in path.name and path.is_dir()]
    Path("saes/.own.partial").mkdir()  # What a kill leaves in the middle of writing.
    Path("saes/.own.partial/cfg.json").write_text("{")
    before = Path("saes/own.replies.jsonl").read_text()
    monkeypatch.setattr(TransformersEngine, "generate", interrupted)
    assert main([*TRAIN, *OUT]) == 0
    assert Path("saes/own.replies.jsonl").read_text() == before
    assert not Path("saes/.own.partial").exists()


def test_what_cannot_be_trained_is_bad_input(subjects, capsys):
    assert "there is no layer 9" in paragraph(capsys, *TRAIN, *OUT, "--layer", "9")
    assert "--width: 0 is no number" in paragraph(capsys, *TRAIN, *OUT, "--width", "0")
    (subjects / "topics.txt").write_text(f"owls\n{TOPICS[0]}\n")
    words = [*TRAIN, "--out", "saes/own", "--subjects", "topics.txt"]
    assert f"'{TOPICS[0]}' is a topic of the recipe's prompts" in paragraph(capsys, *words)
    assert "none.txt: the file does not exist" in paragraph(capsys, *TRAIN, *OUT, "--text", "none.txt")
    assert not Path("saes/own").exists()


def test_other_text_is_read_too(subjects):
    Path("more.txt").write_text("Knead the dough, then dust the flour over the board.\n" * 3)
    assert main([*TRAIN, *OUT, "--text", "more.txt"]) == 0
    told = read_json("saes/own/training.json")
    assert told["texts"]["trained"] + told["texts"]["held_out"] == told["texts"]["replies"] + 3
    assert list(told["files"]) == ["subjects.txt", "more.txt"]


def test_a_perfect_reconstruction_costs_nothing_and_zeros_do(llama):
    same = SimpleNamespace(layer=1, encode=lambda hidden: hidden, module=SimpleNamespace(decode=lambda hidden: hidden))
    texts = [Text("Knead the dough and dust the flour over the board.", 2, True)]
    clean, spliced, zeroed = _losses(llama.model, llama.tokenizer, same, texts)
    assert spliced == pytest.approx(clean, abs=1e-5)
    assert abs(zeroed - clean) > 1e-3


class Steered:
    """Latent 0 speaks of owls from the second strength on, latent 1 of many things, latent 2 of nothing."""

    name, generated = "stub", 0

    def generate(self, requests, sampling, progress=None):
        self.generated += len(requests)
        return [Completion(each.id, self._text(each), (1,), "stop", 3, 4) for each in requests]

    def _text(self, request):
        (added,) = request.interventions
        latent, number = map(int, request.id.split("/"))
        strong = float(added.vector.norm()) > 10 * STRENGTHS[0] + 0.01
        return (["owls" if strong else "dull", f"about t{number}", "dull"][latent]) + f" {number}"

    def log_probabilities(self, requests, continuations):
        return [
            (0.0 if any(word in request.prompt.split(" about ")[-1] for word in text.split()[:-1]) else -1.0,) * 2
            for request, text in zip(requests, continuations, strict=True)
        ]


class Rows:
    """Directions without an SAE."""

    def direction(self, latent, norm):
        from esr_train.steering.directions import SteeringVector

        return SteeringVector(1, None, torch.eye(4)[latent], 1.0, norm)


def test_a_latent_is_labelled_at_the_weakest_strength_at_which_most_replies_are_about_one_topic(tmp_path):
    topics = ("owls", *(f"t{number}" for number in range(SHORTLIST - 1)))
    candidates = [Candidate(latent, topics, 0.5, 0.01) for latent in range(3)]
    prompts = [Prompt(f"How do I number {number}?", f"topic {number // 2}") for number in range(20)]
    engine = Steered()

    def label():
        return label_by_steering(engine, Rows(), 10.0, candidates, prompts, tmp_path / "s.jsonl", "made", 0)

    (found,) = label()
    assert (found.latent, found.description, found.strength) == (0, "owls", STRENGTHS[1])
    assert len(found.examples) == 5
    assert engine.generated == 5 * (3 + 3 + 2)
    assert label() == [found]
    assert engine.generated == 40
    with pytest.raises(InputError, match="no latent steers to a topic"):
        label_by_steering(engine, Rows(), 10.0, candidates[1:], prompts, tmp_path / "s.jsonl", "made", 0)


def test_labels_by_steering_need_topics_that_are_not_the_prompts(subjects, capsys):
    assert main([*TRAIN, *OUT]) == 0
    words = ["data", "labels", "recipe.yaml", "sae.release=saes", "sae.id=own", "sae.labels=null", "--steer"]
    words += ["--out", "labels.jsonl", "--column", "reply", "--texts"]
    replies = read_jsonl("saes/own.replies.jsonl", dict)
    only = [row for row in replies if row["topic"] in TOPICS]
    Path("topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in only))
    assert "no text of a topic that is none of the prompts'" in paragraph(capsys, *words, "topics.jsonl")
    Path("bare.jsonl").write_text(json.dumps({"reply": "Owls fly."}) + "\n")
    assert "the row has no 'topic'" in paragraph(capsys, *words, "bare.jsonl")
    assert "--namer" in paragraph(capsys, *words, "bare.jsonl", "--namer", "x/y")
    shutil.rmtree("saes/own")
