"""What an attack proves: whether it moves the base model, how often it succeeds, and what resisting it costs."""

import csv
from pathlib import Path

import pytest

from eval.report.attack_figures import attacks
from eval.report.figures import Material, draw_figures
from eval.report.page import write_report
from eval.report.story import tables, verdict
from eval.store import Trial
from eval.summary import Summary, read_summary, summarise
from tests.trial_maker import made

LATENTS = range(6)


def trial(arm: str, condition: str, latent: int, score: float, prompt: str = "", norm: float = 0.5) -> Trial:
    steered = condition != "unsteered"
    cell = {
        "prompt": prompt or f"How do I fold sheet {latent}?",
        "topic": "linen",
        "latent": latent if steered else None,
        "label": "baking" if steered else None,
        "strength": {"raw": 400 * norm, "norm": norm} if steered else None,
        "seed": latent,
    }
    return made(
        key=f"{arm}/{condition}/{latent}",
        arm=arm,
        condition=condition,
        cell=cell,
        attempts=[{"start": 0, "end": 8, "score": score}],
        flags={"hijacked": score < 20},
    )


def arms() -> dict[str, list[Trial]]:
    """Base is moved by every attack but random directions; tuned only by the adaptive one."""
    scores = {
        "base": {"unsteered": 95, "steered": 30, "boost_x1.5": 10, "adaptive": 5, "random_direction": 95},
        "tuned": {"unsteered": 95, "steered": 90, "boost_x1.5": 80, "adaptive": 25, "random_direction": 95},
    }
    norms = {"boost_x1.5": 0.75}
    return {
        arm: [
            trial(arm, condition, latent, score + latent % 3, norm=norms.get(condition, 0.5))
            for condition, score in found.items()
            for latent in LATENTS
        ]
        for arm, found in scores.items()
    }


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(arms(), 200)


def test_an_attack_is_measured_against_the_same_prompts_and_seeds_unsteered(summary: Summary) -> None:
    assert {*summary.efficacy} == {"steered", "boost_x1.5", "adaptive", "random_direction"}
    assert summary.efficacy["steered"].value == pytest.approx(-65)
    assert summary.efficacy["steered"].n == len(LATENTS)


def test_an_attack_that_does_not_move_the_base_model_proves_nothing(summary: Summary) -> None:
    assert summary.proves_nothing("random_direction")
    assert not any(map(summary.proves_nothing, ("steered", "boost_x1.5", "adaptive")))
    assert verdict(summary, "random_direction").startswith("proves nothing")
    assert "moves base's last score by −65" in verdict(summary, "steered")


def test_what_was_never_measured_unsteered_is_not_known_to_prove_nothing() -> None:
    rows = {arm: [row for row in own if row.condition != "unsteered"] for arm, own in arms().items()}
    found = summarise(rows, 50)
    assert found.efficacy == {}
    assert not found.proves_nothing("random_direction")
    assert verdict(found, "random_direction") == "whether it moves base is not known"


def test_a_prompt_of_another_seed_is_no_partner() -> None:
    rows = {"base": [trial("base", "unsteered", 0, 90, "Why?"), trial("base", "steered", 1, 30, "Why?")]}
    assert summarise(rows, 50).efficacy == {}


def test_attacks_stand_in_order_each_with_every_arm_and_its_difference(summary: Summary) -> None:
    found = attacks(summary)
    assert [(each.name, each.arm) for each in found][:3] == [
        ("steered", "base"),
        ("steered", "tuned"),
        ("random_direction", "base"),
    ]
    adaptive = next(each for each in found if (each.name, each.arm) == ("adaptive", "tuned"))
    assert adaptive.own["derailed_rate"].value == 1
    assert adaptive.paired["hijack_rate"].value == -1
    steered = next(each for each in found if (each.name, each.arm) == ("steered", "tuned"))
    assert steered.paired["derailed_rate"].value == -1


def test_steering_at_the_threshold_alone_is_no_suite_of_attacks() -> None:
    rows = {arm: [row for row in own if row.condition in ("steered", "unsteered")] for arm, own in arms().items()}
    assert attacks(summarise(rows, 50)) == []


