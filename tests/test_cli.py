"""The `esr` command as a new user meets it: exit codes, and errors as one paragraph."""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from esr_train.command import add_command, add_recipe, guarded, parse_command
from esr_train.errors import InputError, RunError
from recipes import shipped
from recipes.cli import main
from tests.conftest import ROOT

Esr = Callable[..., tuple[int, str, str]]


@pytest.fixture
def esr(capsys: pytest.CaptureFixture[str]) -> Esr:
    """Runs the command in this process: words -> exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_without_a_command_the_usage_is_shown_and_nothing_was_done(esr):
    code, out, _ = esr()
    assert code == 2
    assert all(f"\n  {name} " in out for name in ("run", "data", "train", "eval", "recipes"))
    assert esr("--help")[0] == 0


def test_an_unknown_command_is_bad_input(esr):
    code, _, err = esr("trian")
    assert code == 2
    assert "no command 'trian'" in err


def test_the_shipped_recipes_are_listed_shown_copied_and_valid(esr, tmp_path):
    code, out, _ = esr("recipes", "list")
    assert code == 0
    assert len(out.splitlines()) == len(shipped()) >= 1
    assert "tiny/quickstart " in out
    code, text, _ = esr("recipes", "show", "tiny/quickstart")
    assert code == 0
    assert yaml.safe_load(text)["name"] == "quickstart"
    target = tmp_path / "mine" / "first.yaml"
    assert esr("recipes", "copy", "tiny/quickstart", target)[:2] == (0, f"{target}: its runs go to runs/first\n")
    assert yaml.safe_load(target.read_text()) == {**yaml.safe_load(text), "name": "first"}
    assert esr("recipes", "validate", target)[:2] == (0, f"{target}: valid\n")


@pytest.mark.parametrize("name", shipped())
def test_the_header_of_a_copy_names_the_copy(esr, tmp_path, name):
    before = shipped()[name].read_text()
    target = tmp_path / "mine.yaml"
    assert esr("recipes", "copy", name, target, "--name", "my-run")[0] == 0
    text = target.read_text()
    assert f"recipes/{name}.yaml" in before
    assert f"recipes/{name}" not in text
    assert text.count(str(target)) == before.count(f"recipes/{name}.yaml")
    assert f"esr run {target}" in text
    old = yaml.safe_load(before)["name"]
    assert f"name={old}" not in text
    assert f"runs/{old}" not in text
    assert "make quickstart" not in text
    assert yaml.safe_load(text) == {**yaml.safe_load(before), "name": "my-run"}


def test_copies_of_recipes_with_one_file_name_have_run_directories_of_their_own(esr, tmp_path):
    for model in ("gemma-2-9b-it", "llama-3.1-8b-instruct"):
        for target in (tmp_path / model, tmp_path / model / "new" / "live.yaml"):
            assert esr("recipes", "copy", f"{model}/live", target)[0] == 0
            file = target if target.suffix == ".yaml" else target / "live.yaml"
            assert yaml.safe_load(file.read_text())["name"] == f"{model}-live"
    assert len({yaml.safe_load(path.read_text())["name"] for path in shipped().values()}) == len(shipped())


def test_a_folder_that_is_no_run_is_named_as_such(esr, tmp_path):
    for command in (("monitor", "fit"), ("monitor", "eval"), ("latents", "course")):
        code, _, err = esr(*command, tmp_path)
        assert code == 2
        assert err.startswith(f"error: {tmp_path}: this folder is no run: it holds no recipe.yaml. Name a folder that")
    assert list(tmp_path.iterdir()) == []


def test_a_copys_name_must_be_a_folders(esr, tmp_path):
    code, _, err = esr("recipes", "copy", "tiny/quickstart", tmp_path / "mine.yaml", "--name", "my run")
    assert code == 2
    assert err.startswith("error: --name: 'my run' cannot be a run directory's name.")
    assert not (tmp_path / "mine.yaml").exists()


def test_a_copy_never_overwrites(esr, tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("name: precious\n")
    code, _, err = esr("recipes", "copy", "tiny/quickstart", target)
    assert code == 2
    assert str(target) in err
    assert target.read_text() == "name: precious\n"


def test_an_unknown_recipe_names_those_there_are(esr):
    code, _, err = esr("recipes", "show", "tiny/quikstart")
    assert code == 2
    assert "Did you mean tiny/quickstart?" in err
    assert "gemma-2-9b-it/live or gemma-2-9b-it/onpolicy" in esr("recipes", "show", "gemma-2-9b-it")[2]


@pytest.mark.parametrize("name", ["tiny/quickstart", "tiny/quickstart.yaml", "recipes/tiny/quickstart.yaml"])
def test_a_shipped_recipes_name_stands_for_its_path_in_every_command(esr, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for words in (("run",), ("train",), ("data", "generate"), ("eval", "calibrate"), ("eval", "run")):
        code, _, err = esr(*words, name, "train.args.no=1", "model.path=./none")
        assert code == 2
        assert "model.path: the folder './none' does not exist" in err or "there are no rows yet" in err
    assert esr("recipes", "validate", name)[0] == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [("run",), ("train",), ("data", "generate"), ("eval", "calibrate"), ("eval", "run"), ("eval", "report")],
)
def test_every_command_that_takes_a_recipe_refuses_a_missing_one_alike(esr, tmp_path, words):
    missing = tmp_path / "no.yaml"
    code, _, err = esr(*words, missing)
    assert code == 2
    assert err.startswith(
        f"error: {missing}: the file does not exist, nor a shipped recipe of that name. Check the path"
    )


@pytest.mark.parametrize("words", [("data", "generate"), ("eval", "run"), ("train",)])
def test_an_arm_that_is_not_in_the_recipe_names_those_that_are(esr, words):
    code, _, err = esr(*words, ROOT / "recipes/tiny/quickstart.yaml", "--arm", "tunned")
    assert code == 2
    assert "no arm 'tunned'" in err
    assert "tuned." in err


def test_the_exit_code_says_whose_fault_it_is(capsys):
    def failing(error: BaseException) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    assert guarded(lambda: None, debug=False) == 0
    assert guarded(failing(InputError("it is wrong", "here:3", "Change it.")), debug=False) == 2
    assert capsys.readouterr().err == "error: here:3: it is wrong. Change it.\n"
    assert guarded(failing(RunError("it failed.")), debug=False) == 1
    assert guarded(failing(KeyboardInterrupt()), debug=False) == 130
    assert "goes on where it stopped" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(InputError):
        main(["run", str(tmp_path / "no.yaml"), "--debug"])


@pytest.mark.parametrize("module", ["recipes.cli", "data_gen", "eval", "esr_train"])
def test_every_room_has_a_door(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: esr")


def test_the_installed_command_reports_bad_input_without_a_traceback(tmp_path):
    command = Path(sys.executable).with_name("esr")
    if not command.is_file():
        pytest.skip("the package is not installed beside this python")
    result = subprocess.run([command, "run", tmp_path / "no.yaml"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")


def test_a_wheel_holds_every_file_and_finds_shipped_recipes_in_an_empty_folder(tmp_path):
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    packages, ignored = ("esr_train", "eval", "data_gen", "recipes"), shutil.ignore_patterns("__pycache__")
    for name in packages:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    shipped_files = {path.relative_to(source) for name in packages for path in (source / name).rglob("*.*")}
    assert not [path for path in shipped_files if not (site / path).exists()]
    show = [sys.executable, "-m", "recipes.cli", "recipes", "show", "llama-3.1-8b-instruct/live"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(show, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.stdout == (ROOT / "recipes" / "llama-3.1-8b-instruct" / "live.yaml").read_text(), done.stderr


def test_overrides_may_stand_behind_options_and_what_is_none_is_refused(capsys):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    made = add_command(commands, "make", print, "make it")
    add_recipe(made, "a=1")
    made.add_argument("--out")
    add_command(commands, "other", print, "something else")
    options = parse_command(parser, ["make", "r.yaml", "a=1", "--out", "x", "b=2", "c={d: 3}"])
    assert (options.recipe, options.overrides, options.out) == ("r.yaml", ["a=1", "b=2", "c={d: 3}"], "x")
    for words in (["make", "r", "--out", "x", "b"], ["make", "r", "--outt=x"], ["other", "b=2"]):
        with pytest.raises(SystemExit):
            parse_command(parser, words)
        assert "unrecognized arguments" in capsys.readouterr().err
