"""The registry of the report's figures, and those of one evaluation: rates, scores, restarts and strengths."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eval.beginnings import Noticed
from eval.calibration import Threshold
from eval.conditions import order
from eval.course import TokenSums
from eval.judging.agreement import Agreement, Panel
from eval.metrics import METRICS, Gap
from eval.report.drawing import FAINT, INK, Dot, Figure, arm_colours, dots_svg, line_styles, svg_of
from eval.statistics import Estimate
from eval.store import Trial
from eval.summary import STEERED, Summary, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDEST = 18.0
"""Points across that the scatter's largest dot may have."""
ASIDE = 2.5
"""Points of score by which arms stand beside each other in the scatter."""
RATES = {
    ("steered", "multi_attempt_rate"): "second attempt",
    ("steered", "esr_rate"): "…and better (ESR)",
    ("steered", "esr_after_shown_detour_of_all"): "…after a shown detour",
    ("steered", "worsening_rate"): "…and worse",
    ("steered", "silent_recovery_rate"): "silent recovery",
    ("steered", "hijack_rate"): "hijacked at the end",
    ("unsteered", "restart_rate"): "restart, unsteered",
}


@dataclass(frozen=True)
class Material:
    """What a report is made from.

    Args:
        thresholds: of every latent, those at a bound included; if there are none, strengths are read from the trials.
        agreement: of the judges, where several were asked.
        mixtures: sweep -> arm -> share of self-correction rows in its training file, 0-1.
        noun: what a direction is called: latent or vector.
        target: the score that defines a threshold, 0-100.
        panel: judge -> arm -> the trials as this judge scores them, where several were asked.
        losses: arm -> (step, training loss) of each of its runs.
        noticed: arm -> what detectors read in the beginnings that its replies go on from, where some were found.
        token_sums: arm -> trial key -> the detectors' sum at every token, where `esr latents course` has read it.
        scales: adapter -> arm -> the share of it that is at work, 0-1, where arms differ in that alone.
        nearest: test direction -> its cosine with the nearest training direction, where that is known.
    """

    summary: Summary
    rows_by_arm: Mapping[str, Sequence[Trial]]
    thresholds: Sequence[Threshold] = ()
    agreement: Agreement | None = None
    mixtures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    noun: str = "latent"
    target: float = 30.0
    panel: Panel = field(default_factory=dict)
    losses: Mapping[str, Sequence[Sequence[tuple[float, float]]]] = field(default_factory=dict)
    noticed: Mapping[str, Sequence[Noticed]] = field(default_factory=dict)
    token_sums: Mapping[str, Mapping[str, TokenSums]] = field(default_factory=dict)
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    nearest: Mapping[int, float] = field(default_factory=dict)

    def steered(self, arm: str) -> list[Trial]:
        """The arm's trials steered at the base model's thresholds."""
        return self.under(STEERED, arm)

    def under(self, condition: str, arm: str) -> list[Trial]:
        """The arm's trials under a condition."""
        return [row for row in self.rows_by_arm[arm] if row.condition == condition]

    def estimate(self, arm: str, condition: str, metric: str) -> Estimate | None:
        """An arm's estimate, if it rests on anything."""
        estimate = self.summary.arms.get(arm, {}).get(condition, {}).get(metric)
        return estimate if estimate and estimate.n else None


class Drawn(NamedTuple):
    """What a figure's function makes.

    Args:
        svg: makes the SVG document, or another one if it is given a `look` (see `drawing.Look`).
        table: the numbers in it, with a header row; with that alone the figure is left out.
    """

    caption: str
    svg: Callable[..., bytes]
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
    return [
        Figure(name, title, made.caption, made.svg().decode(), made.table, made.svg)
        for name, title, made in drawn
        if made and len(made.table) > 1
    ]


