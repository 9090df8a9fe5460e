"""What a run was made from, and that it is not continued with something else."""

import hashlib
import os
from pathlib import Path

import pytest
from training_world import recipe

from esr_train.errors import InputError
from esr_train.provenance import RESULT, differences, provenance, refuse_changes, sha256, source_hashes


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's folder that the recipe names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")


def record(tmp_path: Path, text: str = "rows", world_size: int = 1, zero_stage: int | None = None, **options):
    (tmp_path / "d.jsonl").write_text(text)
    return provenance(recipe(**options), "tuned", tmp_path / "d.jsonl", 3, world_size, zero_stage)


def test_the_record_holds_hash_versions_and_world_size(tmp_path):
    found = record(tmp_path)
    assert found["data"] == {"sha256": hashlib.sha256(b"rows").hexdigest(), "rows": 3}
    assert found["world_size"] == 1
    assert found["versions"]["torch"].startswith("2.")
    assert found["recipe"]["train"]["lora"] == {"r": 4}


def test_a_finished_adapter_is_the_same_whatever_number_of_processes_finds_it(tmp_path):
    before = record(tmp_path, world_size=4)
    refuse_changes(before, record(tmp_path), tmp_path, RESULT)
    with pytest.raises(InputError, match="loss: 'masked' -> 'unmasked'"):
        refuse_changes(before, record(tmp_path, loss="unmasked"), tmp_path, RESULT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 2}, "zero_stage: None -> 2"),
        ({"text": "others"}, "data.sha256: "),
        ({"world_size": 2}, "world_size: 1 -> 2"),
        ({"loss": "unmasked"}, "recipe.train.loss: 'masked' -> 'unmasked'"),
        ({"lora": {"r": 8}}, "recipe.train.lora.r: 4 -> 8"),
    ],
)
def test_a_run_is_not_continued_with_something_else(tmp_path, change, message):
    before = record(tmp_path)
    with pytest.raises(InputError, match="begun with something else") as caught:
        refuse_changes(before, record(tmp_path, **change), tmp_path)
    assert message in str(caught.value)


def test_the_same_experiment_may_go_on(tmp_path):
    before = record(tmp_path)
    moved = {**record(tmp_path, probe={"every": 5}), "versions": {}, "data_path": "elsewhere"}
    refuse_changes(before, moved, tmp_path)


def test_differences_name_every_leaf():
    found = list(differences({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [2], "e": 0}))
    assert found == ["a.c: 2 -> 3", "d: [1] -> [2]", "e: None -> 0"]


def test_a_run_is_not_continued_on_other_weights(tmp_path):
    before = record(tmp_path)
    (tmp_path / "model" / "config.json").write_text('{"rope_theta": 1}')
    with pytest.raises(InputError, match="begun with something else: model: "):
        refuse_changes(before, record(tmp_path), tmp_path)


def test_a_large_file_is_hashed_once_until_its_time_of_change_differs(tmp_path, monkeypatch):
    monkeypatch.setattr("esr_train.provenance.LARGE", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"first")
    first = sha256(file)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert sha256(file) == first
    monkeypatch.undo()
    monkeypatch.setattr("esr_train.provenance.LARGE", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file.write_bytes(b"other")
    os.utime(file, ns=(1, 1))
    assert sha256(file) == hashlib.sha256(b"other").hexdigest() != first


def test_the_modules_that_made_a_stage_are_those_it_imports_directly_or_not():
    modules = source_hashes(["data_gen.steered"])
    assert {"data_gen.steered", "data_gen.sources", "eval.cells", "esr_train.errors"} <= set(modules)
    assert not any(name.startswith("recipes") for name in modules)
