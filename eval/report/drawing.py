"""How a figure looks: colours, type, and the way from matplotlib to a themed SVG."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers; base is the neutral one.
BASE_COLOUR = "#6b7280"
ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#1f2328", "#d0d7de"
LEGEND_COLUMNS = 4
DASHES: tuple[Any, ...] = ("-", "-", (0, (5, 1.5)), (0, (2, 2)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)))
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for every arm: grey for base, the palette in order for the others."""
    others = [arm for arm in arms if arm != "base"]
    colours = {arm: ARM_COLOURS[i % len(ARM_COLOURS)] for i, arm in enumerate(others)}
    return {arm: colours.get(arm, BASE_COLOUR) for arm in arms}


def inline_svg(svg: str, colours: Mapping[str, str]) -> str:
    """The SVG element alone, in the page's CSS variables instead of colours, so that it follows the theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    names = {colour: f"var(--arm-{index})" for index, colour in enumerate(dict.fromkeys(colours.values()))}
    for colour, name in {INK: "var(--ink)", FAINT: "var(--rule)", **names}.items():
        svg = svg.replace(colour, name)
    return svg


def line_styles(arms: Sequence[str]) -> dict[str, Any]:
    """A dash pattern for every arm, so that a line lying on another one hides it only in part."""
    return {arm: DASHES[i % len(DASHES)] for i, arm in enumerate(arms)}


def svg_of(draw: Callable[["Axes"], None], legend: Mapping[str, str], height: float = 3.0) -> str:
    """An SVG document, the same bytes for the same numbers; text stays text, in the page's font.

    Args:
        legend: name -> colour; none if it is empty.
        height: inches, without the legend.
    """
    return panels_svg([draw], legend, height)


def line_height(arms: Sequence[str]) -> float:
    """Inches that a line of `draw_dots` takes."""
    return max(0.42, 0.11 * len(arms))


Dot = tuple[int, str, float, float | None, float | None]
"""Line, arm, value, and the ends of its interval."""


def draw_dots(axes: "Axes", dots: Sequence[Dot], lines: Sequence[str], arms: Sequence[str]) -> None:
    """A line of dots with intervals for every name in `lines`, the arms below each other in it."""
    step, colours = 0.7 / max(len(arms), 1), arm_colours(arms)
    for line, arm, value, low, high in dots:
        y = line + (arms.index(arm) - (len(arms) - 1) / 2) * step
        if low is not None and high is not None:
            axes.plot([low, high], [y, y], color=colours[arm], lw=1.6, solid_capstyle="butt")
        axes.plot([value], [y], "o", color=colours[arm], ms=5.5)
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.grid(axis="x")


def panels_svg(
    draws: Sequence[Callable[["Axes"], None]], legend: Mapping[str, str], height: float, xlabel: str | None = None
) -> str:
    """As `svg_of`, with panels of `height` inches each above one another; on one horizontal axis if it has a name."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    columns = min(len(legend), LEGEND_COLUMNS)
    above = 0.1 + 0.2 * -(-len(legend) // LEGEND_COLUMNS) if legend else 0
    # The stubs know every setting by name; a plain dictionary does not.
    with mpl.rc_context(cast(Any, STYLE)):
        canvas = Canvas(figsize=(4.9, height * len(draws) + above), layout="constrained")
        panels = canvas.subplots(len(draws), sharex=xlabel is not None, squeeze=False)[:, 0]
        for axes, draw in zip(panels, draws, strict=True):
            draw(axes)
        if xlabel:
            panels[-1].set_xlabel(xlabel)
        if legend:
            # Matplotlib fills a legend column by column; it is read line by line.
            names = [name for column in range(columns) for name in list(legend)[column::columns]]
            marks = [Line2D([], [], marker="o", ls="", ms=5, color=legend[name]) for name in names]
            canvas.legend(marks, names, loc="outside upper left", ncols=columns, handletextpad=0.1)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
