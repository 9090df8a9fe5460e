"""The report's figures: each as SVG, with the numbers it shows as CSV."""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esr_train.files import replacing
from eval.metrics import METRICS, Gap
from eval.report.drawing import FAINT, INK, arm_colours, draw_dots, line_height, line_styles, svg_of
from eval.report.likelihood import restart_likelihood
from eval.report.material import Figure, Material
from eval.report.sweep_figures import boost_deviations, boost_multiples, mixtures
from eval.report.variant_figures import ablations, judge_agreement, judge_rates, prompt_variants
from eval.store import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_figures(material: Material) -> list[Figure]:
    """Every figure for which there are data, in reading order."""
    drawn = (draw(material) for draw in FIGURES)
    return [figure for figure in drawn if figure is not None]


def save_figures(folder: Path, figures: Sequence[Figure]) -> None:
    """Write `<name>.svg` and `<name>.csv` for each."""
    for figure in figures:
        with replacing(folder / f"{figure.name}.svg") as file:
            file.write(figure.svg)
        with replacing(folder / f"{figure.name}.csv") as file:
            csv.writer(file, lineterminator="\n").writerows(figure.table)


WIDEST = 18.0
"""Points across that the scatter's largest dot may have."""
ASIDE = 2.5
"""Points of score by which arms stand beside each other in the scatter."""
RATE_ROWS = (
    ("steered", "multi_attempt_rate", "second attempt"),
    ("steered", "esr_rate", "…and better (ESR)"),
    ("steered", "worsening_rate", "…and worse"),
    ("steered", "silent_recovery_rate", "silent recovery"),
    ("steered", "hijack_rate", "hijacked at the end"),
    ("unsteered", "restart_rate", "restart, unsteered"),
)


def rates(material: Material) -> Figure | None:
    """Share of responses per arm, with intervals."""
    table: list[tuple[Any, ...]] = [("condition", "metric", "arm", "value", "low", "high", "n", "unscored")]
    for condition, metric, _ in RATE_ROWS:
        for arm, conditions in material.metrics["arms"].items():
            found = conditions.get(condition, {}).get(metric)
            if found and found["n"]:
                numbers = (found[key] for key in ("value", "low", "high", "n", "unscored"))
                table.append((condition, metric, arm, *numbers))
    if len(table) == 1:
        return None
    shown = [row for row in RATE_ROWS if any(line[:2] == row[:2] for line in table[1:])]
    arms = list(material.metrics["arms"])

    def draw(axes: "Axes") -> None:
        places = {row[:2]: line for line, row in enumerate(shown)}
        dots = [(places[row[:2]], row[2], *(100 * end for end in row[3:6])) for row in table[1:]]
        draw_dots(axes, dots, [row[2] for row in shown], arms)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("% of responses")

    caption = "Share of valid responses, 95 % intervals clustered by latent (unsteered: by prompt)."
    svg = svg_of(draw, arm_colours(arms), height=0.8 + line_height(arms) * len(shown))
    return Figure("rates", "Rates per arm", caption, svg, table)


def first_scores(material: Material) -> Figure | None:
    """Density of first-attempt scores under steering."""
    return _score_density(
        material,
        "first_score",
        "Scores of first attempts",
        "Density of first-attempt scores under steering (Gaussian kernel, 4 points, folded at the ends).",
    )


def last_scores(material: Material) -> Figure | None:
    """Density of last-attempt scores under steering."""
    return _score_density(
        material,
        "last_score",
        "Scores of last attempts",
        "The same for the last attempt; a response without a restart has only one, its first.",
    )


def _score_density(material: Material, metric: str, title: str, caption: str) -> Figure | None:
    scores = {arm: _values(material.steered(arm), metric) for arm in material.rows_by_arm}
    scores = {arm: found for arm, found in scores.items() if len(found) >= 2}
    if not scores:
        return None
    grid = np.linspace(0, 100, 101)
    curves = {arm: _density(np.array(found), grid) for arm, found in scores.items()}

    arms = list(material.rows_by_arm)
    colours, styles = arm_colours(arms), line_styles(arms)

    def draw(axes: "Axes") -> None:
        for arm, curve in curves.items():
            axes.fill_between(grid, 100 * curve, color=colours[arm], alpha=0.08, lw=0)
            axes.plot(grid, 100 * curve, color=colours[arm], lw=1.6, ls=styles[arm])
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("score, 0-100")
        axes.set_ylabel("% of responses per point")

    rows = zip(grid.tolist(), *(curve.tolist() for curve in curves.values()), strict=True)
    svg = svg_of(draw, {arm: colours[arm] for arm in curves})
    return Figure(f"{metric}s", title, caption, svg, [("score", *curves), *rows])


