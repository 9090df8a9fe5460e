"""A row's own steering is exact at the layer, survives gradient checkpointing, and is drawn reproducibly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_world import ANSWERS, LAYER, gradients, read_six, recipe, transcripts, with_adapter, write_world

from esr_train.errors import InputError, RunError
from esr_train.provenance import sha256
from esr_train.recipe import LiveSection
from esr_train.steering.hook import SteeringHook
from esr_train.training.batches import Collator
from esr_train.training.checks import check_flow, recorded
from esr_train.training.dataset import read_rows, singly, table, to_dataset
from esr_train.training.injection import COLUMNS, LiveInjection, draw, hook_rows, live_injection, load_vectors
from esr_train.training.trainer import train
from esr_train.transcript import Steering, VectorRef, read_transcripts, write_transcripts


@pytest.fixture
def world(tmp_path, family):
    """(model with LoRA, batch, injection) for four steered and two normal rows."""
    rows = read_six(tmp_path, family)
    batch = Collator(family.tokenizer.pad_token_id)(list(to_dataset(singly(rows), table(rows))))
    vectors = torch.randn(len(table(rows)), 64)
    return with_adapter(family), batch, LiveInjection(LiveSection(), vectors, LAYER, seed=5)


def test_every_steered_token_gets_exactly_its_own_vector_and_no_other_token_anything(world):
    model, batch, live = world
    inputs = dict(batch)
    with live.steering(model, inputs, epoch=3), recorded(model, LAYER) as recording, torch.no_grad():
        model(**inputs)
    for row in range(6):
        strength = live.strength(int(batch["key"][row]), float(batch["threshold_raw"][row]), epoch=3)
        assert (strength > 0) == (row < 4)
        vector = live.vectors[batch["vector"][row]] * strength
        real = batch["attention_mask"][row].bool()
        assert torch.equal(recording.after[row, real], recording.before[row, real] + vector)
        assert torch.equal(recording.after[row, ~real], recording.before[row, ~real])


def test_generated_positions_begin_at_the_first_reply_token(world):
    model, batch, live = world
    generated = LiveInjection(live.settings, live.vectors, LAYER, 5, "generated")
    added, inputs = generated.interventions(batch, epoch=0), dict(batch)
    with generated.steering(model, inputs, 0), recorded(model, LAYER) as recording, torch.no_grad():
        model(**inputs)
    steered = (recording.after != recording.before).any(-1)
    assert torch.equal(steered, (generated.delta(added, batch) != 0).any(-1))
    for row in range(4):
        start, length = int(batch["reply"][row].nonzero()[0]), int(batch["attention_mask"][row].sum())
        assert 0 < start < length
        assert steered[row].tolist() == [start <= i < length for i in range(steered.shape[1])]


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_the_answer_gets_its_share_of_the_strength_from_its_first_token_on(world, family, factor, positions):
    model, batch, live = world
    section = LiveSection(strength=(0.8, 1.3), answer=factor)
    weaker = LiveInjection(section, live.vectors, LAYER, 5, positions)
    inputs, added = dict(batch), weaker.interventions(batch, epoch=3)
    with SteeringHook(model, added) as hook, recorded(model, LAYER) as recording, torch.no_grad():
        hook.set_rows(hook_rows(batch), batch["reply"])
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.equal(recording.after, recording.before + weaker.delta(added, batch))
    (counts,) = hook.counts().values()
    for row in range(4):
        strength = weaker.strength(int(batch["key"][row]), float(batch["threshold_raw"][row]), epoch=3)
        vector = live.vectors[batch["vector"][row]] * strength
        start, length = int(batch["answer"][row].nonzero()[0]), int(batch["attention_mask"][row].sum())
        first = 0 if positions == "all" else int(batch["reply"][row].nonzero()[0])
        text = family.tokenizer.decode(batch["input_ids"][row, start:length]).strip()
        assert text.startswith(ANSWERS[row % 3])
        before, after = recording.before[row], recording.after[row]
        assert torch.equal(after[:first], before[:first])
        assert torch.equal(after[first:start], before[first:start] + vector)
        assert torch.equal(after[start:length], before[start:length] + factor * vector)
        assert torch.equal(after[length:], before[length:])
        assert counts[row] == start - first
        assert counts[6 + row] == (length - start if factor else 0)
    assert counts[4:6] == counts[10:12] == [0, 0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(world, reentrant):
    model, batch, live = world
    loss, plain = gradients(model, batch, live)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    again, checkpointed = gradients(model, batch, live)
    assert again == loss
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-8)


def test_strength_zero_and_share_zero_are_the_plain_loss(world):
    model, batch, live = world
    inputs = {name: value for name, value in batch.items() if name not in COLUMNS}
    plain = model(**inputs, use_cache=False, fused_lm_head=True).loss.item()
    for settings in (LiveSection(strength=(0.0, 0.0)), LiveSection(share=0.0)):
        assert gradients(model, batch, LiveInjection(settings, live.vectors, LAYER, 5))[0] == plain
    assert gradients(model, batch, live)[0] != plain


def test_draws_belong_to_seed_row_and_epoch():
    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)}) == 4
    live = LiveInjection(LiveSection(strength=(0.5, 2.0), share=0.3), torch.zeros(1, 4), LAYER, 0)
    strengths = [live.strength(key, 10.0, 0) for key in range(2000)]
    injected = [strength for strength in strengths if strength]
    assert 500 < len(injected) < 700
    assert 5 <= min(injected) < 5.5
    assert 19.5 < max(injected) <= 20


def test_the_check_before_training_passes_and_leaves_no_trace(world):
    model, batch, live = world
    state = torch.get_rng_state()
    check_flow(model, batch, live)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_check_before_training_fails_where_something_is_broken(world, monkeypatch):
    model, batch, live = world
    with monkeypatch.context() as patch:
        patch.setattr("esr_train.steering.layer_edits.Layer.steer", lambda self, hidden: hidden)
        with pytest.raises(RunError, match="tokens did not get the steering"):
            check_flow(model, batch, live)
    with monkeypatch.context() as patch:
        steer = "esr_train.steering.layer_edits.Layer.steer"
        patch.setattr(steer, lambda self, hidden: hidden.detach() + 0.0)
        with pytest.raises(RunError, match=r"live injection"):
            check_flow(model, batch, live)


@pytest.fixture
def own(tmp_path, llama, monkeypatch):
    """Rows steered by two vectors of one's own, in files of their own."""
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    torch.manual_seed(3)
    rows = transcripts()
    for number in range(2):
        save_file({"mine": torch.randn(64)}, f"vector-{number}.safetensors")
    for number, row in enumerate(rows):
        if row.steering is not None:
            file = f"vector-{number % 2}.safetensors"
            steering = Steering(None, LAYER, None, None, row.steering.strength, VectorRef(file, sha256(file)))
            rows[number] = replace(row, steering=steering)
    write_transcripts("runs/t/data/tuned.jsonl", rows)
    return read_rows(recipe(), tmp_path / "runs/t/data/tuned.jsonl", llama.tokenizer)


