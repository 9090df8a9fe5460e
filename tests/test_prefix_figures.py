"""Does an arm feel the push or read the text, and does a correction hold: what the figures say about planted rates."""

import pytest

from eval.beginnings import SQUARE, Noticed
from eval.conditions import CORRECTION, MATCHED
from eval.report.figures import Material
from eval.report.prefix_figures import feel_or_read, sustained_resistance
from eval.store import Trial
from eval.summary import summarise
from tests.trial_maker import made

CELLS = [(latent, seed) for latent in range(12) for seed in range(8)]


def trial(arm: str, condition: str, latent: int, seed: int, restarts: bool = False, score: float = 50.0) -> Trial:
    cell = {"prompt": f"How do I do task {seed}?", "topic": "t", "latent": latent, "label": None, "seed": seed}
    return made(
        key=f"{arm}/{condition}/{latent}/{seed}",
        arm=arm,
        condition=condition,
        cell=cell | {"strength": {"raw": 1.0, "norm": 1.0}},
        cue=restarts,
        attempts=[{"start": 0, "end": 8, "score": score}],
    )


def square(arm: str, *rates: float) -> list[Trial]:
    """Trials that restart at these rates: push and off-topic text, the push alone, the text alone, neither."""
    return [
        trial(arm, condition, latent, seed, restarts=seed < round(8 * rate))
        for condition, rate in zip(SQUARE, rates, strict=True)
        for latent, seed in CELLS
    ]


def material(rows: dict[str, list[Trial]], **given) -> Material:
    return Material(summarise(rows, 200), rows, **given)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ((0.75, 0.75, 0.0, 0.0), "By these rates tuned feels the push, and that it reads the text alone does not show"),
        ((0.75, 0.0, 0.75, 0.0), "By these rates tuned reads the text, and that it feels the push alone does not show"),
        ((1.0, 0.5, 0.5, 0.0), "By these rates tuned feels the push and reads the text"),
        ((0.75, 0.0, 0.0, 0.0), "By these rates tuned restarts where push and off-topic text meet"),
        ((0.0, 0.0, 0.0, 0.0), "By these rates of tuned the numbers do not decide it"),
        ((0.5, 0.5, 0.5, 0.5), "By these rates of tuned the numbers do not decide it"),
    ],
)
def test_the_sentence_under_the_figure_says_what_the_planted_rates_are(rates: tuple[float, ...], said: str) -> None:
    drawn = feel_or_read(material({"tuned": square("tuned", *rates)}))
    assert drawn is not None
    assert drawn.caption.startswith(said)
    shares = {row[1]: row[3] for row in drawn.table[1:]}
    assert shares == pytest.approx(dict(zip(SQUARE, rates, strict=True)))


def test_the_push_alone_is_measured_on_on_topic_text_and_text_alone_without_a_push() -> None:
    drawn = feel_or_read(material({"tuned": square("tuned", 1.0, 0.5, 0.25, 0.0)}))
    assert drawn is not None
    assert "the push alone adds +50 (" in drawn.caption
    assert "off-topic text alone +25 (" in drawn.caption
    assert "both +100 (" in drawn.caption


def test_an_arm_without_all_four_conditions_is_left_out_and_without_any_there_is_no_figure() -> None:
    rows = {"base": square("base", 0, 0, 0, 0), "merged": [trial("merged", "steered", 1, 1)]}
    drawn = feel_or_read(material(rows))
    assert drawn is not None
    assert {row[2] for row in drawn.table[1:]} == {"base"}
    assert feel_or_read(material({"merged": rows["merged"]})) is None


def test_what_detectors_read_stands_under_the_rates_where_a_search_found_some() -> None:
    rows = {"tuned": square("tuned", 0.5, 0.5, 0.0, 0.0)}
    noticed = [
        Noticed(
            each.key,
            each.condition,
            each.cell.latent,
            {"off_topic": 3.0 if "text off" in SQUARE[each.condition] else 1.0},
        )
        for each in rows["tuned"]
    ]
    drawn = feel_or_read(material(rows, noticed={"tuned": noticed}))
    assert drawn is not None
    sums = {row[1]: row[3] for row in drawn.table[1:] if row[0] == "off_topic"}
    assert sums.keys() == SQUARE.keys()
    assert b"sum of off-topic detectors" in drawn.svg()
    assert b"sum of steering detectors" not in drawn.svg()
    without = feel_or_read(material(rows))
    assert without is not None
    assert "detectors" not in without.caption


def test_a_correction_is_held_against_its_matched_text_cell_by_cell() -> None:
    rows = [trial("tuned", CORRECTION, latent, seed, score=60.0 + seed) for latent, seed in CELLS]
    rows += [trial("tuned", MATCHED, latent, seed, score=50.0 + seed) for latent, seed in CELLS[4:]]
    drawn = sustained_resistance(material({"tuned": rows}))
    by_name = {row[1]: row[2:] for row in drawn.table[1:]}
    value, low, high, n, _ = by_name["difference"]
    assert (value, low, high, n) == (10, 10, 10, len(CELLS) - 4), "without noise cells differ by the same"
    assert drawn.caption.startswith("Behind a correction last scores differ by tuned +10 (+10 to +10) points.")
    assert len(sustained_resistance(material({"tuned": rows[: len(CELLS)]})).table) == 1
