"""Figures of sweeps, three panels above each other: over the strength, and over the share of self-correction rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval.metrics import METRICS
from eval.report.drawing import FAINT, INK, arm_colours, line_styles, panels_svg
from eval.report.material import NUMBERS, Figure, Material

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_HEIGHT = 1.5
MOST_TICKS = 9
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
    title = "Boost sweep: multiples of the threshold"
    return _boosts(material, "boost_sweep", title, "boost_x", "", 1.0, "strength / threshold")


def boost_deviations(material: Material) -> Figure | None:
    """What standard deviations of the posterior, added to the threshold, do."""
    title = "Boost sweep: standard deviations"
    label = "standard deviations of its posterior, added to the threshold"
    return _boosts(material, "boost_sweep_sd", title, "boost_", "sd", 0.0, label)


def _boosts(
    material: Material, name: str, title: str, before: str, after: str, steered: float, label: str
) -> Figure | None:
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
    return _sweep(name, title, caption, points, BOOST_PANELS, label, arms, mark=steered)


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
    return _sweep("mixture_sweep", "Mixture sweep", caption, points, MIXTURE_PANELS, label, sweeps)


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
    from matplotlib.ticker import MaxNLocator

    colours, styles = arm_colours(lines), line_styles(lines)
    places = sorted({place for _, place, _, _ in points})
    drawn = [line for line in lines if any(line == name for name, *_ in points)]

    def panel(metric: str, text: str) -> Callable[["Axes"], None]:
        scale = 100 if METRICS[metric].is_rate else 1

        def draw(axes: "Axes") -> None:
            if mark is not None:
                axes.axvline(mark, color=FAINT, lw=1, zorder=0)
            for line in lines:
                own = [(at, found) for name, at, which, found in points if (name, which) == (line, metric)]
                axes.plot(
                    [at for at, _ in own], [scale * found["value"] for _, found in own], "o", ms=4, lw=1.4,
                    color=colours[line], ls=styles[line],
                )  # fmt: skip
                for at, found in own:
                    if found["low"] is not None:
                        ends = [scale * found["low"], scale * found["high"]]
                        axes.plot([at, at], ends, color=colours[line], lw=1.2, solid_capstyle="butt")
            # A little room below 0, so that a line of zeros is seen.
            axes.set_ylim(-0.04 * axes.get_ylim()[1], axes.get_ylim()[1])
            if len(places) <= MOST_TICKS:
                axes.set_xticks(places, [f"{place:g}".replace("-", "−") for place in places])
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axes.set_title(text, loc="left", fontsize=9, color=INK)
            axes.grid(axis="y")

        return draw

    svg = panels_svg(
        [panel(metric, text) for _, metric, text in panels],
        {line: colours[line] for line in drawn},
        PANEL_HEIGHT,
        xlabel=label,
    )
    header = ("line", label, "metric", *NUMBERS)
    table = [header, *((*point[:3], *(point[3][key] for key in NUMBERS)) for point in points)]
    return Figure(name, title, caption, svg, table)
