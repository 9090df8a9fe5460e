"""A finished run, one thing changed in place, the same command: the first stage that the change decides is due.

All that builds on it follows, because its fingerprint is part of theirs (`tests/test_stage_cache.py`).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from esr_train import provenance
from recipes.cli import main
from recipes.stages.stage_cache import Stage, StageCache
from tests.conftest import ROOT
from tests.small_run import new_run

pytestmark = pytest.mark.slow


class DueError(Exception):
    """Raised instead of doing a stage."""


@dataclass
class Finished:
    """A finished run and everything that it was made of, in one folder; `words` run it again."""

    folder: Path
    words: list[str]

    def first_due(self, monkeypatch: pytest.MonkeyPatch, *more: str) -> str | None:
        """The first stage that the same command would do; None if it would do nothing but the report."""

        def do(cache: StageCache, stage: Stage, work: Callable[[], None]) -> str:
            fingerprint = cache._fingerprint(stage)
            if cache._is_done(stage, fingerprint):
                cache._note_outdated(stage, cache.records()[stage.name])
            elif stage.name != "report":
                raise DueError(stage.name)
            return fingerprint

        provenance._read_module.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(StageCache, "do", do)
            try:
                assert main([*self.words, *more, "--debug"]) == 0
            except DueError as due:
                return str(due)
            finally:
                provenance._read_module.cache_clear()
        return None


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Base, a trained arm and a given adapter, measured; the model lies in two shards."""
    folder = tmp_path_factory.mktemp("lie")
    for name in ("llama", "llama-sae"):
        shutil.copytree(assets / name, folder / "assets" / name)
    for name in ("vocabulary.json", "prompts.jsonl"):
        shutil.copy(assets / name, folder / "assets")
    _shard(folder / "assets" / "llama")
    run = new_run(folder, folder / "assets")
    shutil.copy(ROOT / "recipes" / "tiny" / "cues.txt", folder / "cues.txt")
    small = [
        "eval={trials: 4, conditions: [steered, unsteered], bootstrap: 20}",
        "calibration={rounds: 1, prompts: 1, bounds: [0.1, 2.0], max_new_tokens: 8, verify: 0}",
        "train.args.max_steps=2",
        f"data.cues={folder / 'cues.txt'}",
    ]
    words = [*run.words, *small]
    assert main(words) == 0
    shutil.copytree(folder / "quickstart" / "adapter" / "tuned", folder / "given")
    (folder / "given" / "provenance.json").unlink()  # as an adapter from elsewhere: it knows no base weights
    words += [f"arms={{tuned: {{}}, given: {{adapter: {folder / 'given'}}}}}"]
    assert main(words) == 0
    return Finished(folder, words)


