"""Directions that are optimised against a model."""

import pytest
import torch

from esr_train.errors import RunError
from esr_train.steering.adaptive import TOKENS_AT_ONCE, Target, _batches, optimise
from esr_train.steering.directions import Add
from esr_train.steering.hook import steering

PROMPT, REPLY = (1, 20, 30, 40), (50, 51, 52, 53, 54, 55)


def nats(model, target: Target, add: Add) -> float:
    ids = torch.tensor([target.ids])
    with steering(model, [(add,)]) as hook, torch.no_grad():
        hook.set_rows(torch.zeros_like(ids), torch.arange(ids.shape[1])[None] >= target.reply)
        found = model(input_ids=ids).logits[0, target.reply - 1 : -1].log_softmax(-1)
    return -float(found.gather(1, ids[0, target.reply :, None]).mean())


@pytest.fixture
def targets() -> list[Target]:
    long = Target(0, (*PROMPT, 7, *REPLY), 5)
    return [Target(0, PROMPT + REPLY, 4), long, Target(1, PROMPT + tuple(reversed(REPLY)), 4)]


def units(model) -> torch.Tensor:
    drawn = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.norm(dim=1, keepdim=True)


def test_directions_of_norm_one_make_their_targets_likelier_and_the_model_stays(family, targets):
    before = {name: each.clone() for name, each in family.model.state_dict().items()}
    start, length = units(family.model), torch.tensor([4.0, 6.0])
    found = optimise(family.model, 1, targets, start, length, steps=20)
    assert torch.allclose(found.units.norm(dim=1), torch.ones(2), atol=1e-5)
    assert found.losses.shape == (21, 2)
    assert (found.losses.amin(0) < found.losses[0] - 0.05).all()
    assert all(torch.equal(each, before[name]) for name, each in family.model.state_dict().items())
    assert all(each.requires_grad for each in family.model.parameters())


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_the_loss_is_that_of_the_engine_s_own_steering_and_the_best_step_is_kept(family, targets, positions):
    if positions == "generated":
        targets = [Target(each.direction, each.ids, each.reply, each.reply) for each in targets]
    length = torch.tensor([4.0, 6.0])
    found = optimise(family.model, 1, targets, units(family.model), length, steps=5)
    for number, best in enumerate(found.losses.amin(0).tolist()):
        add = Add(1, found.units[number] * length[number], positions)
        mine = [nats(family.model, each, add) for each in targets if each.direction == number]
        assert sum(mine) / len(mine) == pytest.approx(best, abs=2e-4)


def test_a_loss_that_is_no_number_stops_it(family, targets):
    with pytest.raises(RunError, match="not finite"):
        optimise(family.model, 1, targets, units(family.model) * torch.inf, torch.ones(2), steps=1)


def test_batches_hold_like_lengths_within_what_is_computed_at_once():
    found = _batches([Target(0, (1,) * length, 1) for length in (600, 10, 500, 20, TOKENS_AT_ONCE + 1)])
    assert [[len(each.ids) for each in batch] for batch in found] == [[10, 20], [500], [600], [TOKENS_AT_ONCE + 1]]
