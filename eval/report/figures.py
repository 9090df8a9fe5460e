"""The registry of the report's figures, and those of one evaluation: rates, scores, restarts and strengths."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eval.calibration import Threshold
from eval.conditions import order
from eval.judging.agreement import Agreement
from eval.metrics import METRICS, Gap
from eval.report.drawing import (
    FAINT,
    INK,
    Dot,
    Figure,
    arm_colours,
    dots_height,
    draw_dots,
    line_styles,
    panels_svg,
    svg_of,
)
from eval.statistics import Estimate
from eval.store import Trial
from eval.summary import STEERED, Summary, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUMBERS = ("value", "low", "high", "n", "unscored")
"""The fields of an estimate, as columns of a figure's table."""
WIDEST = 18.0
"""Points across that the scatter's largest dot may have."""
ASIDE = 2.5
"""Points of score by which arms stand beside each other in the scatter."""
RATES = (
    ("steered", "multi_attempt_rate", "second attempt"),
    ("steered", "esr_rate", "…and better (ESR)"),
    ("steered", "worsening_rate", "…and worse"),
    ("steered", "silent_recovery_rate", "silent recovery"),
    ("steered", "hijack_rate", "hijacked at the end"),
    ("unsteered", "restart_rate", "restart, unsteered"),
)


@dataclass(frozen=True)
class Material:
    """What a report is made from.

    Args:
        summary: the numbers.
        rows_by_arm: the trials of each arm.
        thresholds: of every latent, those at a bound included; if there are none, strengths are read from the trials.
        agreement: of the judges, where several were asked.
        mixtures: sweep -> arm -> share of self-correction rows in its training file, 0-1.
    """

    summary: Summary
    rows_by_arm: Mapping[str, Sequence[Trial]]
    thresholds: Sequence[Threshold] = ()
    agreement: Agreement | None = None
    mixtures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def steered(self, arm: str) -> list[Trial]:
        """The arm's trials steered at the base model's thresholds."""
        return [row for row in self.rows_by_arm[arm] if row.condition == STEERED]

    def estimate(self, arm: str, condition: str, metric: str) -> Estimate | None:
        """An arm's estimate, if it rests on anything."""
        found = self.summary.arms.get(arm, {}).get(condition, {}).get(metric)
        return found if found and found.n else None


class Drawn(NamedTuple):
    """What a figure's function makes: caption, SVG document, and the numbers in it with a header row."""

    caption: str
    svg: str
    table: list[tuple[Any, ...]]


Draw = Callable[[Material], Drawn | None]
FIGURES: dict[str, tuple[str, Draw]] = {}
"""Every figure by its name (also its file's): title and function, in reading order; fill it with `figure`."""


def figure(name: str, title: str) -> Callable[[Draw], Draw]:
    """Register the decorated function as a figure; it returns None where there are no data for it.

    Raises:
        ValueError: if there is a figure of that name.
    """

    def register(draw: Draw) -> Draw:
        if name in FIGURES:
            raise ValueError(f"there is a figure {name!r} already")
        FIGURES[name] = title, draw
        return draw

    return register


def draw_figures(material: Material) -> list[Figure]:
    """Every figure for which there are data, in reading order."""
    drawn = ((name, title, draw(material)) for name, (title, draw) in FIGURES.items())
    return [Figure(name, title, *made) for name, title, made in drawn if made]


@figure("rates", "Rates per arm")
def rates(material: Material) -> Drawn | None:
    """Share of responses per arm, with intervals."""
    arms = list(material.summary.arms)
    found = [
        (label, arm, estimate, (condition, metric, arm, *astuple(estimate)))
        for condition, metric, label in RATES
        for arm in arms
        if (estimate := material.estimate(arm, condition, metric))
    ]
    if not found:
        return None
    lines = list(dict.fromkeys(label for label, *_ in found))

    def draw(axes: "Axes") -> None:
        draw_dots(axes, [(label, arm, estimate) for label, arm, estimate, _ in found], lines, arm_colours(arms), 100)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("% of responses")

    caption = "Share of valid responses, 95 % intervals clustered by latent (unsteered: by prompt)."
    svg = svg_of(draw, arm_colours(arms), height=0.8 + dots_height(lines, arms))
    return Drawn(caption, svg, [("condition", "metric", "arm", *NUMBERS), *(row for *_, row in found)])


@figure("first_scores", "Scores of first attempts")
def first_scores(material: Material) -> Drawn | None:
    """Density of first-attempt scores under steering."""
    caption = "Density of first-attempt scores under steering (Gaussian kernel, 4 points, folded at the ends)."
    return _score_density(material, "first_score", caption)


@figure("last_scores", "Scores of last attempts")
def last_scores(material: Material) -> Drawn | None:
    """Density of last-attempt scores under steering."""
    caption = "The same for the last attempt; a response without a restart has only one, its first."
    return _score_density(material, "last_score", caption)


def _score_density(material: Material, metric: str, caption: str) -> Drawn | None:
    scores = {arm: METRICS[metric].values(material.steered(arm)) for arm in material.rows_by_arm}
    grid = np.linspace(0, 100, 101)
    curves = {arm: _density(np.array(found), grid) for arm, found in scores.items() if len(found) >= 2}
    if not curves:
        return None
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
    return Drawn(caption, svg_of(draw, {arm: colours[arm] for arm in curves}), [("score", *curves), *rows])


def _density(scores: np.ndarray, grid: np.ndarray, width: float = 4.0) -> np.ndarray:
    """Density per point at each of `grid`; mass beyond 0 and 100 is folded back, so it sums to 1."""
    mirrored = np.concatenate([scores, -scores, 200 - scores])
    bells = np.exp(-0.5 * ((grid[:, None] - mirrored[None, :]) / width) ** 2)
    return bells.sum(axis=1) / (len(scores) * width * np.sqrt(2 * np.pi))