def test_the_page_and_the_terminal_say_which_attacks_prove_nothing(summary: Summary, tmp_path: Path) -> None:
    page = write_report(tmp_path, "Attacks", Material(summary, arms()), {}).read_text(encoding="utf-8")
    table = page[page.index('id="attacks"') :]
    assert "Steered along random directions of equal norm: proves nothing" in table
    assert any("proves nothing" in line and "random_direction" in line for line in tables(summary))
    with (tmp_path / "tables" / "attacks.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    moved = next(line for line in lines if line["attack"] == "steered" and line["of"] == "minus unsteered")
    assert float(moved["value"]) == pytest.approx(-65)
    assert read_summary_again(summary, tmp_path) == summary


def read_summary_again(summary: Summary, folder: Path) -> Summary:
    from esr_train.files import write_json

    write_json(folder / "metrics.json", summary.to_json())
    return read_summary(folder / "metrics.json")


def figures(rows: dict[str, list[Trial]], **given) -> dict[str, list[tuple]]:
    drawn = draw_figures(Material(summarise(rows, 50), rows, **given))
    return {each.name: each.table for each in drawn}


def test_attacks_have_figures_of_levels_and_differences(summary: Summary) -> None:
    table = figures(arms())["attack_success"]
    levels = {row[1:4] for row in table[1:] if row[0] == "% last score below 50"}
    assert ("adaptive", "tuned", 1) in levels
    assert ("boost_x1.5", "tuned", 0) in levels
    assert {row[2] for row in table[1:] if "minus base" in row[0]} == {"tuned"}
    assert "attack_hijack" in figures(arms())


def many(cosines: int = 12) -> dict[str, list[Trial]]:
    """Strong pushes and directions unlike those of training both derail the tuned arm."""
    rows: dict[str, list[Trial]] = {"base": [], "tuned": []}
    for arm, own in rows.items():
        for latent in range(cosines):
            for number in range(4):
                for condition, norm in (("steered", 0.5), ("boost_x1.5", 0.75)):
                    resists = arm == "tuned" and norm < 0.6 and latent >= cosines / 2
                    prompt = f"How do I fold sheet {number}?"
                    own.append(trial(arm, condition, latent, 90 if resists else 10, prompt, norm))
    return rows


def test_resistance_is_drawn_against_the_strength_and_the_likeness_to_training() -> None:
    nearest = {latent: latent / 12 for latent in range(12)}
    found = figures(many(), nearest=nearest)
    cosine = [row[3] for row in found["resistance_cosine"] if row[0] == "tuned" and row[2] == "last_score"]
    assert (cosine[0], cosine[-1]) == (pytest.approx(10), pytest.approx(90))
    norm = {row[1]: row[3] for row in found["resistance_norm"] if row[0] == "tuned" and row[2] == "last_score"}
    assert norm == {0.5: pytest.approx(50), 0.75: pytest.approx(10)}


def test_likeness_to_training_has_no_figure_where_nothing_was_trained() -> None:
    assert "resistance_cosine" not in figures(many())


def test_an_arm_that_obeys_and_resists_is_one_point_with_both_scores() -> None:
    rows = {
        arm: [trial(arm, name, latent, score) for name, score in scores.items() for latent in LATENTS]
        for arm, scores in {
            "base": {"steered": 30, "welcomed": 95},
            "half": {"steered": 60, "welcomed": 80},
            "tuned": {"steered": 90, "welcomed": 70},
        }.items()
    }
    table = figures(rows, scales={"tuned": {"base": 0.0, "tuned": 1.0, "half": 0.5}})["trade_off"]
    assert [(row[0], row[1], row[3]) for row in table[1:] if row[2] == "last_score"] == [
        ("base", "steered", 30), ("base", "welcomed", 95), ("half", "steered", 60),
        ("half", "welcomed", 80), ("tuned", "steered", 90), ("tuned", "welcomed", 70),
    ]  # fmt: skip
    assert {row[0] for row in table[1:] if row[2] == "multi_attempt_rate"} == {"base", "half", "tuned"}
    assert "trade_off" not in figures(arms())
