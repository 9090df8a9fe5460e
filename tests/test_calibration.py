import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from esr_train.errors import InputError, RunError
from esr_train.recipe import CalibrationSection
from esr_train.steering.directions import Add, Positions
from esr_train.steering.engine import Completion, Progress, Request, Sampling
from esr_train.transcript import SaeRef, Strength
from eval.arms import Arm
from eval.calibration import (
    CalibrationPrompts,
    Threshold,
    calibrate,
    calibration_key,
    load_thresholds,
    response_count,
    save_thresholds,
    score_store,
    updated,
)
from eval.cells import Prompt
from eval.judging.judge import Attempt, JudgeItem, Judgement

SECTION = CalibrationSection(target=30, rounds=10, prompts=4, bounds=(0.1, 2.0), verify=4)
PROMPTS = [Prompt(f"Question {number}?", f"topic{number % 5}") for number in range(20)]
HELD_OUT = [Prompt(f"Other question {number}?", f"topic{number % 5}") for number in range(10)]
SAMPLING = Sampling(max_new_tokens=512)
SAE = SaeRef("sae", "0")


@dataclass(frozen=True)
class FakeDirection:
    """A latent whose responses score a logistic curve that crosses 30 at `threshold`."""

    latent: int
    threshold: float
    label: str | None = None
    source: SaeRef = SAE
    slope: float = 0.08

    def strength(self, norm: float) -> Strength:
        return Strength(raw=100 * norm, norm=norm)

    def add(self, norm: float, positions: Positions = "all") -> Add:
        return Add(0, torch.tensor([self.threshold, self.slope, norm], dtype=torch.float64), positions)


@dataclass
class FakeEngine:
    """Writes a score: the curve's value, drawn as responses are: mostly on topic or off, seldom between."""

    name: str = "fake"
    steered: int = 9
    dies_at: int | None = None
    calls: list[list[Request]] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        self.calls.append(list(requests))
        self.samplings.append(sampling)
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        if progress:
            progress(len(requests), len(requests))
        return [Completion(each.id, self._text(each), (1,), "stop", 1, self.steered) for each in requests]

    def _text(self, request: Request) -> str:
        threshold, slope, norm = request.interventions[0].vector.tolist()  # type: ignore[union-attr]
        mean = 1 / (1 + math.exp((norm - threshold) / slope + math.log(0.7 / 0.3)))
        rng = Random(request.seed)
        return str(100 * rng.betavariate(2 * mean + 1e-9, 2 * (1 - mean) + 1e-9))


class FakeJudge:
    name = "fake"

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        return [Judgement((Attempt(0, 1, float(item.response)), Attempt(1, 2, 100.0)), self.name) for item in items]


def latents(count: int = 60) -> list[FakeDirection]:
    rng = Random(0)
    return [FakeDirection(number, rng.uniform(0.4, 1.3), f"topic{number % 5}") for number in range(count)]


def measured(engine: FakeEngine, directions: Sequence[FakeDirection], **given) -> list[Threshold]:
    section = given.pop("section", SECTION)
    arm = Arm(engine, given.pop("judge", FakeJudge()), SAMPLING)  # type: ignore[arg-type]
    prompts = CalibrationPrompts(given.pop("prompts", PROMPTS), HELD_OUT)
    return calibrate(arm, directions, prompts, section, **given)  # type: ignore[arg-type]


def test_thresholds_are_found_under_noise():
    found = measured(FakeEngine(), latents())
    errors = [abs(each.norm - latent.threshold) for each, latent in zip(found, latents(), strict=True)]
    assert np.median(errors) < 0.035
    bias = np.mean([each.norm - latent.threshold for each, latent in zip(found, latents(), strict=True)])
    assert abs(bias) < 0.02


def test_the_posterior_interval_holds_most_thresholds():
    found = measured(FakeEngine(), latents())
    inside = [each.low <= latent.threshold <= each.high for each, latent in zip(found, latents(), strict=True)]
    assert np.mean(inside) >= 0.9
    assert np.median([each.high - each.low for each in found]) < 0.5


def test_latents_that_are_alike_need_few_responses_together():
    alike = [FakeDirection(number, 0.5 + 0.02 * (number % 5), None, slope=0.08) for number in range(64)]
    section = SECTION.model_copy(update={"rounds": 4, "prompts": 2, "verify": 0})
    alone = [
        each for start in range(0, 64, 4) for each in measured(FakeEngine(), alike[start : start + 4], section=section)
    ]
    together = measured(FakeEngine(), alike, section=section)
    apart, pooled = (
        np.mean([abs(each.norm - latent.threshold) for each, latent in zip(found, alike, strict=True)])
        for found in (alone, together)
    )
    assert pooled < 0.6 * apart
    assert (
        np.mean([each.low <= latent.threshold <= each.high for each, latent in zip(together, alike, strict=True)]) > 0.9
    )