@figure("first_vs_last", "First against last score")
def first_against_last(material: Material) -> Drawn | None:
    """First against last score of responses with several attempts."""
    points = []
    for arm in material.rows_by_arm:
        for row in material.steered(arm):
            first, last = METRICS["first_score"].of(row), METRICS["last_score"].of(row)
            if len(row.attempts) > 1 and not isinstance(first, Gap) and not isinstance(last, Gap):
                points.append((arm, first, last, row.key))
    if not points:
        return None
    colours = arm_colours(list(material.rows_by_arm))
    arms = list(dict.fromkeys(arm for arm, *_ in points))
    counts = Counter(point[:3] for point in points)
    size = min(3.0, WIDEST / max(counts.values()) ** 0.5)

    def draw(axes: "Axes") -> None:
        axes.plot([0, 100], [0, 100], color=FAINT, lw=1, zorder=0)
        for (arm, first, last), count in counts.items():
            beside = ASIDE * (arms.index(arm) - (len(arms) - 1) / 2)
            axes.plot([first + beside], [last], "o", color=colours[arm], ms=size * count**0.5, alpha=0.55, mew=0)
        axes.set_xlim(-8, 108)
        axes.set_ylim(-8, 108)
        axes.set_xlabel("first attempt's score")
        axes.set_ylabel("last attempt's score")
        axes.grid()

    caption = (
        "Steered responses with several attempts; above the line the last is better than the first. A dot's area is "
        "in proportion to the number of responses with these scores; arms stand a little beside each other."
    )
    svg = svg_of(draw, {arm: colours[arm] for arm in arms}, height=3.4)
    return Drawn(caption, svg, [("arm", "first", "last", "key"), *points])


@figure("restart_position", "Where the first restart comes")
def restart_positions(material: Material) -> Drawn | None:
    """Cumulative share of steered responses that have restarted, by token."""
    trials = {arm: steered for arm in material.rows_by_arm if (steered := material.steered(arm))}
    shares: dict[str, list[tuple[float, float]]] = {}
    for arm, rows in trials.items():
        scored = len(METRICS["multi_attempt_rate"].values(rows))
        positions = sorted(METRICS["restart_position"].values(rows))
        shares[arm] = [(round(position, 1), (i + 1) / scored) for i, position in enumerate(positions)]
    if not any(shares.values()):
        return None
    colours, styles = arm_colours(list(trials)), line_styles(list(trials))
    end = max(row.tokens or 0 for rows in trials.values() for row in rows)

    def draw(axes: "Axes") -> None:
        for arm, own in shares.items():
            steps = [(0.0, 0.0), *own, (end, own[-1][1] if own else 0.0)]
            tokens, share = zip(*steps, strict=True)
            axes.step(tokens, [100 * each for each in share], where="post", color=colours[arm], lw=1.6, ls=styles[arm])
        axes.set_xlim(0, end)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens into the response")
        axes.set_ylabel("% restarted by then")
        axes.grid(axis="y")

    counted = all(row.restart_token is not None for rows in trials.values() for row in rows if len(row.attempts) > 1)
    caption = "Cumulative share of steered responses whose second attempt has begun"
    caption += "." if counted else "; where tokens were not counted, the position is estimated from the characters."
    table = [(arm, *point) for arm, own in shares.items() for point in own]
    svg = svg_of(draw, arm_colours(list(material.rows_by_arm)))
    return Drawn(caption, svg, [("arm", "tokens", "share"), *table])


@figure("restart_likelihood", "Log-probability of a restart")
def restart_likelihood(material: Material) -> Drawn | None:
    """Mean log-probability of a restart phrase at sentence ends, per arm and condition, and minus base."""
    levels, differences = _log_probabilities(material.summary.arms), _log_probabilities(material.summary.paired)
    if not levels:
        return None
    conditions = sorted({condition for condition, *_ in levels}, key=order)
    colours = arm_colours(list(material.summary.arms))

    def panel(dots: Sequence[Dot], label: str, mark: float | None = None) -> Callable[["Axes"], None]:
        def draw(axes: "Axes") -> None:
            if mark is not None:
                axes.axvline(mark, color=INK, lw=0.8, zorder=0)
            draw_dots(axes, dots, conditions, colours)
            axes.set_yticks(range(len(conditions)), [condition.replace("_", " ") for condition in conditions])
            axes.set_xlabel(label)

        return draw

    panels = [panel(levels, "log-probability (nats)")]
    if differences:
        panels.append(panel(differences, "minus base on the same cells (nats)", mark=0.0))
    caption = (
        "Log-probability that one of the restart phrases comes next, averaged over the sentence ends of each first "
        "attempt; 2.3 nats more are ten times as likely. 95 % intervals clustered by latent (unsteered: by prompt)."
    )
    table = [
        (of, condition, arm, *astuple(estimate))
        for of, dots in (("arm", levels), ("arm minus base", differences))
        for condition, arm, estimate in dots
    ]
    svg = panels_svg(panels, colours, height=0.75 + dots_height(conditions, list(colours)))
    return Drawn(caption, svg, [("of", "condition", "arm", *NUMBERS), *table])


def _log_probabilities(estimates: Table[Estimate]) -> list[Dot]:
    return [
        (condition, arm.removesuffix("-base"), found)
        for arm, conditions in estimates.items()
        for condition in sorted(conditions, key=order)
        if (found := conditions[condition].get("restart_logprob")) and found.n
    ]
