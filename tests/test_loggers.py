"""Loggers by choice: what each one gets, one run an arm, and none unless it is asked for."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from training_world import recipe, write_world

from esr_train.training.settings import trainer_config
from esr_train.training.trainer import train
from esr_train.transcript import read_transcripts, write_transcripts

WANTED = ("train/loss", "train/tokens_per_second", "train/peak_memory_gib", "train/trained_token_share")
STUBS = {
    # Installed here is neither; what a logger is told is what counts.
    "trackio": """
import json
from contextvars import ContextVar
class context_vars: current_space_id = ContextVar("space", default=None)
config = {}
class _Config(dict):
    def update(self, values, allow_val_change=False): super().update(values)
config = _Config()
def init(**named): open("told.jsonl", "a").write(json.dumps({"init": named["project"]}) + "\\n")
def log(values): open("told.jsonl", "a").write(json.dumps(values) + "\\n")
def finish(): open("told.jsonl", "a").write(json.dumps({"finish": 1}) + "\\n")
""",
    "tensorboardX": """
import json, os
class SummaryWriter:
    def __init__(self, log_dir):
        os.makedirs(log_dir)
        self._path = os.path.join(log_dir, "events.out.tfevents")
    def add_text(self, *_): pass
    def add_scalar(self, name, value, step): open(self._path, "a").write(f"{name} {value} {step}\\n")
    def flush(self): pass
    def close(self): pass
""",
}


@pytest.fixture
def world(tmp_path, llama, monkeypatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    yield tmp_path
    for package in STUBS:  # or later tests would find it installed
        sys.modules.pop(package, None)


def section_for(logger: str, name: str = "t"):
    made = recipe(args={"num_train_epochs": 1, "report_to": logger}).model_copy(update={"name": name})
    data = made.directory / "data" / "tuned.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    write_transcripts(data, read_transcripts("runs/t/data/tuned.jsonl"))
    return made


def stub(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "stubs" / package).mkdir(parents=True)
    (folder / "stubs" / package / "__init__.py").write_text(STUBS[package])
    monkeypatch.syspath_prepend(folder / "stubs")


def test_wandb_gets_the_figures_of_every_training_in_a_run_of_its_own(world, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("t", "u"):
        section = section_for("wandb", name)
        train(section, "tuned", section.directory)
        assert wandb.run is None
    wandb.teardown()  # finish() only asks wandb's own process to close a run's file, whose end is then still in memory
    written = [path.read_bytes() for path in Path("wandb").glob("offline-run-*/*.wandb")]
    assert len(written) == 2
    for run in written:
        assert [name for name in WANTED if name.encode() not in run] == []


def test_trackio_gets_the_figures(world, monkeypatch):
    stub(world, "trackio", monkeypatch)
    section = section_for("trackio")
    train(section, "tuned", section.directory)
    told = [json.loads(line) for line in Path("told.jsonl").read_text().splitlines()]
    assert told[0] == {"init": "huggingface"}
    assert told[-1] == {"finish": 1}
    steps = [entry for entry in told if "train/loss" in entry]
    assert len(steps) == 3
    assert all(set(WANTED) <= entry.keys() for entry in steps)


def test_tensorboard_events_outlive_the_checkpoints(world, monkeypatch):
    stub(world, "tensorboardX", monkeypatch)
    section = section_for("tensorboard")
    folder = train(section, "tuned", section.directory)
    assert not (folder / "checkpoints").exists()
    (events,) = (folder / "tensorboard").glob("events.out.tfevents*")
    assert [name for name in WANTED if name.encode() not in events.read_bytes()] == []


def test_nothing_is_told_unless_it_is_asked_for(world):
    assert trainer_config(recipe(), world).report_to == []