def test_one_latent_unlike_the_others_is_still_found():
    odd = [FakeDirection(number, 1.6 if number == 7 else 0.5, None, slope=0.05) for number in range(40)]
    found = measured(FakeEngine(), odd, section=SECTION.model_copy(update={"verify": 0}))
    assert abs(found[7].norm - 1.6) < 0.2
    assert max(abs(each.norm - 0.5) for each in found if each.latent != 7) < 0.15


def test_latents_whose_answers_say_much_stop_early_and_lie_within_the_width():
    """What that saves at equal error is measured by `benchmarks/calibration.py`."""
    mixed = [FakeDirection(n, 0.4 + 0.9 * n / 120, None, slope=0.02 if n % 2 else 0.15) for n in range(120)]
    section = SECTION.model_copy(update={"rounds": 15, "stop_width": 0.3, "verify": 0})
    found = measured(FakeEngine(), mixed, section=section)
    steep, flat = (np.mean([each.n for each in found[start::2]]) for start in (1, 0))
    assert steep < 0.8 * flat < 60
    stopped = [(each, latent) for each, latent in zip(found, mixed, strict=True) if each.n < 60]
    assert len(stopped) > 60
    assert all(each.high - each.low <= 0.3 * each.norm for each, _ in stopped)
    near = [each.low <= latent.threshold <= each.high for each, latent in stopped]
    assert np.mean(near) >= 0.85


def test_a_stopped_latent_is_asked_no_more_and_the_bar_still_fills():
    engine, told = FakeEngine(), []
    section = SECTION.model_copy(update={"stop_width": 0.3})
    found = measured(engine, latents(6), section=section, progress=lambda rows, _: told.append(rows))
    assert min(each.n for each in found) < 40
    assert sum(told) == response_count(6, section)
    asked = [{request.id.split(" / ")[1] for request in call} for call in engine.calls[:-1]]
    assert all(later <= earlier for earlier, later in pairwise(asked))


def test_all_latents_share_one_engine_call_a_round():
    engine = FakeEngine()
    measured(engine, latents(7))
    assert [len(call) for call in engine.calls] == [28] * 11
    assert sum(map(len, engine.calls)) == response_count(7, SECTION)
    assert {sampling.max_new_tokens for sampling in engine.samplings} == {SECTION.max_new_tokens}


def test_a_latent_is_not_asked_about_its_own_topic_and_seeds_differ():
    engine = FakeEngine()
    asked = latents(7)
    measured(engine, asked)
    requests = [request for call in engine.calls for request in call]
    topic = {prompt.text: prompt.topic for prompt in (*PROMPTS, *HELD_OUT)}
    own = {each.threshold: each.label for each in asked}
    assert all(topic[each.prompt] != own[float(each.interventions[0].vector[0])] for each in requests)  # type: ignore[union-attr]
    assert len({request.seed for request in requests}) == len(requests)


def test_thresholds_are_checked_on_prompts_that_calibration_did_not_ask():
    engine = FakeEngine()
    found = measured(engine, latents(30))
    asked = {request.prompt for call in engine.calls[:-1] for request in call}
    checked = {request.prompt for request in engine.calls[-1]}
    assert asked <= {prompt.text for prompt in PROMPTS}
    assert checked <= {prompt.text for prompt in HELD_OUT}
    assert all(each.verified_n == 4 for each in found)
    assert 20 < np.mean([each.verified for each in found]) < 40


def test_without_verification_nothing_is_asked_after_the_last_round():
    engine = FakeEngine()
    found = measured(engine, latents(2), section=SECTION.model_copy(update={"verify": 0}))
    assert len(engine.calls) == 10
    assert found[0].verified is None


def test_a_latent_that_hits_a_bound_is_flagged():
    strong, fits, weak = measured(FakeEngine(), [FakeDirection(0, -0.5), FakeDirection(1, 0.8), FakeDirection(2, 5.0)])
    assert (strong.bound, fits.bound, weak.bound) == ("low", None, "high")


def test_both_units_and_the_number_of_responses_are_kept():
    (found,) = measured(FakeEngine(), [FakeDirection(3, 0.8, "topic1")])
    assert (found.latent, found.label, found.n) == (3, "topic1", 40)
    assert found.raw == pytest.approx(100 * found.norm)
    assert found.low < found.norm < found.high


