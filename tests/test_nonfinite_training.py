"""Training stops before it learns from a loss or gradient that is not finite, and never goes on from such weights."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_world import recipe, transcripts, write_world
from trl import SFTTrainer

from esr_train.errors import InputError, RunError
from esr_train.models import load_model, load_tokenizer
from esr_train.training.dataset import read_rows, row_key
from esr_train.training.injection import live_injection
from esr_train.training.settings import trainer_config
from esr_train.training.trainer import EsrTrainer, build_trainer, train
from esr_train.transcript import Strength, write_transcripts

SINGLY = {"per_device_train_batch_size": 1}


@pytest.fixture
def world(tmp_path, llama, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    return tmp_path


def spoil(monkeypatch, section, name: str, what: str = "loss") -> None:
    """Let the loss, or its gradient alone, be NaN wherever the row of this name is."""
    rows = read_rows(section, Path("runs/t/data/tuned.jsonl"), load_tokenizer(section.model))
    wanted = torch.tensor(next(row.labelled.input_ids for row in rows if row.labelled.id == name))
    compute = SFTTrainer.compute_loss

    def spoiled(self, model, inputs, *rest, **options):
        result = compute(self, model, inputs, *rest, **options)
        windows = inputs["input_ids"].unfold(1, len(wanted), 1) if inputs["input_ids"].shape[1] >= len(wanted) else ()
        here = any(bool((window == wanted).all(-1).any()) for window in windows)
        loss, *others = result if isinstance(result, tuple) else (result,)
        if here:
            # The root's slope at zero is infinite, times zero.
            loss = loss * float("nan") if what == "loss" else loss + (loss - loss.detach()).abs().sqrt()
        return (loss, *others) if others else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", spoiled)


def adapter() -> Path:
    return Path("runs/t/adapter/tuned")


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    "args",
    [
        SINGLY,
        {**SINGLY, "gradient_accumulation_steps": 3},
        {**SINGLY, "max_grad_norm": 0.0},
        {**SINGLY, "gradient_checkpointing": True},
        {**SINGLY, "logging_strategy": "no"},
        {**SINGLY, "packing": True},
        {"per_device_train_batch_size": 12},
    ],
    ids=["singly", "accumulated", "not clipped", "checkpointed", "not logged", "packed", "together"],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_training_and_names_the_row(world, monkeypatch, args, what):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 99}
    section = recipe(args={**args, **saving}, max_length=300)
    spoil(monkeypatch, section, "s3", what)
    with pytest.raises(RunError, match=rf"step \d+: the {what} is nan, in one of the rows .*'s3'.*before it learns"):
        train(section, "tuned", section.directory)
    assert not (adapter() / "adapter_config.json").exists()
    for file in adapter().glob("checkpoints/*/adapter_model.safetensors"):
        assert all(bool(weight.isfinite().all()) for weight in load_file(file).values())


def test_only_the_row_itself_is_named_where_it_is_alone(world, monkeypatch):
    section = recipe(args=SINGLY)
    spoil(monkeypatch, section, "s3")
    with pytest.raises(RunError, match=r"in one of the rows 's3'\. "):
        train(section, "tuned", section.directory)


def test_a_held_out_loss_that_is_not_finite_stops_training(world, monkeypatch):
    held_out = min((row.id for row in transcripts()), key=row_key)
    compute = SFTTrainer.compute_loss

    def spoiled(self, model, inputs, return_outputs=False, **options):
        loss, outputs = compute(self, model, inputs, return_outputs=True, **options)
        loss = loss if model.training else loss * float("inf")
        return (loss, outputs) if return_outputs else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", spoiled)
    section = recipe(args={"num_train_epochs": 1, "eval_strategy": "steps", "eval_steps": 1})
    with pytest.raises(RunError, match=rf"step 2: the loss is inf, in one of the rows '{held_out}'\. "):
        train(section, "tuned", section.directory)


def test_a_strength_that_overflows_is_refused_before_training(world):
    rows = transcripts()
    assert rows[3].steering is not None
    strong = dataclasses.replace(rows[3].steering, strength=Strength(1e39, 1.0))
    rows[3] = dataclasses.replace(rows[3], steering=strong)
    write_transcripts("runs/t/data/tuned.jsonl", rows)
    with pytest.raises(InputError, match=r"row 's3': a strength of 1e\+39 decoder rows is no finite vector"):
        train(recipe(), "tuned", recipe().directory)


def test_a_learning_rate_that_blows_the_weights_up_is_found_at_the_next_step(world):
    section = recipe(args={"learning_rate": 1e30, "max_steps": 5}, live=False)
    with pytest.raises(RunError, match=r"step 2: the loss is (nan|inf).*lower the learning rate"):
        train(section, "tuned", section.directory)


def test_weights_that_the_last_step_blows_up_are_not_saved_as_an_adapter(world):
    section = recipe(args={"learning_rate": 1e39, "max_steps": 1, "save_strategy": "no"}, live=False)
    with pytest.raises(RunError, match=r"what was trained cannot be used: .* is not finite"):
        train(section, "tuned", section.directory)
    assert not (adapter() / "adapter_config.json").exists()


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_gradient_that_is_not_finite_stops_training_before_the_step(world, value):
    """The loss is finite all the while."""
    section = recipe(args=SINGLY)
    args = trainer_config(section, adapter() / "checkpoints")
    tokenizer = load_tokenizer(section.model)
    rows = read_rows(section, Path("runs/t/data/tuned.jsonl"), tokenizer)
    model = load_model(section.model, for_training=True)
    trainer = build_trainer(section, args, model, tokenizer, rows, live_injection(section, rows))
    weight = next(weight for name, weight in trainer.model.named_parameters() if "lora_B" in name)
    before: list[torch.Tensor] = []

    def spoiled(gradient):
        before.append(weight.detach().clone())
        return gradient * float(value) if len(before) == 3 else gradient

    weight.register_hook(spoiled)
    with pytest.raises(RunError, match=rf"step 3: the gradient is {value}, in one of the rows '[sn]\d'\. "):
        trainer.train()
    assert len(before) == 3
    assert torch.equal(weight, before[-1])
    assert not torch.equal(weight, before[0])


def stopped(world) -> Path:
    """A training with two checkpoints whose last file was not written; returns the later checkpoint."""
    section = recipe(args={"save_total_limit": 2})
    train(section, "tuned", section.directory)
    (adapter() / "adapter_config.json").unlink()
    return adapter() / "checkpoints" / "checkpoint-6"


def fill(value: float):
    def change(checkpoint: Path) -> None:
        file = checkpoint / "adapter_model.safetensors"
        weights = load_file(file)
        next(weight for name, weight in weights.items() if "lora_B" in name)[0, 0] = value
        save_file(weights, file)

    return change


def drop(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file)


def log(**values):
    def change(checkpoint: Path) -> None:
        file = checkpoint / "trainer_state.json"
        state = json.loads(file.read_text())
        state["log_history"][-1].update(values)
        file.write_text(json.dumps(state))

    return change


BROKEN = {
    "a NaN": (fill(float("nan")), r"lora_B.* is not finite"),
    "an infinity": (fill(float("-inf")), r"lora_B.* is not finite"),
    "a loss that was not finite": (log(loss=float("nan")), "at step 6 the loss was nan"),
    "a gradient that was not finite": (log(grad_norm=float("inf")), "at step 6 the grad_norm was inf"),
    "a weight that is missing": (drop, "1 weights are missing"),
    "no weights": (lambda checkpoint: (checkpoint / "adapter_model.safetensors").unlink(), "is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_is_not_finite_or_not_whole_is_not_resumed(world, name):
    change, message = BROKEN[name]
    change(stopped(world))
    section = recipe(args={"save_total_limit": 2})
    with pytest.raises(InputError, match=rf"checkpoint-6.*: .*{message}.*Remove .*checkpoints to begin anew"):
        train(section, "tuned", section.directory)


def test_a_sound_checkpoint_is_resumed(world):
    stopped(world)
    section = recipe(args={"save_total_limit": 2})
    assert (train(section, "tuned", section.directory) / "adapter_config.json").is_file()


def scaled(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 64}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fill(float("nan")), "is not finite"),
        (fill(0.5), "was not saved as it was trained"),
        (drop, "1 weights are missing"),
        (scaled, "does not say what the trained model says"),
    ],
)
def test_an_adapter_that_is_not_the_trained_one_when_it_is_read_back_is_no_result(world, monkeypatch, change, message):
    save = EsrTrainer.save_model

    def spoiled(self, folder=None, _internal_call=False):
        save(self, folder, _internal_call)
        if folder.endswith(".saving"):
            change(Path(folder))

    monkeypatch.setattr(EsrTrainer, "save_model", spoiled)
    section = recipe(args={"num_train_epochs": 1})
    with pytest.raises(RunError, match=message):
        train(section, "tuned", section.directory)
    assert not (adapter() / "adapter_model.safetensors").exists()
