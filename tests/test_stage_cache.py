"""Stages are done once, anew when what decides them changes, and keep a record of what made them."""

import json
from pathlib import Path

import pytest

from esr_train.errors import InputError
from recipes.stages.stage_cache import Stage, StageCache


class Counted:
    """A stage that writes a file and counts how often it was done."""

    def __init__(self, folder: Path, name: str = "data/tuned", output: str = "rows.txt") -> None:
        self.folder, self.name, self.output, self.done = folder, name, output, 0

    def do(self, cache: StageCache, **inputs: object) -> str:
        stage = Stage(self.name, inputs, (self.output,), ("esr_train.errors",))
        return cache.do(stage, self._work)

    def _work(self) -> None:
        self.done += 1
        (self.folder / self.output).write_text(str(self.done))


def test_a_stage_is_done_once_however_often_a_run_is_started(tmp_path):
    counted = Counted(tmp_path)
    prints = {counted.do(StageCache(tmp_path), seed=1) for _ in range(3)}
    assert counted.done == 1
    assert len(prints) == 1


def test_changed_inputs_make_it_anew_and_say_what_changed(tmp_path, capsys):
    counted = Counted(tmp_path)
    first = counted.do(StageCache(tmp_path), lora={"r": 32})
    second = counted.do(StageCache(tmp_path), lora={"r": 8})
    assert counted.done == 2
    assert first != second
    assert "data/tuned: changed: lora.r: 32 -> 8; done anew" in capsys.readouterr().out


def test_a_stage_that_was_never_done_is_not_said_to_be_done_anew(tmp_path, capsys):
    def failing(seed: int, output: str = "") -> None:
        def work() -> None:
            (tmp_path / "rows.txt").write_text(output) if output else None
            raise InputError("it fails")

        with pytest.raises(InputError):
            StageCache(tmp_path).do(Stage("latents", {"seed": seed}, ("rows.txt",), ("esr_train.errors",)), work)

    failing(1)
    failing(2)
    assert capsys.readouterr().out == ""
    failing(3, "half")
    failing(4)
    assert capsys.readouterr().out == "latents: changed: seed: 3 -> 4; what was begun is dropped\n"
    assert not (tmp_path / "rows.txt").exists()


def test_a_missing_output_makes_it_anew_without_changing_its_fingerprint(tmp_path):
    counted = Counted(tmp_path)
    first = counted.do(StageCache(tmp_path), seed=1)
    (tmp_path / "rows.txt").unlink()
    assert counted.do(StageCache(tmp_path), seed=1) == first
    assert counted.done == 2


def test_what_was_made_of_other_inputs_is_removed_before_the_stage_begins(tmp_path):
    counted = Counted(tmp_path)
    counted.do(StageCache(tmp_path), seed=1)
    seen = []
    stage = Stage("data/tuned", {"seed": 2}, ("rows.txt",), ("esr_train.errors",))
    StageCache(tmp_path).do(stage, lambda: seen.append((tmp_path / "rows.txt").exists()))
    assert seen == [False]


def test_redo_makes_a_stage_and_what_depends_on_it_anew_once(tmp_path):
    rows, adapter = Counted(tmp_path), Counted(tmp_path, "train/tuned", "adapter.txt")

    def run(redo: tuple[str, ...] = ()) -> None:
        cache = StageCache(tmp_path, redo=redo)
        adapter.do(cache, data=rows.do(cache, seed=1))

    run()
    run(("data",))
    assert (rows.done, adapter.done) == (2, 2)
    run()
    assert (rows.done, adapter.done) == (2, 2)
    run(("train/tuned",))
    assert (rows.done, adapter.done) == (2, 3)


def test_an_interrupted_stage_goes_on_with_what_is_there(tmp_path):
    stage = Stage("data/tuned", {"seed": 1}, ("rows.txt",), ("esr_train.errors",))

    def interrupted() -> None:
        (tmp_path / "rows.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StageCache(tmp_path).do(stage, interrupted)
    seen = []
    StageCache(tmp_path).do(stage, lambda: seen.append((tmp_path / "rows.txt").read_text()))
    assert seen == ["half"]


def test_each_stage_records_what_made_it_and_starting_a_run_changes_no_record(tmp_path):
    Counted(tmp_path).do(StageCache(tmp_path), seed=1)
    before = (tmp_path / "stages.json").read_bytes()
    made = json.loads(before)["data/tuned"]["made"]
    assert set(made) == {"commit", "dirty", "at", "seconds", "generated", "versions", "modules"}
    assert set(made["modules"]) == {"esr_train.errors"}
    Counted(tmp_path).do(StageCache(tmp_path), seed=1)
    assert (tmp_path / "stages.json").read_bytes() == before


def test_a_stage_whose_code_has_changed_is_kept_and_named(tmp_path):
    counted = Counted(tmp_path)
    counted.do(StageCache(tmp_path), seed=1)
    records = json.loads((tmp_path / "stages.json").read_text())
    records["data/tuned"]["made"]["modules"]["esr_train.errors"] = "00000000"
    (tmp_path / "stages.json").write_text(json.dumps(records))
    cache = StageCache(tmp_path)
    counted.do(cache, seed=1)
    assert counted.done == 1
    assert cache.outdated() == {"data/tuned": ["esr_train.errors"]}


def test_a_stage_without_outputs_discards_in_its_own_way(tmp_path):
    discarded = []
    for seed in (1, 2):
        stage = Stage("trials/base/steered", {"seed": seed}, (), (), discard=lambda: discarded.append("rows"))
        StageCache(tmp_path).do(stage, lambda: None)
    assert discarded == ["rows"]
