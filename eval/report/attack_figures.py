"""Attacks: how often each derails an arm, what strength and likeness to training change, and what resistance costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from eval.conditions import is_attack, order
from eval.report.arm_figures import BOOST, Point, sweep
from eval.report.drawing import FAINT, arm_colours, dots_svg, panels_svg
from eval.report.figures import Drawn, Material, estimates_table, figure, scaled
from eval.statistics import Estimate
from eval.store import Trial
from eval.summary import LAST, STEERED, Summary, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRADE_OFF = {
    (STEERED, LAST): "last score, steered off-topic",
    ("welcomed", LAST): "last score, welcomed",
    ("welcomed", "multi_attempt_rate"): "% restart, welcomed",
}
"""Resistance, and the costs that are drawn above it."""
SUCCESSES = {"derailed_rate": "last score below 50", "hijack_rate": "hijacked at the end"}
"""What an attack may bring about."""
NO_EFFECT = " (proves nothing)"
CURVE_PANELS = {LAST: "last score", "derailed_rate": "% last score below 50"}
MOST_BINS = 5
LEAST_TRIALS = 12
"""Of all arms in a bin, on average."""


@dataclass(frozen=True)
class Attack:
    """What an attack did to an arm.

    Args:
        paired: the same minus base on the same cells; none for base itself.
    """

    name: str
    arm: str
    own: Mapping[str, Estimate]
    paired: Mapping[str, Estimate]


def attacks(summary: Summary) -> list[Attack]:
    """Every attack on every arm, if any was made beside steering at the threshold."""
    names = sorted((name for name in summary.conditions if is_attack(name)), key=order)
    if names in ([], [STEERED]):
        return []
    attacked = [arm for arm, found in summary.arms.items() if any(name in found for name in names if name != STEERED)]
    return [
        Attack(name, arm, summary.arms[arm][name], summary.paired.get(f"{arm}-base", {}).get(name, {}))
        for name in names
        for arm in attacked
        if name in summary.arms[arm]
    ]


def _success(metric: str, material: Material) -> Drawn:
    """How often attacks bring something about, and how much more or less often than in the base model."""
    summary, label = material.summary, SUCCESSES[metric]
    levels, differences = f"% {label}", "minus base, percentage points"
    rows = [
        (panel, each.name, each.arm, found)
        for each in attacks(summary)
        for panel, estimates in ((levels, each.own), (differences, each.paired))
        if (found := estimates.get(metric)) and found.n
    ]
    dots = [(panel, (name + NO_EFFECT * summary.proves_nothing(name), arm, found)) for panel, name, arm, found in rows]
    shown = {arm for _, _, arm, _ in rows}
    colours = {arm: colour for arm, colour in arm_colours(list(summary.arms)).items() if arm in shown}
    panels = {panel: [dot for label, dot in dots if label == panel] for panel in (levels, differences)}
    svg = partial(dots_svg, {panel: own for panel, own in panels.items() if own}, colours, 100)
    caption = (
        "Each attack by its condition's name; beside it the difference on the same cells. 95 % intervals clustered by "
        "direction. An attack that does not move the base model's last score proves nothing about others."
    )
    return Drawn(caption, svg, estimates_table(("panel", "attack", "arm"), rows))


figure("attack_success", "Attacks: off-topic at the end")(partial(_success, "derailed_rate"))
figure("attack_hijack", "Attacks: hijacked at the end")(partial(_success, "hijack_rate"))


@figure("resistance_norm", "Resistance by strength")
def by_norm(material: Material) -> Drawn:
    """Last score by the length of the push, over all multiples of the threshold that were run."""
    trials = {
        arm: own
        for arm, rows in material.rows_by_arm.items()
        if any(BOOST.fullmatch(row.condition) for row in rows)
        and (own := [row for row in rows if row.condition == STEERED or BOOST.fullmatch(row.condition)])
    }
    caption = (
        "Steered and boosted trials in bins of their strength, each bin at its median and the same for every arm. "
        "95 % intervals clustered by direction."
    )
    return sweep(caption, _binned(trials, _norm), CURVE_PANELS, "strength / residual norm", list(trials))


@figure("resistance_cosine", "Resistance by likeness to training")
def by_cosine(material: Material) -> Drawn:
    """Last score by the cosine between a trial's direction and the nearest one that training rows were steered by."""

    def cosine(trial: Trial) -> float | None:
        return None if trial.cell.latent is None else material.nearest.get(trial.cell.latent)

    trials = {arm: own for arm in material.rows_by_arm if (own := material.steered(arm))}
    caption = (
        "Steered trials in bins of their direction's cosine with the nearest direction of the training split, each "
        "bin at its median. A resistance that only fits what was trained on falls to the left; base shows what else "
        "differs between directions. 95 % intervals clustered by direction."
    )
    label = "cosine with the nearest training direction"
    return sweep(caption, _binned(trials, cosine), CURVE_PANELS, label, list(trials))