def test_rows_steered_by_vectors_of_ones_own_train_under_them(own):
    sources = table(own)
    assert [source.origin.file for source in sources] == ["vector-0.safetensors", "vector-1.safetensors"]
    vectors = load_vectors(sources)
    for number in range(2):
        torch.testing.assert_close(vectors[number], load_file(f"vector-{number}.safetensors")["mine"])
    assert live_injection(recipe(), own).layer == LAYER
    folder = train(recipe(args={"num_train_epochs": 1}), "tuned", Path("runs/t"))
    assert (folder / "adapter_config.json").is_file()


def changed() -> None:
    save_file({"mine": torch.ones(64)}, "vector-1.safetensors")


def another(table: torch.Tensor) -> None:
    """Rows and file agree, and it is not one vector of the model's width."""
    save_file({"mine": table}, "vector-1.safetensors")
    rows = read_transcripts("runs/t/data/tuned.jsonl")
    for number, row in enumerate(rows):
        if row.steering and row.steering.vector and row.steering.vector.file == "vector-1.safetensors":
            reference = VectorRef("vector-1.safetensors", sha256("vector-1.safetensors"))
            rows[number] = replace(row, steering=replace(row.steering, vector=reference))
    write_transcripts("runs/t/data/tuned.jsonl", rows)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed, r"vector-1\.safetensors: this is not the vector that the rows were steered with"),
        (lambda: Path("vector-1.safetensors").unlink(), "vector-1.safetensors: the file .* does not exist"),
        (lambda: another(torch.ones(2, 64)), "steered by one vector, and none of the 2 here is called None"),
        (lambda: another(torch.ones(32)), r"vectors of different widths steer the rows \(\[32, 64\]\)"),
    ],
)
def test_a_vector_that_is_not_the_one_of_the_rows_is_refused(own, spoil, message):
    spoil()
    with pytest.raises(InputError, match=message):
        train(recipe(args={"num_train_epochs": 1}), "tuned", Path("runs/t"))


def test_vectors_of_another_width_than_the_models_are_refused(own):
    for number in range(2):
        save_file({"mine": torch.ones(32)}, f"vector-{number}.safetensors")
    another(torch.ones(32))
    rows = read_transcripts("runs/t/data/tuned.jsonl")
    steered = [row for row in rows if row.steering and row.steering.vector.file == "vector-1.safetensors"]
    write_transcripts("runs/t/data/tuned.jsonl", steered)
    with pytest.raises(InputError, match="32 wide, the model's residual stream 64"):
        train(recipe(args={"num_train_epochs": 1}), "tuned", Path("runs/t"))


def test_a_layer_that_is_not_the_saes_is_refused(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [replace(row, steering=row.steering and replace(row.steering, layer=0)) for row in transcripts()]
    write_world(tmp_path, llama, rows)
    with pytest.raises(InputError, match="steered at layer 0 with latents of an SAE of layer 1"):
        train(recipe(), "tuned", Path("runs/t"))