def test_a_response_that_was_not_steered_stops_the_calibration():
    with pytest.raises(RunError, match="was not steered"):
        measured(FakeEngine(steered=0), latents(2))


def test_unscored_responses_are_left_out():
    class Flaky(FakeJudge):
        def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
            whole = super().judge(items)
            return [replace(each, attempts=(), error="x") if n % 2 else each for n, each in enumerate(whole)]

    (found,) = measured(FakeEngine(), [FakeDirection(0, 0.8)], judge=Flaky())
    assert (found.n, found.verified_n) == (20, 2)


def test_a_killed_calibration_goes_on_where_it_stopped(tmp_path: Path):
    whole = measured(FakeEngine(), latents(5))
    path = tmp_path / "rounds.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measured(FakeEngine(dies_at=7), latents(5), store=score_store(path))
    again = FakeEngine()
    assert measured(again, latents(5), store=score_store(path)) == whole
    assert len(again.calls) == 5


def test_kept_rounds_of_other_settings_are_ignored(tmp_path: Path):
    path = tmp_path / "rounds.jsonl"
    measured(FakeEngine(), latents(2), store=score_store(path))
    other = SECTION.model_copy(update={"target": 50.0})
    assert measured(FakeEngine(), latents(2), store=score_store(path), section=other) == measured(
        FakeEngine(), latents(2), section=other
    )


def test_the_posterior_moves_by_the_paper_s_rule_with_five_responses():
    grid = np.array([0.5, 1.0, 1.5])
    flat = np.ones(3) / 3
    moved = updated(flat, grid, 0.75, [30.0] * 5, 30.0)
    from scipy.stats import beta

    above = beta(0.5 + 5 * 0.3, 0.5 + 5 * 0.7).sf(0.3)
    expected = np.array([1 - above, above, above])
    assert moved == pytest.approx(expected / expected.sum())


def test_more_responses_are_surer():
    grid, flat = np.array([0.5, 1.0]), np.ones(2) / 2
    few, many = (updated(flat, grid, 0.75, [60.0] * count, 30.0)[1] for count in (2, 20))
    assert 0.5 < few < many
    assert (updated(flat, grid, 0.75, [], 30.0) == flat).all()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_bounds_that_do_not_increase_are_refused(bounds: tuple[float, float]):
    with pytest.raises(InputError, match=r"calibration\.bounds"):
        measured(FakeEngine(), latents(1), section=SECTION.model_copy(update={"bounds": bounds}))


def test_a_latent_without_prompts_of_other_topics_is_refused():
    with pytest.raises(InputError, match="no prompt of another topic"):
        measured(FakeEngine(), latents(1), prompts=PROMPTS[:1])


KEY = calibration_key("tiny", SAE, "lexical", PROMPTS, SAMPLING, SECTION)


def test_frozen_thresholds_come_back(tmp_path: Path):
    found = measured(FakeEngine(), latents(3))
    save_thresholds(tmp_path / "thresholds.json", KEY, found)
    assert load_thresholds(tmp_path / "thresholds.json", KEY) == found


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model", calibration_key("big", SAE, "lexical", PROMPTS, SAMPLING, SECTION)),
        ("sae", calibration_key("tiny", SaeRef("sae", "1"), "lexical", PROMPTS, SAMPLING, SECTION)),
        ("judge", calibration_key("tiny", SAE, "model", PROMPTS, SAMPLING, SECTION)),
        ("prompts", calibration_key("tiny", SAE, "lexical", PROMPTS[1:], SAMPLING, SECTION)),
        ("sampler", calibration_key("tiny", SAE, "lexical", PROMPTS, Sampling(0.9), SECTION)),
    ],
)
def test_thresholds_of_another_setting_are_refused_by_name(tmp_path: Path, name: str, other: dict):
    save_thresholds(tmp_path / "thresholds.json", KEY, [])
    with pytest.raises(InputError, match=rf"thresholds\.json: the thresholds were frozen for another {name} \("):
        load_thresholds(tmp_path / "thresholds.json", other)


@pytest.mark.parametrize("value", [[], {}, {"key": {}, "thresholds": [{"latent": 1}]}])
def test_a_file_that_holds_no_thresholds_is_refused(tmp_path: Path, value: object):
    (tmp_path / "thresholds.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="not a file of thresholds"):
        load_thresholds(tmp_path / "thresholds.json", KEY)
