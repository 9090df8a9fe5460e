"""A user's mistake is one paragraph (what, where, remedy) and exit code 2, whatever command meets it."""

import json
import shutil
from pathlib import Path

import pytest
from training_world import recipe, write_world

from esr_train import load_model
from esr_train.errors import InputError
from esr_train.recipe import dump_recipe
from recipes.cli import main
from tests.conftest import ROOT, make_family


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def write_template(text: str):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def cut_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def without_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("tokenizer*"), folder / "chat_template.jinja"]:
        file.unlink()


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def set_config(**values: object):
    def spoil(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **values}))

    return spoil


MISTAKES = {
    "a base model, without a chat template": (without_template, "no chat template", "instruction-tuned"),
    "an empty chat template": (write_template(""), "no chat template", "instruction-tuned"),
    "a chat template with a mistake": (write_template("{% for m in messages %}"), "refuses this conversation", ""),
    "a chat template that fails": (write_template("{{ messages[9].content.x }}"), "refuses this conversation", ""),
    "a chat template that always refuses": (write_template("{{ raise_exception('no') }}"), "conversation (no)", ""),
    "a chat template that says nothing": (write_template("Hello."), "rewrites messages", ""),
    "a chat template without an end of turn": (
        write_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"),
        "begins a reply with",
        "Use a template",
    ),
    "a tokenizer file that is cut off": (cut_tokenizer, "cannot be loaded", "Name a local folder"),
    "no tokenizer": (without_tokenizer, "cannot be loaded", "Name a local folder"),
}

COMMANDS = {
    "data preview": ["data", "preview", "rows.jsonl", "--tokenizer", "model"],
    "data preview as a page": ["data", "preview", "rows.jsonl", "--tokenizer", "model", "--html", "page.html"],
    "data stats": ["data", "stats", "rows.jsonl", "--tokenizer", "model"],
    "train --dry-run": ["train", "recipe.yaml", "--dry-run"],
    "train --dump-tokens": ["train", "recipe.yaml", "--dump-tokens", "tokens.jsonl"],
    "train": ["train", "recipe.yaml"],
    "run": ["run", str(ROOT / "recipes/tiny/quickstart.yaml"), "model.path=model", "model.device=cpu"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, make_family("llama"))
    shutil.copy(folder / "runs" / "t" / "data" / "tuned.jsonl", folder / "rows.jsonl")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe()))
    return folder


def fails(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    code = main(COMMANDS[command])
    error = capsys.readouterr().err
    paragraph = [line for line in error.splitlines() if line.startswith("error: ")]
    assert (code, len(paragraph)) == (2, 1), error
    assert "Traceback" not in error
    return paragraph[0]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_model_that_cannot_be_talked_to(world, tmp_path, monkeypatch, capsys, mistake, command):
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    spoil, what, remedy = MISTAKES[mistake]
    spoil(Path("model"))
    error = fails(tmp_path, command, capsys)
    assert what in error
    assert remedy in error
    first = error.partition("mistakes: (1) ")[2] or error.removeprefix("error: ")
    assert "model" in first.partition(": ")[0], error
    assert not Path("runs/t/adapter").exists()


BROKEN_MODELS = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights that are cut off": cut_weights,
    "weights that are text": lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "a configuration that is cut off": lambda folder: (folder / "config.json").write_text("{"),
    "a configuration that is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "an unknown architecture": set_config(model_type="somebodys"),
    "another width": set_config(hidden_size=128),
    "a width that is a word": set_config(hidden_size="wide"),
    "more layers than weights": set_config(num_hidden_layers=6),
    "fewer layers than weights": set_config(num_hidden_layers=2),
}


@pytest.mark.parametrize("mistake", BROKEN_MODELS)
def test_a_model_that_cannot_be_loaded(world, tmp_path, mistake):
    shutil.copytree(world / "model", tmp_path / "model")
    BROKEN_MODELS[mistake](tmp_path / "model")
    with pytest.raises(InputError, match=r"model\.path: .*cannot be loaded \(.+\)\. Name a local folder"):
        load_model(tmp_path / "model", device="cpu")