def _shard(model: Path) -> None:
    """Cut a model's weights into two files, as every 8B model has them."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    index = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, model / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_template(at: Path) -> None:
    path = at / "assets" / "llama" / "chat_template.jinja"
    path.write_text(path.read_text() + "{# changed #}")


def change_shard(at: Path) -> None:
    path = at / "assets" / "llama" / "model-00002-of-00002.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).mul_(1.01)
    save_file(weights, path, metadata={"format": "pt"})


def change_sae_layer(at: Path) -> None:
    path = at / "assets" / "llama-sae" / "cfg.json"
    values = json.loads(path.read_text())
    values["metadata"]["hook_name"] = "blocks.1.hook_resid_post"
    path.write_text(json.dumps(values))


def change_text(name: str, more: str) -> Callable[[Path], None]:
    def change(at: Path) -> None:
        path = at / name
        path.write_text(path.read_text() + more)

    return change


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "chat template": (change_template, "latents"),
    "second shard of the weights": (change_shard, "latents"),
    "model config": (lambda at: edit_json(at / "assets/llama/config.json", rope_theta=9999.0), "latents"),
    "generation config": (lambda at: edit_json(at / "assets/llama/generation_config.json", note=1), "latents"),
    "tokenizer config": (lambda at: edit_json(at / "assets/llama/tokenizer_config.json", note=1), "latents"),
    "layer in the SAE's config": (change_sae_layer, "latents"),
    "labels": (change_text("assets/llama-sae/labels.jsonl", '{"index": 1023, "description": "zebras"}\n'), "latents"),
    "prompts": (change_text("prompts.jsonl", '{"prompt": "How do zebras run?", "topic": "zebras"}\n'), "latents"),
    "judge's vocabulary": (lambda at: edit_json(at / "assets/vocabulary.json", **{"zzz": ["zzzz"]}), "calibrate"),
    "cues": (change_text("cues.txt", "Hold on, that was about something else.\n"), "data/sources/steered"),
    "lora_alpha of a given adapter": (
        lambda at: edit_json(at / "given/adapter_config.json", lora_alpha=3200),
        "trials/given",
    ),
}


@pytest.fixture
def inputs(finished: Finished) -> Iterator[Finished]:
    """The finished run, whose inputs are put back after the test."""
    kept = finished.folder.with_name("kept")
    names = ("assets", "given", "cues.txt", "prompts.jsonl")
    for name in names:
        _copy(finished.folder / name, kept / name)
    yield finished
    for name in names:
        _copy(kept / name, finished.folder / name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_changed_in_place_makes_the_first_stage_it_decides_due(inputs, monkeypatch, what):
    change, stage = CHANGES[what]
    assert inputs.first_due(monkeypatch) is None
    change(inputs.folder)
    assert (inputs.first_due(monkeypatch) or "none").startswith(stage)


@pytest.mark.parametrize(
    ("word", "stage"),
    [
        ("sampling.temperature=0.7", "latents"),
        ("engine.positions=generated", "latents"),
        ("seed=1", "calibrate"),
        ("calibration.target=31", "calibrate"),
        ("data.steered.mid_sentence=0.5", "data/sources/steered"),
        ("data.min_answer_score=1", "data/sources/"),
        ("train.args.learning_rate=1e-3", "train/tuned"),
        ("train.live.share=0.5", "train/tuned"),
        ("arms.given.prompt=monitor", "trials/given"),
        ("eval.trials=5", "trials/base/steered"),
    ],
)
def test_a_changed_setting_makes_the_first_stage_it_decides_due(inputs, monkeypatch, word, stage):
    assert (inputs.first_due(monkeypatch, word) or "none").startswith(stage)


@pytest.mark.parametrize("module", ["esr_train/masking.py", "data_gen/steered.py"])
def test_changed_code_keeps_the_stage_and_says_so(inputs, monkeypatch, capsys, module):
    real = Path.read_bytes

    def edited(path: Path) -> bytes:
        return real(path) + (b"# edited" if path == ROOT / module else b"")

    monkeypatch.setattr(Path, "read_bytes", edited)
    assert inputs.first_due(monkeypatch) is None
    said = capsys.readouterr().out
    assert "kept, though code that makes them has changed since" in said
    assert module.removesuffix(".py").replace("/", ".") in said
    assert "train/tuned" in said if "masking" in module else "data/sources/steered" in said


def test_only_unsteered_trials_know_another_judge_too(inputs, monkeypatch, tmp_path):
    words = [word for word in inputs.words if not word.startswith(("eval=", "arms="))]
    words += ["eval={trials: 4, conditions: [unsteered], bootstrap: 20}", "arms={}", f"runs={tmp_path}"]
    assert main(words) == 0
    only = Finished(inputs.folder, words)
    assert only.first_due(monkeypatch) is None
    edit_json(inputs.folder / "assets" / "vocabulary.json", zzz=["zzzz"])
    assert only.first_due(monkeypatch) == "trials/base"


def test_trials_that_were_removed_are_run_again(inputs, monkeypatch):
    """A damaged file says of itself that it may be deleted; what stands in `stages.json` must not deny it."""
    file = inputs.folder / "quickstart" / "trials" / "base.jsonl"
    before = file.read_text()
    file.write_text(before.rpartition("\n{")[0] + "\n")
    assert inputs.first_due(monkeypatch) == "trials/base/unsteered"
    file.unlink()
    assert main(inputs.words) == 0
    assert sorted(file.read_text().splitlines()) == sorted(before.splitlines())


def test_starting_a_finished_run_changes_no_record(inputs):
    stages = inputs.folder / "quickstart" / "stages.json"
    before = json.loads(stages.read_text())
    assert main(inputs.words) == 0
    assert json.loads(stages.read_text()) == before