def estimates_table(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A figure's table of rows that end with an estimate; `names` head the other columns."""
    return [(*names, "value", "low", "high", "n", "unscored"), *((*row[:-1], *astuple(row[-1])) for row in rows)]


def scaled(estimate: Estimate, metric: str) -> Estimate:
    """Rates as percentages; scores and whatever is no metric as they are."""
    if metric not in METRICS or not METRICS[metric].is_rate:
        return estimate
    value, low, high = (None if end is None else 100 * end for end in (estimate.value, estimate.low, estimate.high))
    return replace(estimate, value=value, low=low, high=high)


@figure("rates", "Rates per arm")
def rates(material: Material) -> Drawn:
    """Share of responses per arm, with intervals."""
    arms = list(material.summary.arms)
    rows = [(*key, arm, estimate) for key in RATES for arm in arms if (estimate := material.estimate(arm, *key))]
    dots = [(RATES[condition, metric], arm, estimate) for condition, metric, arm, estimate in rows]
    caption = "Share of valid responses, 95 % intervals clustered by direction (unsteered: by prompt)."
    svg = partial(dots_svg, {"% of responses": dots}, arm_colours(arms), 100)
    return Drawn(caption, svg, estimates_table(("condition", "metric", "arm"), rows))


def _score_density(metric: str, condition: str, caption: str, material: Material) -> Drawn:
    """Density of a score under a condition, a curve for each arm."""
    scores = {arm: METRICS[metric].values(material.under(condition, arm)) for arm in material.rows_by_arm}
    grid = np.linspace(0, 100, 101)
    curves = {arm: _density(np.array(values), grid) for arm, values in scores.items() if len(values) >= 2}
    colours, styles = arm_colours(list(scores)), line_styles(list(scores))

    def draw(axes: "Axes") -> None:
        for arm, curve in curves.items():
            axes.fill_between(grid, 100 * curve, color=colours[arm], alpha=0.08, lw=0)
            axes.plot(grid, 100 * curve, color=colours[arm], lw=1.6, ls=styles[arm])
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("score, 0-100")
        axes.set_ylabel("% of responses per point")

    rows = zip(grid.tolist(), *(curve.tolist() for curve in curves.values()), strict=True) if curves else ()
    legend = {arm: colours[arm] for arm in curves}
    return Drawn(caption, partial(svg_of, draw, legend), [("score", *curves), *rows])


def _density(scores: np.ndarray, grid: np.ndarray, width: float = 4.0) -> np.ndarray:
    """Density per point at each of `grid`; mass beyond 0 and 100 is folded back, so it sums to 1."""
    mirrored = np.concatenate([scores, -scores, 200 - scores])
    bells = np.exp(-0.5 * ((grid[:, None] - mirrored[None, :]) / width) ** 2)
    return bells.sum(axis=1) / (len(scores) * width * np.sqrt(2 * np.pi))


FIRST = "Density of first-attempt scores under steering (Gaussian kernel, 4 points, folded at the ends)."
LAST = "The same for the last attempt; a response without a restart has only one, its first."
figure("first_scores", "Scores of first attempts")(partial(_score_density, "first_score", STEERED, FIRST))
UNSTEERED = "Density of last scores where nobody steers: what training cost ordinary answers."
figure("last_scores", "Scores of last attempts")(partial(_score_density, "last_score", STEERED, LAST))
figure("unsteered_scores", "Scores when nobody steers")(partial(_score_density, "last_score", "unsteered", UNSTEERED))


@figure("first_vs_last", "First against last score")
def first_against_last(material: Material) -> Drawn:
    """First against last score of responses with several attempts."""
    points = []
    for arm in material.rows_by_arm:
        for row in material.steered(arm):
            first, last = METRICS["first_score"].of(row), METRICS["last_score"].of(row)
            if len(row.attempts) > 1 and not isinstance(first, Gap) and not isinstance(last, Gap):
                points.append((arm, first, last, row.key))
    colours = arm_colours(list(material.rows_by_arm))
    arms = list(dict.fromkeys(arm for arm, *_ in points))
    counts = Counter(point[:3] for point in points)

    def draw(axes: "Axes") -> None:
        size = min(3.0, WIDEST / max(counts.values()) ** 0.5)
        axes.plot([0, 100], [0, 100], color=FAINT, lw=1, zorder=0)
        for (arm, first, last), count in counts.items():
            beside = ASIDE * (arms.index(arm) - (len(arms) - 1) / 2)
            axes.plot([first + beside], [last], "o", color=colours[arm], ms=size * count**0.5, alpha=0.55, mew=0)
        axes.set(xlim=(-8, 108), ylim=(-8, 108), xlabel="first attempt's score", ylabel="last attempt's score")
        axes.grid()

    caption = (
        "Steered responses with several attempts; above the line the last is better than the first. A dot's area is "
        "in proportion to the number of responses with these scores; arms stand a little beside each other."
    )
    svg = partial(svg_of, draw, {arm: colours[arm] for arm in arms}, height=3.4)
    return Drawn(caption, svg, [("arm", "first", "last", "key"), *points])


@figure("restart_position", "Where the first restart comes")
def restart_positions(material: Material) -> Drawn:
    """Cumulative share of steered responses that have restarted, by token."""
    trials = {arm: steered for arm in material.rows_by_arm if (steered := material.steered(arm))}
    shares: dict[str, list[tuple[float, float]]] = {}
    for arm, rows in trials.items():
        scored = len(METRICS["multi_attempt_rate"].values(rows))
        positions = sorted(METRICS["restart_position"].values(rows))
        shares[arm] = [(round(position, 1), (i + 1) / scored) for i, position in enumerate(positions)]
    colours, styles = arm_colours(list(trials)), line_styles(list(trials))
    end = max((row.tokens or 0 for rows in trials.values() for row in rows), default=0)

    def draw(axes: "Axes") -> None:
        for arm, own in shares.items():
            tokens, share = zip((0.0, 0.0), *own, (end, own[-1][1] if own else 0.0), strict=True)
            axes.step(tokens, [100 * part for part in share], where="post", color=colours[arm], lw=1.6, ls=styles[arm])
        axes.set(xlim=(0, end), xlabel="tokens into the response", ylabel="% restarted by then")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")

    counted = all(row.restart_token is not None for rows in trials.values() for row in rows if len(row.attempts) > 1)
    caption = "Cumulative share of steered responses whose second attempt has begun"
    caption += "." if counted else "; where tokens were not counted, the position is estimated from the characters."
    table = [(arm, *point) for arm, own in shares.items() for point in own]
    return Drawn(caption, partial(svg_of, draw, colours), [("arm", "tokens", "share"), *table])


@figure("restart_likelihood", "Log-probability of a restart")
def restart_likelihood(material: Material) -> Drawn:
    """Mean log-probability of a restart phrase at sentence ends, per arm and condition, and minus base."""
    levels, differences = _log_probabilities(material.summary.arms), _log_probabilities(material.summary.paired)
    panels = {"log-probability (nats)": levels, "minus base on the same cells (nats)": differences}
    caption = (
        "Log-probability that one of the restart phrases comes next, averaged over the sentence ends of each first "
        "attempt; 2.3 nats more are ten times as likely. 95 % intervals clustered by direction (unsteered: by prompt)."
    )
    rows = [("arm", *dot) for dot in levels] + [("arm minus base", *dot) for dot in differences]
    drawn = {label: dots for label, dots in panels.items() if dots}
    svg = partial(dots_svg, drawn, arm_colours(list(material.summary.arms)))
    return Drawn(caption, svg, estimates_table(("of", "condition", "arm"), rows))


def _log_probabilities(estimates: Table[Estimate]) -> list[Dot]:
    dots = [
        (condition, arm.removesuffix("-base"), measured["restart_logprob"])
        for arm, conditions in estimates.items()
        for condition, measured in conditions.items()
        if "restart_logprob" in measured and measured["restart_logprob"].n
    ]
    return sorted(dots, key=lambda dot: order(dot[0]))


@figure("training_loss", "Training loss")
def training_loss(material: Material) -> Drawn:
    """Loss of every trained arm by step, a line for each of its runs."""
    colours, styles = arm_colours(list(material.summary.arms)), line_styles(list(material.summary.arms))

    def draw(axes: "Axes") -> None:
        for arm, runs in material.losses.items():
            for run in runs:
                steps, losses = zip(*run, strict=True)
                axes.plot(steps, losses, color=colours[arm], lw=1.6, ls=styles[arm])
        axes.set(xlabel="optimiser step", ylabel="loss (nats per trained token)")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")

    table = [
        (arm, number, *point)
        for arm, runs in material.losses.items()
        for number, run in enumerate(runs)
        for point in run
    ]
    caption = "Mean loss over the steps since the point before. Arms that train different spans are not on one scale."
    legend = {arm: colours[arm] for arm in material.losses}
    return Drawn(caption, partial(svg_of, draw, legend), [("arm", "run", "step", "loss"), *table])


LatentStrength = tuple[int, str | None, float, float | None, float | None]
"""Latent, its label, the strength in `norm` units, and the ends of its interval."""


@figure("thresholds", "Strength of every direction")
def thresholds(material: Material) -> Drawn:
    """The strength at which each latent is used, sorted, with its posterior interval where it is known."""
    within = [each for each in material.thresholds if not each.bound]
    rows: list[LatentStrength] = [(each.latent, each.label, each.norm, each.low, each.high) for each in within]
    strengths = sorted(rows if material.thresholds else _used_strengths(material), key=lambda row: row[2])

    def draw(axes: "Axes") -> None:
        for position, (_, _, norm, low, high) in enumerate(strengths, start=1):
            if low is not None and high is not None:
                axes.plot([position, position], [low, high], color=FAINT, lw=1.6, solid_capstyle="butt")
            axes.plot([position], [norm], "o", color=INK, ms=3.5, mew=0)
        axes.set(xlabel="direction, sorted", ylabel="strength / residual norm")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")

    caption = "Strength per direction, in multiples of the layer's median residual norm"
    caption += ", with 90 % posterior intervals." if within else "."
    if left_out := len(material.thresholds) - len(within):
        caption += f" Left out because the threshold lies at a bound: {left_out}."
    return Drawn(caption, partial(svg_of, draw, {}), [("latent", "label", "norm", "low", "high"), *strengths])


def _used_strengths(material: Material) -> list[LatentStrength]:
    """Per latent the strength its steered trials had, without an interval."""
    cells = [row.cell for arm in material.rows_by_arm for row in material.steered(arm)]
    used: dict[int, LatentStrength] = {
        cell.latent: (cell.latent, cell.label, cell.strength.norm, None, None)
        for cell in cells
        if cell.latent is not None and cell.strength and cell.strength.norm is not None
    }
    return list(used.values())
