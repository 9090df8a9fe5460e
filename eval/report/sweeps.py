"""Figures of sweeps, three panels above each other: over the strength, and over the share of self-correction rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval.metrics import METRICS
from eval.report.drawing import FAINT, INK, arm_colours, panels_svg
from eval.report.material import Figure, Material

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_HEIGHT = 1.35
NUMBERS = ("value", "low", "high", "n", "unscored")
Panel = tuple[str, str, str]
"""Condition ("" where the sweep is over conditions), metric, and the panel's label."""
Point = tuple[str, float, str, Mapping[str, Any]]
"""Line, place, metric, and its estimate."""

BOOST_PANELS: tuple[Panel, ...] = (
    ("", "first_score", "first score"),
    ("", "multi_attempt_rate", "% second attempt"),
    ("", "esr_rate", "% ESR"),
)
MIXTURE_PANELS: tuple[Panel, ...] = (
    ("steered", "multi_attempt_rate", "% second attempt"),
    ("steered", "esr_rate", "% ESR"),
    ("unsteered", "restart_rate", "% restart, unsteered"),
)


def boost_multiples(material: Material) -> Figure | None:
    """What multiples of the threshold do."""
    return _boosts(material, "boost_sweep", "boost_x", "", 1.0, "strength / threshold")


def boost_deviations(material: Material) -> Figure | None:
    """What standard deviations of the posterior, added to the threshold, do."""
    return _boosts(material, "boost_sweep_sd", "boost_", "sd", 0.0, "standard deviations above the threshold")


def _boosts(material: Material, name: str, before: str, after: str, steered: float, label: str) -> Figure | None:
    conditions = {condition for found in material.metrics["arms"].values() for condition in found}
    places = {each: place for each in conditions if (place := _between(each, before, after)) is not None}
    if not places:
        return None
    places["steered"] = steered
    points = [
        (arm, places[condition], metric, estimate)
        for arm in material.metrics["arms"]
        if any(each in places and each != "steered" for each in material.metrics["arms"][arm])
        for condition in sorted(places, key=lambda each: places[each])
        for _, metric, _ in BOOST_PANELS
        if (estimate := material.estimate(arm, condition, metric))
    ]
    caption = "The same cells at other strengths; the base model's threshold is marked. "
    caption += "95 % intervals clustered by latent."
    arms = list(material.metrics["arms"])
    return _sweep(name, "How hard it can be pushed", caption, points, BOOST_PANELS, label, arms, mark=steered)


def _between(text: str, before: str, after: str) -> float | None:
    if not (text.startswith(before) and text.endswith(after)):
        return None
    try:
        return float(text.removeprefix(before).removesuffix(after))
    except ValueError:
        return None


def mixtures(material: Material) -> Figure | None:
    """What the share of self-correction rows does; base stands at 0 %."""
    points: list[Point] = []
    for sweep, arms in material.mixtures.items():
        shares = {"base": 0.0, **arms} if "base" in material.metrics["arms"] else dict(arms)
        points += [
            (sweep, round(100 * share, 6), metric, estimate)
            for arm, share in sorted(shares.items(), key=lambda each: each[1])
            for condition, metric, _ in MIXTURE_PANELS
            if (estimate := material.estimate(arm, condition, metric))
        ]
    if not points:
        return None
    caption = "Arms trained alike but for the mixture; 0 % is the base model, which is not trained. 95 % intervals "
    caption += "clustered by latent (unsteered: by prompt)."
    label, sweeps = "% self-correction rows in the mixture", list(material.mixtures)
    return _sweep("mixture_sweep", "How much of it to train on", caption, points, MIXTURE_PANELS, label, sweeps)


def _sweep(
    name: str,
    title: str,
    caption: str,
    points: Sequence[Point],
    panels: Sequence[Panel],
    label: str,
    lines: Sequence[str],
    mark: float | None = None,
) -> Figure:
    """A panel for each metric, a line for each arm or sweep."""
    colours = arm_colours(lines)

    def panel(metric: str, text: str) -> Callable[["Axes"], None]:
        scale = 100 if METRICS[metric].is_rate else 1

        def draw(axes: "Axes") -> None:
            if mark is not None:
                axes.axvline(mark, color=FAINT, lw=1, zorder=0)
            for line in lines:
                own = [(at, found) for name, at, which, found in points if (name, which) == (line, metric)]
                axes.plot(
                    [at for at, _ in own], [scale * found["value"] for _, found in own], "o-", ms=4, lw=1.4,
                    color=colours[line],
                )  # fmt: skip
                for at, found in own:
                    if found["low"] is not None:
                        ends = [scale * found["low"], scale * found["high"]]
                        axes.plot([at, at], ends, color=colours[line], lw=1.2, solid_capstyle="butt")
            axes.set_ylim(bottom=0)
            axes.set_title(text, loc="left", fontsize=9, color=INK)
            axes.grid(axis="y")

        return draw

    svg = panels_svg([panel(metric, text) for _, metric, text in panels], lines, PANEL_HEIGHT, xlabel=label)
    header = ("line", label, "metric", *NUMBERS)
    table = [header, *((*point[:3], *(point[3][key] for key in NUMBERS)) for point in points)]
    return Figure(name, title, caption, svg, table)