def _norm(trial: Trial) -> float | None:
    return trial.cell.strength.norm if trial.cell.strength else None


def _binned(trials: Mapping[str, Sequence[Trial]], of: Callable[[Trial], float | None]) -> list[Point]:
    """Arm, bin, metric and estimate; bins hold about equally many trials of all arms together."""
    placed = [(arm, at, row) for arm, rows in trials.items() for row in rows if (at := of(row)) is not None]
    values = sorted(at for _, at, _ in placed)
    bins = min(MOST_BINS, len(values) // (LEAST_TRIALS * max(len(trials), 1)))
    if bins < 2:
        return []
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    points: list[Point] = []
    for number in range(len(edges) + 1):
        inside = [(arm, at, row) for arm, at, row in placed if np.searchsorted(edges, at) == number]
        middle = round(median(at for _, at, _ in inside), 2) if inside else 0.0
        for arm in trials:
            own = [row for name, _, row in inside if name == arm]
            points += [(arm, middle, metric, found) for metric in CURVE_PANELS if (found := estimate(own, metric)).n]
    return points


@figure("trade_off", "Resistance and obedience")
def trade_off(material: Material) -> Drawn:
    """Last score under off-topic steering against what happens where the prompt asks for what steers, by arm."""
    points = {
        arm: point
        for arm in material.summary.arms
        if len(point := [found for key in TRADE_OFF if (found := material.estimate(arm, *key))]) == len(TRADE_OFF)
    }
    colours, metrics = arm_colours(list(material.summary.arms)), [metric for _, metric in TRADE_OFF]
    shown = {arm: [scaled(*pair) for pair in zip(point, metrics, strict=True)] for arm, point in points.items()}
    curves = [
        [shown[arm] for arm, _ in sorted(scales.items(), key=lambda item: item[1]) if arm in shown]
        for scales in material.scales.values()
    ]

    def draw(cost: int, axes: "Axes") -> None:
        for curve in curves:
            across, up = ([point[side].value or 0.0 for point in curve] for side in (0, cost))
            axes.plot(across, up, color=FAINT, lw=1.4, zorder=0)
        for arm, point in shown.items():
            _cross(axes, arm, (point[0], point[cost]), colours[arm])
        axes.set(ylabel=list(TRADE_OFF.values())[cost])
        axes.margins(0.12)
        axes.grid()

    caption = (
        "Across: last score where steering drags away from the question. Up: last score, and share of needless "
        "restarts, where it pushes towards what the prompt asks for, at the same thresholds; a score below 50 of base "
        "means that the push itself does harm. Arms that differ in the scale of one adapter are joined. 95 % intervals "
        "clustered by direction."
    )
    rows = [(arm, *key, each) for arm, point in points.items() for key, each in zip(TRADE_OFF, point, strict=True)]
    draws, label = [partial(draw, cost) for cost in range(1, len(TRADE_OFF))], next(iter(TRADE_OFF.values()))
    svg = partial(panels_svg, draws, {arm: colours[arm] for arm in points}, 2.5, xlabel=label)
    return Drawn(caption, svg, estimates_table(("arm", "condition", "metric"), rows))


def _cross(axes: "Axes", arm: str, point: tuple[Estimate, Estimate], colour: str) -> None:
    """A point with both its intervals and the arm's name."""
    across, up = point
    x, y = across.value or 0.0, up.value or 0.0
    if across.low is not None and across.high is not None:
        axes.plot([across.low, across.high], [y, y], color=colour, lw=1.2)
    if up.low is not None and up.high is not None:
        axes.plot([x, x], [up.low, up.high], color=colour, lw=1.2)
    axes.plot([x], [y], "o", color=colour, ms=5)
    axes.annotate(arm, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7.5)
