"""A row's own steering is exact at the layer, survives gradient checkpointing, and is drawn reproducibly."""

import pytest
import torch
from training_world import LAYER, gradients, read_six, with_adapter

from esr_train.errors import RunError
from esr_train.recipe import LiveSection
from esr_train.training.batches import Collator
from esr_train.training.checks import InjectionRecorder, check_flow
from esr_train.training.dataset import singly, table, to_dataset
from esr_train.training.injection import COLUMNS, LiveInjection, draw


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
    with live.steering(model, inputs, epoch=3), InjectionRecorder(model, LAYER) as recorder, torch.no_grad():
        model(**inputs)
    for row in range(6):
        strength = live.strength(int(batch["key"][row]), float(batch["threshold_raw"][row]), epoch=3)
        assert (strength > 0) == (row < 4)
        vector = live.vectors[batch["vector"][row]] * strength
        real = batch["attention_mask"][row].bool()
        assert torch.equal(recorder.after[row, real], recorder.before[row, real] + vector)
        assert torch.equal(recorder.after[row, ~real], recorder.before[row, ~real])


def test_generated_positions_begin_at_the_first_reply_token(world):
    model, batch, live = world
    generated = LiveInjection(live.settings, live.vectors, LAYER, 5, "generated")
    added, inputs = generated.interventions(batch, epoch=0), dict(batch)
    with generated.steering(model, inputs, 0), InjectionRecorder(model, LAYER) as recorder, torch.no_grad():
        model(**inputs)
    steered = (recorder.after != recorder.before).any(-1)
    assert torch.equal(steered, (generated.delta(added, batch) != 0).any(-1))
    for row in range(4):
        start, length = int(batch["reply"][row].nonzero()[0]), int(batch["attention_mask"][row].sum())
        assert 0 < start < length
        assert steered[row].tolist() == [start <= i < length for i in range(steered.shape[1])]


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
