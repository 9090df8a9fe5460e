"""The trainer: the same loss however rows are batched, continued as if never stopped, mistakes refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_world import kill_training, recipe, transcripts, write_world
from transformers import TrainerControl, TrainerState

from esr_train.__main__ import main
from esr_train.adapters import merge
from esr_train.errors import InputError
from esr_train.files import write_json
from esr_train.recipe import dump_recipe
from esr_train.training.callbacks import BehaviourProbe, Observation
from esr_train.training.saving import last_checkpoint
from esr_train.training.settings import lora_config, trainer_arguments, trainer_config
from esr_train.training.trainer import PATIENCE, train

ROOT = Path(__file__).parent.parent
NO_DROPOUT = {"r": 4, "lora_dropout": 0.0}


@pytest.fixture
def world(tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, family)
    return family.name


@pytest.fixture
def small(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    return tmp_path


def log_of(section, directory: str) -> list[dict]:
    """Train in a directory of its own and return the log."""
    data = Path(directory) / "data" / "tuned.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text(Path("runs/t/data/tuned.jsonl").read_text())
    folder = train(section, "tuned", Path(directory))
    return json.loads((folder / "training_log.json").read_text())


def steps(log: list[dict]) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in log if "grad_norm" in entry]


def test_batch_one_times_accumulation_eight_equals_batch_eight_times_one(world):
    """Padded rows equal unpadded ones, too: in batches of one there is no padding."""
    found = []
    for batch, accumulation in ((1, 8), (8, 1)):
        args = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        found.append(steps(log_of(recipe(world, args=args, lora=NO_DROPOUT), f"runs/{batch}")))
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_bfloat16_trains_as_float32_does_to_its_precision(world):
    """As the large recipes do: live injection, gradient checkpointing, with packing and without."""
    for packing in (False, True):
        args = {"gradient_checkpointing": True, "num_train_epochs": 1, "packing": packing}
        full = recipe(world, args=args, lora=NO_DROPOUT)
        half = full.model_copy(update={"model": full.model.model_copy(update={"dtype": "bfloat16"})})
        one, other = (steps(log_of(each, f"runs/{packing}-{n}")) for n, each in enumerate((full, half)))
        assert len(one) == len(other) > 0
        for (loss, _), (rounded, _) in zip(one, other, strict=True):
            assert rounded == pytest.approx(loss, rel=0.03)


def test_training_saves_a_whole_adapter_with_log_card_and_provenance(world):
    section = recipe(world, args={"num_train_epochs": 1})
    folder = train(section, "tuned", section.directory)
    weights = load_file(str(folder / "adapter_model.safetensors"))
    assert any("lora_B" in name and bool(weight.any()) for name, weight in weights.items())
    assert json.loads((folder / "provenance.json").read_text())["world_size"] == 1
    assert not (folder / "checkpoints").exists()
    entry = json.loads((folder / "training_log.json").read_text())[0]
    assert {"tokens_per_second", "trained_token_share", "peak_memory_gib", "loss"} <= entry.keys()
    written = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert train(section, "tuned", section.directory) == folder
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_held_out_rows_and_checkpoints_that_are_kept(small):
    args = {"num_train_epochs": 1, "eval_strategy": "epoch", "save_total_limit": 2}
    section = recipe(args=args)
    folder = train(section, "tuned", section.directory)
    log = json.loads((folder / "training_log.json").read_text())
    assert any("eval_loss" in entry for entry in log)
    assert last_checkpoint(folder / "checkpoints", 1) is not None


def test_training_stops_when_the_held_out_loss_no_longer_falls_and_keeps_the_best(small):
    watch = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    args = {"num_train_epochs": 12, "learning_rate": 0.3, "lr_scheduler_type": "constant", **watch}
    section = recipe(args=args, live=False)
    log = json.loads((train(section, "tuned", section.directory) / "training_log.json").read_text())
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == losses.index(min(losses)) + 1 + PATIENCE < 12


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_optimiser_states_in_eight_bits(small, optim):
    """Matrices of fewer than 4,096 weights keep 32 bits, so the rank is high enough here."""
    section = recipe(args={"optim": optim, "num_train_epochs": 1}, lora={"r": 64, "lora_dropout": 0.0})
    section_32 = recipe(args={"num_train_epochs": 1}, lora={"r": 64, "lora_dropout": 0.0})
    eight, full = (steps(log_of(each, f"runs/{name}")) for name, each in (("eight", section), ("full", section_32)))
    assert eight[0] == full[0]
    assert eight != full
    for one, other in zip(eight, full, strict=True):
        assert one[0] == pytest.approx(other[0], rel=0.02)


def test_the_probe_is_logged_beside_the_loss_and_changes_nothing(small):
    plain = log_of(recipe(), "runs/plain")
    section, seen = recipe(probe={"every": 2}), []

    def make(model, tokenizer):
        def probe(step: int, logged: bool) -> Observation:
            assert logged
            assert not model.training
            seen.append(step)
            return Observation({"restarts": 0.25}, ({"response": f"at {step}"}, {"response": "calm"}))

        return probe

    folder = train(section, "tuned", section.directory, probe=make)
    log = json.loads((folder / "training_log.json").read_text())
    assert seen == [2, 4, 6]
    assert [entry["step"] for entry in log if entry.get("probe_restarts") == 0.25] == seen
    assert steps(log) == steps(plain)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["response"]) for row in samples[::2]] == [(2, "at 2"), (4, "at 4"), (6, "at 6")]
    assert len(samples) == 6


def test_samples_of_steps_that_are_done_again_are_not_kept_twice(tmp_path):
    seen: list[dict] = []
    callback = BehaviourProbe(
        lambda step, logged: Observation({}, ({"made": len(seen)},)), 1, seen.append, tmp_path / "s.jsonl"
    )
    for step in (1, 2, 3, 2):
        state = TrainerState(global_step=step, is_world_process_zero=True)
        callback.on_step_end(None, state, TrainerControl(), model=torch.nn.Linear(1, 1))
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "made": 0}, {"step": 2, "made": 3}]


def test_a_probe_that_nobody_hands_in_is_said_to_be_left_out(small, capsys):
    section = recipe(probe={"every": 1}, args={"num_train_epochs": 1})
    train(section, "tuned", section.directory)
    assert "train.probe is left out" in capsys.readouterr().err


def test_a_finished_or_begun_training_is_not_continued_with_another_recipe(small):
    section = recipe(args={"num_train_epochs": 1})
    train(section, "tuned", section.directory)
    with pytest.raises(InputError, match=r"lora\.r: 4 -> 8"):
        train(recipe(args={"num_train_epochs": 1}, lora={"r": 8}), "tuned", section.directory)
    begun = small / "runs" / "u"
    write_json(begun / "adapter" / "tuned" / "checkpoints" / "provenance.json", {"arm": "tuned", "world_size": 2})
    (begun / "data").mkdir()
    (begun / "data" / "tuned.jsonl").write_text((small / "runs/t/data/tuned.jsonl").read_text())
    with pytest.raises(InputError, match="world_size: 2 -> 1"):
        train(section, "tuned", begun)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": {"learning_rat": 1}}, "train.args.learning_rat.*Did you mean learning_rate"),
        ({"args": {"fp16": True}}, "train.args.fp16.*model.dtype"),
        ({"args": {"packing": True, "packing_strategy": "wrapped"}}, "train.args.packing_strategy.*cuts rows"),
        ({"args": {"report_to": "trackio"}}, "train.args.report_to.*pip install trackio"),
        ({"args": {"lr_scheduler_type": "cosin"}}, "train.args.*cosin"),
        ({"lora": {"rank": 4}}, "train.lora.rank"),
        ({"lora": {"r": 0}}, "train.lora"),
    ],
)
def test_settings_that_do_not_exist_or_do_harm_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("esr_train.training.settings.find_spec", lambda name: None)
    section = recipe(**options)
    with pytest.raises(InputError, match=message):
        _ = trainer_config(section, tmp_path), lora_config(section)


def test_an_adapter_on_modules_that_do_not_exist_is_bad_input(small):
    section = recipe(lora={"target_modules": ["q_prj"]})
    with pytest.raises(InputError, match="q_prj"):
        train(section, "tuned", section.directory)


def test_defaults_are_the_papers(tmp_path):
    section = recipe().model_copy(update={"train": type(recipe().train)()})
    args, lora = trainer_config(section, tmp_path), lora_config(section)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (32, 16, 0.05, "all-linear")
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (2e-4, "cosine", 10)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 4)
    assert (args.bf16, args.fp16, args.report_to, args.gradient_checkpointing) == (False, False, [], False)


def test_a_checkpoint_without_its_last_file_is_passed_over(tmp_path):
    for step in (2, 10):
        write_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json", {})
        (tmp_path / f"checkpoint-{step}" / "rng_state.pth").touch()
    assert last_checkpoint(tmp_path, 1) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path, 2) is None
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"log_hist')
    assert last_checkpoint(tmp_path, 1) == tmp_path / "checkpoint-2"


def test_a_dry_run_shows_rows_steps_share_and_masks_before_the_recipe_and_trains_nothing(small, capsys):
    """Overrides may stand behind the flag."""
    (small / "r.yaml").write_text(dump_recipe(recipe()))
    assert main(["r.yaml", "--dry-run", "--rows", "1", "train.loss=unmasked", "train.args.packing=true"]) == 0
    shown = capsys.readouterr().out
    places = [
        shown.index(wanted)
        for wanted in (
            "rows: 12\n",
            "rows per source: {'normal': 4, 'steered': 8}",
            "trained share of tokens: 0.",
            "straddling tokens: ",
            "packed sequences: ",
            "optimiser steps: ",
            "[[First, knead",
            "loss: unmasked",
        )
    ]
    assert places == sorted(places)
    assert not (small / "runs" / "t" / "adapter").exists()


def test_steps_are_counted_as_the_trainer_counts_them():
    args = trainer_arguments(recipe(args={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}))
    assert args.model_copy(update={"num_train_epochs": 2.0}).optimiser_steps(9) == 2 * 2
    assert args.model_copy(update={"max_steps": 5}).optimiser_steps(900) == 5


def test_a_dry_run_without_rows_names_the_command_that_makes_them(small, capsys):
    (small / "r.yaml").write_text(dump_recipe(recipe()))
    assert main(["r.yaml", "--dry-run", "name=other"]) == 2
    said = capsys.readouterr().err
    assert (
        said == "error: runs/other/data/tuned.jsonl: there are no rows yet. Make them first: esr data generate "
        "r.yaml name=other.\n"
    )


def test_bad_input_is_one_paragraph_and_exit_code_two(small, capsys):
    (small / "r.yaml").write_text(dump_recipe(recipe(lora={"rank": 3})))
    assert main(["r.yaml", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: train.lora.rank")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_training_killed_in_its_second_epoch_ends_as_if_it_never_was(small):
    args = {
        "per_device_train_batch_size": 1,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    section = recipe(args=args)
    recipe_file = small / "r.yaml"
    recipe_file.write_text(dump_recipe(section))
    folder = small / "runs" / "t" / "adapter" / "tuned"
    # Twelve steps an epoch; the checkpoint at fifteen is in the middle of the second.
    kill_training([str(recipe_file)], folder, checkpoint=15)
    assert main(["r.yaml"]) == 0
    log_of(copy.deepcopy(section), "runs/whole")
    resumed = load_file(str(folder / "adapter_model.safetensors"))
    whole = load_file("runs/whole/adapter/tuned/adapter_model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(bool((resumed[name] == whole[name]).all()) for name in whole)


@pytest.mark.slow
def test_nf4_trains_and_merges_on_the_cpu(small):
    """Merged into the unquantised base, with what 4 bits had rounded away left as it was there."""
    section = recipe(args={"num_train_epochs": 1}, quantization="nf4")
    folder = train(section, "tuned", section.directory)
    weights = load_file(str(folder / "adapter_model.safetensors"))
    assert any("lora_B" in name and bool(weight.any()) for name, weight in weights.items())
    merged = merge(section.model, folder, small / "merged")
    assert merged.largest_difference < 1e-4 * merged.largest_logit
    assert "quantization_config" not in json.loads((small / "merged" / "config.json").read_text())


def test_rows_of_the_world_are_of_different_lengths():
    """The batching tests above would show nothing otherwise."""
    assert len({len(transcript.content) for transcript in transcripts()}) > 3
