"""What every metric counts, what it leaves out, and the shape of metrics.json."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from esr_train.errors import InputError
from esr_train.files import write_json
from eval.judging.judge import Attempt, Judgement
from eval.metrics import METRICS, Gap, attempts_histogram, esr_rate, improves, metric
from eval.store import Trial
from eval.summary import estimate, read_summary, summarise
from tests.trial_maker import made

RESPONSE = "Knead the dough. Wait, that's wrong. Fold the sheet in half."


def trial(*scores: float | None, **changes: Any) -> Trial:
    """A trial with one attempt a score; `latent`, `prompt` and `cell_seed` change the cell."""
    cell = {
        "prompt": changes.pop("prompt", "How do you fold a sheet?"),
        "topic": "linen",
        "latent": changes.pop("latent", 7),
        "label": "baking",
        "strength": changes.pop("strength", {"raw": 200.0, "norm": 0.6}),
        "seed": changes.pop("cell_seed", 0),
    }
    given = {
        "key": repr(sorted(cell.items(), key=str)),
        "cell": cell,
        "response": RESPONSE,
        "attempts": [{"start": 30 * i, "end": 30 * i + 30, "score": s} for i, s in enumerate(scores)],
        "cue": len(scores) > 1,
        "flags": {"degenerate": False, "hijacked": False, "silent_recovery": False},
    }
    return made(**given | changes)


U, N = Gap.UNSCORED, Gap.UNDEFINED


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (
            (30,),
            {
                "multi_attempt_rate": 0,
                "esr_rate": 0,
                "worsening_rate": 0,
                "success_rate": N,
                "improvement": N,
            },
        ),
        (
            (10, 90),
            {"multi_attempt_rate": 1, "esr_rate": 1, "esr10_rate": 1, "success_rate": 1, "improvement": 80},
        ),
        ((10, 19), {"esr_rate": 1, "esr10_rate": 0, "worsening_rate": 0}),
        ((10, 20), {"esr_rate": 1, "esr10_rate": 1}),
        ((50, 50), {"multi_attempt_rate": 1, "esr_rate": 0, "worsening_rate": 0, "success_rate": 0}),
        ((90, 10), {"esr_rate": 0, "worsening_rate": 1, "success_rate": 0, "improvement": -80}),
        ((10, 5, 95), {"esr_rate": 1, "first_score": 10, "last_score": 95, "parroting_rate": 1}),
        ((10, 10), {"parroting_rate": 1}),
        ((10, 11), {"parroting_rate": 0}),
        ((60, 55), {"parroting_rate": 0, "worsening_rate": 1}),
        ((30,), {"parroting_rate": 0, "first_score": 30, "last_score": 30, "restart_position": N}),
        ((10, 90), {"restart_position": 30 / len(RESPONSE) * 20, "restart_rate": 1}),
        ((None, 90), {"multi_attempt_rate": 1, "esr_rate": U, "first_score": U, "last_score": 90}),
        ((10, None), {"multi_attempt_rate": 1, "improvement": U, "success_rate": U, "parroting_rate": U}),
    ],
)
def test_each_metric_counts_what_it_says(scores: tuple[float | None, ...], expected: dict[str, Any]) -> None:
    row = trial(*scores)
    assert {name: METRICS[name].of(row) for name in expected} == expected


SHOWN = {"restart_token": 8}
OF_ALL, OF_SHOWN, BEFORE = "esr_after_shown_detour_of_all", "esr_after_shown_detour", "restart_before_detour_rate"


@pytest.mark.parametrize(
    ("row", "shown", "recovered", "of_all", "before"),
    [
        (trial(30), 1, 0, 0, N),
        (trial(80), 0, N, 0, N),
        (trial(10, 90, **SHOWN), 1, 1, 1, 0),
        (trial(10, 10, **SHOWN), 1, 0, 0, 0),
        (trial(49, 90, **SHOWN), 1, 1, 1, 0),
        (trial(50, 90, **SHOWN), 0, N, 0, 1),
        (trial(10, 90, restart_token=7), 0, N, 0, 1),
        (trial(10, None, **SHOWN), 1, U, U, 0),
        (trial(None, 90, **SHOWN), U, U, U, U),
        (trial(error="no answer"), U, U, U, U),
    ],
)
def test_a_restart_recovers_only_from_a_detour_that_was_shown(
    row: Trial, shown: Any, recovered: Any, of_all: Any, before: Any
) -> None:
    found = [METRICS[name].of(row) for name in ("shown_detour_rate", OF_SHOWN, OF_ALL, BEFORE)]
    assert found == [shown, recovered, of_all, before]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (trial(49, 90), 1),
        (trial(49, 10), 1),
        (trial(49, None), 1),
        (trial(49), 0),
        (trial(50, 90), N),
        (trial(None, 90), U),
        (trial(error="no answer"), U),
    ],
)
def test_a_second_attempt_counts_behind_a_bad_first_one_alone(row: Trial, wanted: Any) -> None:
    assert METRICS["restart_after_bad_start_rate"].of(row) == wanted


def test_where_tokens_were_not_counted_or_were_given_words_of_the_first_attempt_stand_for_them() -> None:
    detour = "Knead the dough and let it rise overnight."
    text = f"{detour} Wait. Fold it."
    ranges = [{"start": 0, "end": len(detour), "score": 5.0}, {"start": len(detour), "end": len(text), "score": 90.0}]
    given = {"response": text, "attempts": ranges}
    assert METRICS[OF_SHOWN].of(trial(**given, tokens=None)) == 1
    assert METRICS[OF_SHOWN].of(trial(**given, prefix=len(detour), tokens=4, restart_token=0)) == 1
    short = {"response": text[6:], "attempts": [{**ranges[0], "end": 10}, {**ranges[1], "start": 10}]}
    assert METRICS[OF_SHOWN].of(trial(**short, tokens=None)) is N


def test_the_parts_of_a_metric_leave_the_number_of_tests_as_it_is() -> None:
    rows = {arm: [trial(30, latent=i, arm=arm) for i in range(4)] for arm in ("base", "tuned")}
    found = summarise(rows, bootstrap=20)
    assert OF_SHOWN in found.paired["tuned-base"]["steered"]
    assert OF_SHOWN not in found.sign_flip["tuned-base"]["steered"]
    assert found.tests == sum(1 for name in found.sign_flip["tuned-base"]["steered"] if METRICS[name].tested)


def test_rates_without_degenerate_responses_stand_beside_all() -> None:
    salad = {"degenerate": True}
    rows = [trial(10, 90, latent=i) for i in range(6)] + [trial(0, latent=i, flags=salad) for i in range(6, 12)]
    found = summarise({"base": rows, "unlooked": [trial(30, flags={})]}, bootstrap=20)
    assert found.arms["base"]["steered"]["esr_rate"].value == 0.5
    assert found.not_degenerate["base"]["steered"]["esr_rate"].value == 1
    assert found.not_degenerate["unlooked"] == {}


def test_flags_are_read_and_an_absent_finding_is_undefined_not_no() -> None:
    flagged = trial(30, flags={"degenerate": True, "hijacked": True, "silent_recovery": True})
    bare = trial(30, flags={})
    for name in ("degenerate_rate", "hijack_rate", "silent_recovery_rate"):
        assert METRICS[name].of(flagged) == 1
        assert METRICS[name].of(trial(30)) == 0
        assert METRICS[name].of(bare) is Gap.UNDEFINED


def test_a_judge_failure_is_unscored_never_zero_and_the_cue_still_counts() -> None:
    failed = trial(error="the judge timed out", cue=True, flags={})
    rows = [failed, *(trial(10, 90, latent=i) for i in range(3))]
    for name in set(METRICS) - {"restart_logprob", "alarm_rate"}:
        found = estimate(rows, name)
        expected = (4, 0) if name == "restart_rate" else (3, 1)
        assert (found.n, found.unscored) == expected, name
    assert estimate(rows, "esr_rate").value == 1
    assert estimate(rows, "restart_rate").value == 1


def test_success_has_the_multi_attempt_responses_as_its_denominator() -> None:
    rows = [trial(30, latent=i) for i in range(8)] + [trial(10, 90), trial(90, 10)]
    found = estimate(rows, "success_rate")
    assert (found.value, found.n) == (0.5, 2)


def test_the_histogram_counts_scored_responses_by_attempts() -> None:
    rows = [trial(1), trial(2), trial(1, 2, 3), trial(error="no answer")]
    assert attempts_histogram(rows) == {"1": 2, "3": 1}


def test_metrics_json_has_the_documented_shape() -> None:
    rows = {
        "base": [trial(30, latent=i, arm="base") for i in range(10)],
        "tuned": [trial(10, 90, latent=i, arm="tuned") for i in range(10)],
    }
    rows["tuned"] += [trial(99, latent=None, strength=None, condition="unsteered", arm="tuned")]
    metrics = summarise(rows, bootstrap=200).to_json()
    beside = ["within", "two_way", "sign_flip", "tests", "attempts", "not_degenerate", "resistance", "retention"]
    assert list(metrics) == ["schema", "arms", "paired", *beside, "tasks", "efficacy", "goals"]
    assert metrics["schema"] == 1
    assert {arm: set(found) for arm, found in metrics["arms"].items()} == {
        "base": {"steered"},
        "tuned": {"steered", "unsteered"},
    }
    assert {pair: set(found) for pair, found in metrics["paired"].items()} == {"tuned-base": {"steered"}}
    names = {
        "multi_attempt_rate", "esr_rate", "esr10_rate", "worsening_rate", "restart_rate", "first_score",
        "last_score", "improvement", "silent_recovery_rate", "degenerate_rate", "parroting_rate",
        "hijack_rate", "esr_after_shown_detour", "shown_detour_rate",
    }  # fmt: skip
    for found in (metrics["arms"]["base"]["steered"], metrics["paired"]["tuned-base"]["steered"]):
        assert names <= set(found)
        assert all(set(value) == {"value", "low", "high", "n", "unscored"} for value in found.values())
    undefined = {"value": None, "low": None, "high": None, "n": 0, "unscored": 0}
    assert metrics["arms"]["base"]["steered"]["improvement"] == undefined
    assert metrics["paired"]["tuned-base"]["steered"]["last_score"]["value"] == 60
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_arms_pair_only_on_the_cells_they_share() -> None:
    base = [trial(30, latent=i) for i in range(10)]
    other = [
        trial(100, latent=0),
        trial(100, latent=99),
        trial(100, latent=1, strength={"raw": 300.0, "norm": 0.9}),
        trial(100, latent=2, cell_seed=5),
        trial(100, latent=3, prompt="How do you sail?"),
        trial(100, latent=4, condition="boost_x1.5"),
        trial(100, latent=5, seed=1),
        trial(error="no answer", latent=6),
    ]
    found = summarise({"base": base, "tuned": other}).to_json()["paired"]["tuned-base"]
    assert set(found) == {"steered"}
    assert found["steered"]["last_score"] == {"value": 70.0, "low": None, "high": None, "n": 1, "unscored": 1}


def test_recalibrated_trials_pair_with_the_base_s_at_its_own_thresholds() -> None:
    base = [trial(30, latent=i) for i in range(10)]
    stronger = {"raw": 300.0, "norm": 0.9}
    tuned = [trial(50 + i, latent=i, condition="steered_recalibrated", strength=stronger) for i in range(4)]
    found = summarise({"base": base, "tuned": tuned}).to_json()
    assert found["paired"]["tuned-base"]["steered_recalibrated"]["last_score"]["value"] == 21.5
    assert found["paired"]["tuned-base"]["steered_recalibrated"]["last_score"]["n"] == 4


def test_an_arm_s_other_conditions_are_set_against_its_steered_trials() -> None:
    rows = [trial(30, latent=i) for i in range(10)]
    rows += [trial(70, latent=i, condition="switched_off") for i in range(10)]
    rows += [trial(90, latent=100 + i, condition="random_latents") for i in range(10)]
    found = summarise({"base": rows}).to_json()["within"]["base"]
    assert set(found) == {"switched_off-steered"}
    assert found["switched_off-steered"]["last_score"]["value"] == 40


def test_paired_differences_come_with_a_test_that_flips_latents_and_its_adjustment() -> None:
    base = [trial(30, latent=i // 4, cell_seed=i) for i in range(40)]
    tuned = [trial(90, latent=i // 4, cell_seed=i) for i in range(40)]
    metrics = summarise({"base": base, "tuned": tuned}, bootstrap=100).to_json()
    flips = metrics["sign_flip"]["tuned-base"]["steered"]
    assert flips["last_score"]["p"] == pytest.approx(2 / 2**10)
    assert flips["multi_attempt_rate"]["p"] == 1
    assert "improvement" not in flips
    assert metrics["tests"] == len(flips)
    assert flips["last_score"]["holm"] == pytest.approx(2 / 2**10 * metrics["tests"])


def test_intervals_that_resample_prompts_too_stand_beside_the_clustered_ones() -> None:
    rows = [trial(10 * (i % 5), latent=i // 5, prompt=f"prompt {i % 5}") for i in range(50)]
    metrics = summarise({"base": rows}, bootstrap=200).to_json()
    one, two = metrics["arms"]["base"]["steered"]["last_score"], metrics["two_way"]["arms"]["base"]["steered"]
    assert two["last_score"]["high"] - two["last_score"]["low"] > 5 * (one["high"] - one["low"])
    assert two["improvement"] == {"low": None, "high": None}


def test_restart_positions_and_log_probabilities_are_read_from_the_row() -> None:
    counted = trial(10, 90, restart_token=7, restart_logprobs=[[16, -2.0], [40, -4.0]])
    assert METRICS["restart_position"].of(counted) == 7
    assert METRICS["restart_logprob"].of(counted) == -3
    assert METRICS["restart_logprob"].of(trial(10, 90)) is Gap.UNDEFINED


def test_without_a_base_arm_nothing_is_paired() -> None:
    assert summarise({"tuned": [trial(30)]}).to_json()["paired"] == {}


def test_the_order_of_the_trial_file_changes_no_number() -> None:
    rng = random.Random(0)
    base = [trial(rng.uniform(0, 60), latent=i % 12, cell_seed=i) for i in range(60)]
    tuned = [trial(rng.uniform(0, 60), rng.uniform(0, 100), latent=i % 12, cell_seed=i) for i in range(60)]
    shuffled = rng.sample(base, len(base)), rng.sample(tuned, len(tuned))
    once = summarise({"base": base, "tuned": tuned}, bootstrap=100).to_json()
    again = summarise(dict(zip(("base", "tuned"), shuffled, strict=True)), bootstrap=100)
    assert json.dumps(once) == json.dumps(again.to_json())


def test_a_metric_registered_from_outside_is_in_metrics_json_and_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.metrics.METRICS", dict(METRICS))
    before = list(METRICS)

    @metric("esr_shown_rate", "ESR, shown", headline=True)
    def esr_shown_rate(trial: Trial) -> float | Gap:
        """ESR where the first attempt has at least eight tokens and is off-topic."""
        value, first = improves(trial), METRICS["first_score"].of(trial)
        if isinstance(value, Gap) or isinstance(first, Gap):
            return Gap.UNSCORED
        return float(value and (trial.restart_token or 0) >= 8 and first < 50)

    from eval import metrics

    assert list(metrics.METRICS) == [*before, "esr_shown_rate"]
    assert metrics.headline()[-1] == "esr_shown_rate"
    shown = metrics.METRICS["esr_shown_rate"].values(
        [trial(10, 90, restart_token=8), trial(10, 90, restart_token=7), trial(60, 90, restart_token=9), trial(10)]
    )
    assert shown == [1, 0, 0, 0]


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="there is a metric 'esr_rate' already"):
        metric("esr_rate", "ESR")(improves)


@pytest.mark.parametrize("where", ["headline", "live"])
def test_esr_never_stands_alone(where: str) -> None:
    together = {name for name, found in METRICS.items() if getattr(found, where)}
    assert {"esr_rate", "worsening_rate", "first_score", "last_score"} <= together


def test_esr_over_judgements_leaves_out_what_the_judge_failed_on() -> None:
    failed = Judgement((), "j", error="no answer")
    better, worse, one = (
        Judgement(tuple(Attempt(i, i + 1, score) for i, score in enumerate(scores)), "j")
        for scores in ((10.0, 90.0), (90.0, 10.0), (50.0,))
    )
    assert esr_rate([better, worse, one, one, failed]) == 0.25
    assert type(esr_rate([better])) is float
    with pytest.raises(ValueError, match="no scored response"):
        esr_rate([failed])


def test_metrics_json_is_read_back_as_it_was_and_refused_by_its_key(tmp_path: Path) -> None:
    found = summarise({"base": [trial(30)], "tuned": [trial(10, 90)]}, bootstrap=20)
    path = tmp_path / "metrics.json"
    write_json(path, found.to_json())
    assert read_summary(path) == found
    value = found.to_json()
    value["arms"]["base"]["steered"]["esr_rate"]["low"] = "0"
    write_json(path, value)
    with pytest.raises(InputError, match=r"metrics\.json.*arms\.base\.steered\.esr_rate\.low is not a finite number"):
        read_summary(path)