def first_against_last(material: Material) -> Figure | None:
    """First against last score of responses with several attempts."""
    scored = (
        (arm, METRICS["first_score"].of(row), METRICS["last_score"].of(row), row)
        for arm in material.rows_by_arm
        for row in material.steered(arm)
    )
    points = [
        (arm, first, last, row.key)
        for arm, first, last, row in scored
        if len(row.attempts) > 1 and not isinstance(first, Gap) and not isinstance(last, Gap)
    ]
    if not points:
        return None
    colours = arm_colours(list(material.rows_by_arm))
    drawn = list(dict.fromkeys(name for name, *_ in points))
    places = Counter((arm, first, last) for arm, first, last, _ in points)
    size = min(3.0, WIDEST / max(places.values()) ** 0.5)

    def draw(axes: "Axes") -> None:
        axes.plot([0, 100], [0, 100], color=FAINT, lw=1, zorder=0)
        for (arm, first, last), count in places.items():
            beside = ASIDE * (drawn.index(arm) - (len(drawn) - 1) / 2)
            axes.plot([first + beside], [last], "o", color=colours[arm], ms=size * count**0.5, alpha=0.55, mew=0)
        axes.set_xlim(-8, 108)
        axes.set_ylim(-8, 108)
        axes.set_xlabel("first attempt's score")
        axes.set_ylabel("last attempt's score")
        axes.grid()

    caption = (
        "Steered responses with several attempts; above the line the last is better than the first. A dot's area is "
        "in proportion to the responses at its place; arms stand a little beside each other."
    )
    svg = svg_of(draw, {arm: colours[arm] for arm in drawn}, height=3.4)
    return Figure("first_vs_last", "First against last score", caption, svg, [("arm", "first", "last", "key"), *points])


def restart_positions(material: Material) -> Figure | None:
    """Cumulative share of steered responses that have restarted, by token."""
    table: list[tuple[Any, ...]] = [("arm", "tokens", "share")]
    for arm in material.rows_by_arm:
        trials = material.steered(arm)
        scored = len(_values(trials, "multi_attempt_rate"))
        places = sorted(_values(trials, "restart_position"))
        table += [(arm, round(place, 1), (i + 1) / scored) for i, place in enumerate(places)]
    if len(table) == 1:
        return None
    arms = [arm for arm in material.rows_by_arm if material.steered(arm)]
    styles = line_styles(arms)
    end = max(row.tokens or 0 for arm in material.rows_by_arm for row in material.steered(arm))

    def draw(axes: "Axes") -> None:
        for arm, colour in arm_colours(arms).items():
            own = [(tokens, 100 * share) for name, tokens, share in table[1:] if name == arm]
            if material.steered(arm):
                steps = [(0, 0), *own, (end, own[-1][1] if own else 0)]
                axes.step(*zip(*steps, strict=True), where="post", color=colour, lw=1.6, ls=styles[arm])
        axes.set_xlim(0, end)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens into the response")
        axes.set_ylabel("% restarted by then")
        axes.grid(axis="y")

    counted = all(
        row.restart_token is not None
        for arm in material.rows_by_arm
        for row in material.steered(arm)
        if not isinstance(METRICS["restart_position"].of(row), Gap)
    )
    caption = "Cumulative share of steered responses whose second attempt has begun"
    caption += "." if counted else "; the place is estimated from its characters."
    svg = svg_of(draw, arm_colours(list(material.rows_by_arm)))
    return Figure("restart_position", "Where the first restart comes", caption, svg, table)


def thresholds(material: Material) -> Figure | None:
    """The strength at which each latent is used, sorted, with its posterior interval where it is known."""
    entries = (material.thresholds or {}).get("thresholds") or _used_strengths(material)
    kept = sorted((entry for entry in entries if not entry.get("bound")), key=lambda entry: entry["norm"])
    if not kept:
        return None
    header = ("latent", "label", "norm", "low", "high")
    rows: list[tuple[Any, ...]] = [tuple(entry.get(name) for name in header) for entry in kept]

    def draw(axes: "Axes") -> None:
        for place, (_, _, norm, low, high) in enumerate(rows, start=1):
            if low is not None:
                axes.plot([place, place], [low, high], color=FAINT, lw=1.6, solid_capstyle="butt")
            axes.plot([place], [norm], "o", color=INK, ms=3.5, mew=0)
        axes.set_xlabel("latent, sorted")
        axes.set_ylabel("strength / residual norm")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")

    caption = "Strength per latent, in multiples of the layer's median residual norm"
    caption += ", with 90 % posterior intervals." if rows[0][3] is not None else "."
    if len(kept) < len(entries):
        caption += f" Left out because the threshold lies at a bound: {len(entries) - len(kept)}."
    return Figure("thresholds", "Strength of every latent", caption, svg_of(draw, {}), [header, *rows])


FIGURES: tuple[Callable[[Material], Figure | None], ...] = (
    rates,
    first_scores,
    last_scores,
    first_against_last,
    restart_positions,
    restart_likelihood,
    boost_multiples,
    boost_deviations,
    mixtures,
    prompt_variants,
    ablations,
    judge_rates,
    judge_agreement,
    thresholds,
)


def _values(trials: Sequence[Trial], metric: str) -> list[float]:
    values = (METRICS[metric].of(row) for row in trials)
    return [value for value in values if not isinstance(value, Gap)]


def _density(scores: np.ndarray, grid: np.ndarray, width: float = 4.0) -> np.ndarray:
    """Density per point at each of `grid`; mass beyond 0 and 100 is folded back, so it sums to 1."""
    mirrored = np.concatenate([scores, -scores, 200 - scores])
    bells = np.exp(-0.5 * ((grid[:, None] - mirrored[None, :]) / width) ** 2)
    return bells.sum(axis=1) / (len(scores) * width * np.sqrt(2 * np.pi))


def _used_strengths(material: Material) -> list[dict[str, Any]]:
    """Per latent the strength its steered trials had."""
    cells = [row.cell for arm in material.rows_by_arm for row in material.steered(arm)]
    found = {
        cell.latent: {"latent": cell.latent, "label": cell.label, "norm": cell.strength.norm}
        for cell in cells
        if cell.latent is not None and cell.strength and cell.strength.norm is not None
    }
    return list(found.values())
