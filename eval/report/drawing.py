"""What figures and pages look like: colours, the way from matplotlib to a themed SVG, and pages from templates."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from esr_train.files import replacing
from eval.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATES = "eval.report"
"""The package whose templates every page may include, such as `style.css`."""
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


FORMATS: tuple[Literal["pdf", "svg", "png"], ...] = ("pdf", "svg", "png")
PNG_DPI = 300


@dataclass(frozen=True)
class Look:
    """How large a figure is and what it is written as.

    Args:
        width: inches; heights keep their proportion to it.
        font: points.
        format: of the document; a PDF embeds its fonts as TrueType, an SVG leaves text to the page.
    """

    width: float = 4.9
    font: float = 9.0
    format: Literal["pdf", "svg", "png"] = "svg"


PAGE = Look()
"""Of the figures on a page."""


@dataclass(frozen=True)
class Figure:
    """A drawn figure: file stem, heading, caption, the SVG document, its numbers with a header row.

    `draw` makes it anew with another `look`.
    """

    name: str
    title: str
    caption: str
    svg: str
    table: list[tuple[Any, ...]]
    draw: Callable[..., bytes] | None = None


def save_figures(folder: Path, figures: Sequence[Figure]) -> None:
    """Write `<name>.svg` and `<name>.csv` for each."""
    for figure in figures:
        with replacing(folder / f"{figure.name}.svg") as file:
            file.write(figure.svg)
        with replacing(folder / f"{figure.name}.csv") as file:
            csv.writer(file, lineterminator="\n").writerows(figure.table)


def save_for_print(folder: Path, figures: Sequence[Figure], width: float, font: float) -> None:
    """Write every figure as `<name>.pdf`, `.svg` and `.png`, so many inches wide and with text of so many points."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        if figure.draw is None:
            continue
        for form in FORMATS:
            (folder / f"{figure.name}.{form}").write_bytes(figure.draw(look=Look(width, font, form)))


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for every arm: grey for base, the palette in order for the others."""
    others = [arm for arm in arms if arm != "base"]
    colours = {arm: ARM_COLOURS[i % len(ARM_COLOURS)] for i, arm in enumerate(others)}
    return {arm: colours.get(arm, BASE_COLOUR) for arm in arms}


def line_styles(arms: Sequence[str]) -> dict[str, Any]:
    """A dash pattern for every arm, so that a line lying on another one hides it only in part."""
    return {arm: DASHES[i % len(DASHES)] for i, arm in enumerate(arms)}


def inline_svg(svg: str, colours: Mapping[str, str]) -> str:
    """The SVG element alone, in the page's CSS variables instead of colours, so that it follows the theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    names = {colour: f"var(--arm-{index})" for index, colour in enumerate(dict.fromkeys(colours.values()))}
    for colour, name in {INK: "var(--ink)", FAINT: "var(--rule)", **names}.items():
        svg = svg.replace(colour, name)
    return svg


Dot = tuple[str, str, Estimate]
"""Line, series, and what was measured."""


def dots_svg(
    panels: Mapping[str, Sequence[Dot]], colours: Mapping[str, str], scale: float = 1, look: Look = PAGE
) -> bytes:
    """Panels above one another, by the names of their horizontal axes; in each, dots with intervals on named lines.

    Args:
        colours: of the series, which stand below each other on a line.
        scale: of the numbers, 100 for rates as percentages.
    """
    lines = list(dict.fromkeys(line for dots in panels.values() for line, *_ in dots))
    series, step = list(colours), 0.7 / max(len(colours), 1)

    def draw(label: str, axes: "Axes") -> None:
        for line, name, estimate in panels[label]:
            y = lines.index(line) + (series.index(name) - (len(series) - 1) / 2) * step
            if estimate.low is not None and estimate.high is not None:
                ends = [scale * estimate.low, scale * estimate.high]
                axes.plot(ends, [y, y], color=colours[name], lw=1.6, solid_capstyle="butt")
            axes.plot([scale * (estimate.value or 0)], [y], "o", color=colours[name], ms=5.5)
        left, right = axes.get_xlim()
        if left < 0 < right:
            axes.axvline(0, color=INK, lw=0.8, zorder=0)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="x")

    height = 0.8 + max(0.42, 0.11 * len(series)) * len(lines)
    return panels_svg([partial(draw, label) for label in panels], colours, height, look=look)


def svg_of(draw: Callable[["Axes"], None], legend: Mapping[str, str], height: float = 3.0, look: Look = PAGE) -> bytes:
    """A document, the same bytes for the same numbers: an SVG unless `look` says otherwise.

    Args:
        legend: name -> colour; none if it is empty.
        height: inches at the width of `PAGE`, without the legend.
    """
    return panels_svg([draw], legend, height, look=look)


def panels_svg(
    draws: Sequence[Callable[["Axes"], None]],
    legend: Mapping[str, str],
    height: float,
    xlabel: str | None = None,
    look: Look = PAGE,
) -> bytes:
    """As `svg_of`, with panels of `height` inches each above one another; on one horizontal axis if it has a name."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    columns = min(len(legend), LEGEND_COLUMNS)
    above = 0.1 + 0.2 * -(-len(legend) // LEGEND_COLUMNS) if legend else 0
    style = {**STYLE, "font.size": look.font, "pdf.fonttype": 42}
    # The stubs know every setting by name; a plain dictionary does not.
    with mpl.rc_context(cast(Any, style)):
        tall = (height * len(draws)) * look.width / PAGE.width + above * look.font / PAGE.font
        canvas = Canvas(figsize=(look.width, tall), layout="constrained")
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
        buffer = io.BytesIO()
        undated = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None}}
        dpi: Any = PNG_DPI if look.format == "png" else "figure"
        metadata: Any = undated.get(look.format)
        canvas.savefig(buffer, format=look.format, transparent=look == PAGE, metadata=metadata, dpi=dpi)
    return buffer.getvalue()


def render(package: str, name: str, **values: Any) -> str:
    """A page; text in it is escaped.

    Args:
        package: where the template lies; what it includes may lie there or here.
        values: of its variables; one that the template asks for and that is not given is an error. `style.css`
            asks for `colours`: those that `inline_svg` was given, each once, in order.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loaders = [PackageLoader(each, "") for each in dict.fromkeys((package, TEMPLATES))]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name).render(**values)
