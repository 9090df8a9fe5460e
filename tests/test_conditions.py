"""How the same cells are run under every condition, and where one condition goes on from another."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from esr_train.errors import InputError
from esr_train.recipe import CONDITION_NAMES, EvalSection
from esr_train.restarts import attempts
from esr_train.steering.directions import Direction
from esr_train.transcript import SaeRef
from eval.arms import matched_latents
from eval.cells import Cell, Prompt
from eval.conditions import (
    CONDITIONS,
    Condition,
    Setting,
    first_half,
    is_attack,
    matched,
    measured_conditions,
    opening,
    order,
    random_directions,
    register_condition,
    through_restart,
    title,
    welcomed,
    with_latents,
)
from eval.store import Trial
from eval.trials import Plan, Steerer, cell_request
from tests.trial_maker import made

CELLS = [Cell(f"How do I fold sheet {n}?", "linen", n % 3, f"topic{n % 3}", 1.0, n) for n in range(6)]
DIRECTIONS = {
    latent: Direction(1, f"topic{latent}", torch.eye(8)[latent], 2.0, 5.0, SaeRef("sae", "0"), latent)
    for latent in range(3)
}


def test_a_sweep_is_one_condition_for_each_strength_and_what_goes_on_from_others_runs_last():
    wanted = ("switched_off", "boost", "steered", "unsteered_continues", "random_direction")
    section = EvalSection(conditions=(*wanted, "unsteered"), boost=(0.5, 1.25))
    assert [measured.name for measured in measured_conditions(section, wanted)] == [
        "boost_x0.5", "boost_x1.25", "steered", "random_direction", "switched_off", "unsteered_continues",
    ]  # fmt: skip
    assert title("boost_x1.25") == "Steered at 1.25 × the threshold"
    assert title("random_x1.25") == "Steered along random directions at 1.25 × the threshold"
    assert title("somebody's own") == "somebody's own"


def test_conditions_stand_in_reading_order_with_sweeps_by_strength():
    ordered = ["steered", "unsteered", "switched_off", "boost_x0.5", "boost_x1.5", "random_x0.75", "random_x2", "mine"]
    assert sorted(ordered[::-1], key=order) == ordered


def setting(**given) -> Setting:
    steerer = Steerer(DIRECTIONS, dict.fromkeys(DIRECTIONS, 0.5))
    values = {"arm": "tuned", "cells": CELLS, "steerer": steerer, "seed": 0, "response": None}
    return Setting(**{**values, "own_thresholds": None, "stand_ins": None, **given})


def test_a_boost_multiplies_the_threshold():
    (member,) = measured_conditions(EvalSection(conditions=("boost",), boost=(1.5,)))
    plan = member.condition.plan(setting(value=member.value))
    assert {cell.multiple for cell in plan.cells} == {1.5}
    assert [cell.seed for cell in plan.cells] == [cell.seed for cell in CELLS]


def test_random_directions_are_swept_as_strongly_as_the_latents():
    members = measured_conditions(EvalSection(conditions=("random_boost",), boost=(0.5, 1.5)))
    assert [each.name for each in members] == ["random_x0.5", "random_x1.5"]
    assert all(is_attack(each.name) for each in members)
    plan = members[1].condition.plan(setting(value=members[1].value))
    drawn = CONDITIONS["random_direction"].plan(setting())
    for cell, at_threshold in zip(plan.cells, drawn.cells, strict=True):
        assert cell.label is None
        assert torch.allclose(adds(plan, cell)[0].vector, 1.5 * adds(drawn, at_threshold)[0].vector)


def test_in_mid_answer_the_first_half_is_the_base_models_and_is_not_steered():
    def response(arm: str, condition: str, cell: Cell) -> Trial:
        assert (arm, condition, cell.latent) == ("base", "unsteered", None)
        return made(response="Lay it flat.  Then fold it.\n")

    plan = CONDITIONS["mid_answer"].plan(setting(response=response))
    (request, *_) = [cell_request(cell, "key", plan.steerer, prefix=plan.prefixes[cell.key]) for cell in plan.cells]
    assert request.prefix == "Lay it flat."
    assert request.unsteered == len(request.prefix)
    assert [add.positions for add in request.interventions] == ["generated"]


@pytest.mark.parametrize(
    ("reply", "half"), [("", ""), (" \n", ""), ("Yes", "Yes"), ("a b", "a"), ("a  b c", "a  b"), (" a b c d ", " a b")]
)
def test_the_first_half_of_a_reply_has_the_larger_half_of_its_words(reply, half):
    assert first_half(reply) == half


def test_a_recalibrated_arm_runs_the_latents_that_have_a_threshold_of_its_own():
    plan = CONDITIONS["steered_recalibrated"].plan(setting(own_thresholds=lambda: {0: 0.9, 2: 0.7}))
    assert {cell.latent for cell in plan.cells} == {0, 2}
    assert plan.steerer.norms == {0: 0.9, 2: 0.7}


def test_a_condition_of_ones_own_is_measured_and_named_like_any_other():
    register_condition(Condition("halved", "Steered at half", lambda setting: Plan((), setting.steerer)))
    try:
        assert [each.name for each in measured_conditions(EvalSection(conditions=("halved",)))] == ["halved"]
        assert title("halved") == "Steered at half"
        with pytest.raises(ValueError, match="there is a condition 'halved' already"):
            register_condition(CONDITIONS["halved"])
    finally:
        del CONDITIONS["halved"], CONDITION_NAMES["halved"]


def test_random_directions_have_unit_norm_keep_the_latents_scale_and_stand_for_nothing():
    drawn = random_directions(DIRECTIONS, seed=0)
    for latent, direction in drawn.items():
        assert float(direction.unit.norm()) == pytest.approx(1)
        assert abs(float(direction.unit @ DIRECTIONS[latent].unit)) < 0.95
        assert direction.label is None
        vector = direction.add(0.7).vector
        assert float(vector.norm()) == pytest.approx(float(DIRECTIONS[latent].add(0.7).vector.norm()))
    again, other = random_directions(DIRECTIONS, seed=0), random_directions(DIRECTIONS, seed=1)
    assert torch.equal(drawn[0].unit, again[0].unit)
    assert not torch.equal(drawn[0].unit, other[0].unit)


def test_a_welcomed_push_meets_a_prompt_that_asks_for_it():
    prompts = (Prompt("How do I bake?", "topic0"), Prompt("How do I knead?", "topic0"), Prompt("How?", "linen"))
    plan = CONDITIONS["welcomed"].plan(setting(prompts=prompts, welcome="Tell me about {label}."))
    assert [cell.prompt for cell in plan.cells] == [
        "How do I bake?", "Tell me about topic1.", "Tell me about topic2.",
        "How do I knead?", "Tell me about topic1.", "Tell me about topic2.",
    ]  # fmt: skip
    assert all(cell.topic == cell.label for cell in plan.cells)
    assert [(cell.latent, cell.seed, cell.multiple) for cell in plan.cells] == [
        (cell.latent, cell.seed, cell.multiple) for cell in CELLS
    ]
    assert [float(adds(plan, cell)[0].vector.norm()) for cell in plan.cells] == pytest.approx([0.5 * 5.0] * 6)


def test_no_prompt_can_ask_for_what_stands_for_nothing():
    assert welcomed([replace(CELLS[0], label=None)], (), "Tell me about {label}.") == []


def test_attacks_try_to_derail_at_a_strength_of_the_base_models():
    names = ("steered", "generated_only", "two_directions", "three_layers", "adaptive", "random_direction")
    assert all(map(is_attack, (*names, "random_latents", "boost_x1.25")))
    others = ("unsteered", "welcomed", "steered_recalibrated", "switched_off", "steered_continues", "somebody's own")
    assert not any(map(is_attack, others))


def adds(plan: Plan, cell: Cell):
    return plan.steerer.request(cell, "key").interventions


def test_two_directions_at_once_are_as_long_as_one_and_no_latent_is_paired_with_itself():
    plan = CONDITIONS["two_directions"].plan(setting())
    for cell in CELLS:
        both = adds(plan, cell)
        assert float(sum(add.vector for add in both).norm()) == pytest.approx(0.5 * 5.0)
        assert both[0].vector[cell.latent] > 0
    alone = CONDITIONS["two_directions"].plan(setting(cells=[CELLS[0], CELLS[3]]))
    assert len(adds(alone, CELLS[0])) == 1


def test_three_layers_share_the_threshold_s_length_and_none_lies_before_the_first():
    plan = CONDITIONS["three_layers"].plan(setting())
    found = adds(plan, CELLS[1])
    assert [add.layer for add in found] == [0, 1]
    assert [float(add.vector.norm()) for add in found] == pytest.approx([0.5 * 5.0 / 2**0.5] * 2)


def test_steering_may_begin_with_the_reply():
    plan = CONDITIONS["generated_only"].plan(setting())
    assert [add.positions for add in adds(plan, CELLS[0])] == ["generated"]


def test_adapted_directions_keep_the_threshold_and_the_label():
    moved = {latent: replace(each, unit=torch.eye(8)[7]) for latent, each in DIRECTIONS.items()}
    plan = CONDITIONS["adaptive"].plan(setting(adapted=lambda: moved))
    (add,) = adds(plan, CELLS[2])
    assert float(add.vector[7]) == pytest.approx(0.5 * 5.0)
    assert plan.cells[2].label == "topic2"


def test_cells_take_the_stand_ins_latent_and_label():
    instead = {0: DIRECTIONS[1], 1: DIRECTIONS[2], 2: DIRECTIONS[0]}
    found = with_latents(CELLS, instead)
    assert [cell.latent for cell in found] == [1, 2, 0, 1, 2, 0]
    assert found[0].label == "topic1"
    assert [cell.seed for cell in found] == [cell.seed for cell in CELLS]


def test_stand_ins_are_near_in_frequency_and_decoder_norm_distinct_and_never_excluded():
    rng = np.random.default_rng(0)
    frequency, norms = 10 ** rng.uniform(-4, -1, 500), rng.uniform(0.5, 2, 500)
    frequency[:50] = 0
    wanted, excluded = list(range(100, 120)), set(range(300, 500))
    found = matched_latents(wanted, frequency, norms, excluded, seed=0)
    assert sorted(found) == wanted
    assert len(set(found.values())) == len(wanted)
    assert not set(found.values()) & (set(wanted) | excluded | set(range(50)))
    apart = [abs(np.log10(frequency[a] / frequency[b])) for a, b in found.items()]
    others = [abs(np.log10(frequency[a] / frequency[b])) for a in wanted for b in range(50, 300)]
    assert np.mean(apart) < 0.25 * np.mean(others)
    assert np.mean([abs(norms[a] - norms[b]) for a, b in found.items()]) < 0.2
    assert found == matched_latents(wanted, frequency, norms, excluded, seed=0)
    assert found != matched_latents(wanted, frequency, norms, excluded, seed=1)


def test_too_few_active_latents_to_stand_in_are_refused():
    with pytest.raises(InputError, match="only 1 others are ever active"):
        matched_latents([0, 1], np.array([0.1, 0.1, 0.1, 0.0]), np.ones(4), set(), seed=0)


@pytest.mark.parametrize(
    ("response", "begun"),
    [
        ("Knead it. Dust it. Shape it. Bake it.", "Knead it. Dust it."),
        ("Knead it. Wait, that's not right. Fold it. Tuck it.", "Knead it."),
        ("Knead it. Dust it.", "Knead it."),
        ("knead dough the dough", "knead dough"),
        ("", ""),
    ],
)
def test_an_opening_is_the_first_sentences_of_the_first_attempt_and_never_all_of_it(response: str, begun: str):
    found = opening(response, 2)
    assert found == begun
    assert not response or len(found) < len(response)


@pytest.mark.parametrize(
    ("name", "pushed", "begun"),
    [
        ("steered_continues_steered", True, "Knead it. Dust it."),
        ("steered_continues", True, "Fold it. Tuck it."),
        ("unsteered_continues", False, "Knead it. Dust it."),
        ("unsteered_continues_unsteered", False, "Fold it. Tuck it."),
    ],
)
def test_push_and_text_are_chosen_apart_on_the_same_cells(name: str, pushed: bool, begun: str):
    said = {"steered": "Knead it. Dust it. Shape it.", "unsteered": "Fold it. Tuck it. Stack it."}
    plan = CONDITIONS[name].plan(setting(response=lambda arm, condition, cell: made(response=said[condition])))
    assert list(plan.cells) == CELLS
    assert {*plan.prefixes.values()} == {begun}
    assert bool(adds(plan, CELLS[0])) == pushed


REPLY = "Fold the sheet in half. Tuck the corners under it. Stack it with the others of its size."


def test_a_correction_and_the_text_matched_to_it_have_as_many_words_of_the_same_reply():
    cue = "Wait, that is not right."
    correction, text = matched(REPLY, cue)
    assert correction == f"{cue} Fold the sheet in half."
    assert text == "Fold the sheet in half. Tuck the corners under it."
    assert len(correction.split()) == len(text.split())
    assert attempts(correction) == [(0, len(correction))], "the given cue is no restart of the arm's"


@pytest.mark.parametrize("reply", ["", "Fold", "Fold it.", "  Fold it twice. "])
def test_a_short_reply_is_never_given_whole_and_a_correction_always_begins_with_the_cue(reply: str):
    correction, text = matched(reply, "Wait, that is not right.")
    assert correction.startswith("Wait, that is not right.")
    assert len(text) < len(reply.strip()) or len(reply.split()) < 2


def test_corrections_begin_with_the_recipes_cues_and_both_conditions_steer():
    cues = ["Wait, that is not right.", "Let me start over."]
    given = setting(response=lambda *_: made(response=REPLY), cues=lambda: cues)
    corrected, on_topic = (CONDITIONS[f"steered_continues_{each}"].plan(given) for each in ("correction", "matched"))
    begun = {next(cue for cue in cues if text.startswith(cue)) for text in corrected.prefixes.values()}
    assert begun == {*cues}
    for cell in CELLS:
        assert len(corrected.prefixes[cell.key].split()) == len(on_topic.prefixes[cell.key].split())
        assert adds(corrected, cell)
        assert adds(on_topic, cell)
    with pytest.raises(InputError, match="without a subject's name"):
        CONDITIONS["steered_continues_correction"].plan(replace(given, cues=tuple))


@dataclass
class Said:
    """A response with the attempts that a judge found in it."""

    response: str
    starts: tuple[int, ...]

    def trial(self) -> Trial:
        ends = (*self.starts[1:], len(self.response))
        attempts = [{"start": a, "end": b, "score": 1} for a, b in zip(self.starts, ends, strict=False)]
        return made(response=self.response, attempts=attempts)


DETOUR = "Knead the dough. Wait, that's not right. You asked about sheets. Fold it. Tuck it."


@pytest.mark.parametrize(
    ("said", "begun"),
    [
        (Said(DETOUR, (0, 17)), "Knead the dough. Wait, that's not right. You asked about sheets."),
        (Said(DETOUR, ()), "Knead the dough. Wait, that's not right. You asked about sheets."),
        (Said("Knead it. Fold the sheet. Tuck it.", (0, 10)), "Knead it. Fold the sheet."),
        (Said("Knead it. Fold the sheet.", (0,)), None),
        (Said("Knead it. Fold the sheet.", ()), None),
    ],
    ids=["cue", "unscored", "a restart only the judge sees", "none", "unscored without"],
)
def test_steering_goes_off_after_the_first_restarts_cue(said: Said, begun: str | None):
    assert through_restart(said.trial()) == begun
