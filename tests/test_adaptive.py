"""Directions that are optimised against a model."""

import pytest
import torch
from training_world import transcripts

from esr_train.errors import RunError
from esr_train.files import read_json
from esr_train.provenance import sha256
from esr_train.steering.adaptive import TOKENS_AT_ONCE, UNLIKELY, Target, _batches, optimise
from esr_train.steering.directions import Add
from esr_train.steering.hook import steering
from esr_train.transcript import VectorRef, read_transcripts
from recipes.cli import main
from recipes.using.attacks import MOVES, STARTS, MovedDirections, Search
from tests.small_run import new_run

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


def test_an_unwanted_text_becomes_unlikely_and_counts_less_than_nothing(family):
    target = Target(0, PROMPT + REPLY, 4, wanted=False)
    start, length = units(family.model)[:1], torch.tensor([4.0])
    found = optimise(family.model, 1, [target], start, length, steps=10)
    before, after = (nats(family.model, target, Add(1, unit * 4.0)) for unit in (start[0], found.units[0]))
    assert after > before + 0.05
    assert float(found.losses[0, 0]) == pytest.approx(-min(before, UNLIKELY), abs=1e-3)


def test_rows_are_steered_along_their_moved_directions_as_strongly_as_before(tmp_path):
    file = tmp_path / "moved.safetensors"
    file.write_bytes(b"vectors")
    rows = transcripts(steered=2, normal=1)
    latents = [row.steering.latent for row in rows if row.steering]
    moved = MovedDirections(file, {latent: f"topic {latent}" for latent in latents}, "print")
    found = moved.steered(rows)
    steered = [row for row in found if row.steering]
    for row, latent, before in zip(steered, latents, rows, strict=False):
        assert row.steering.vector == VectorRef(str(file), sha256(file))
        assert (row.steering.latent, row.steering.label) == (None, f"topic {latent}")
        assert row.steering.strength == before.steering.strength
        assert (row.spans, row.meta) == (before.spans, before.meta)
    assert [row for row in found if not row.steering] == [row for row in rows if not row.steering]


@pytest.mark.parametrize(
    ("scores", "taken"),
    [
        ({"moved": 40.0, "moved halfway": 12.5, "as it was": 30.0}, "moved halfway"),
        ({"moved": 0.0, "as it was": 0.0}, "moved"),
        ({"moved": None, "as it was": 90.0}, "as it was"),
        ({"moved": None, "as it was": None}, "moved"),
        ({}, "moved"),
    ],
)
def test_of_all_candidates_the_one_is_taken_under_which_the_arm_scores_lowest(scores, taken):
    assert Search({}, scores).taken == taken


@pytest.mark.slow
def test_an_arm_is_trained_on_along_directions_that_were_optimised_against_another(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.using.attacks.STEPS", 3)
    monkeypatch.setattr("recipes.using.attacks.DRAWS", 1)
    run = new_run(tmp_path, assets)
    hardened = "hardened: {of: tuned, train: {live: {adaptive: true}, args: {max_steps: 2}}}"
    words = [*run.words, "eval.trials=4", "eval.conditions=[adaptive]", f"arms={{tuned: {{}}, {hardened}}}"]
    assert main(words) == 0
    rows = read_transcripts(run.folder / "data" / "hardened.jsonl")
    files = {row.steering.vector.file for row in rows if row.steering}
    assert files == {str(run.folder / "attacks" / "tuned-train.safetensors")}
    trained = {row.steering.label for row in rows if row.steering}
    curves = {name: read_json(run.folder / "attacks" / f"{name}.json") for name in ("tuned-train", "tuned", "hardened")}
    assert trained <= set(curves["tuned-train"])
    assert set(curves["tuned"]) == set(curves["hardened"])
    assert not set(curves["tuned"]) & set(curves["tuned-train"])
    for name, search in curves["tuned"].items():
        assert {start: len(losses) for start, losses in search["losses"].items()} == {"own": 4, "tilted": 4}
        assert (len(search["losses"]), len(search["scores"])) == (STARTS, MOVES), "what the plan counts"
        assert search["losses"]["own"][0] != search["losses"]["tilted"][0], name
        assert search["scores"][search["taken"]] == min(search["scores"].values())
    assert main(["data", "generate", *words[1:], "--arm", "hardened"]) == 2
