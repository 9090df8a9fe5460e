"""The report's figures: each as SVG, with the numbers it shows as CSV."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from esr_train.files import replacing
from eval.metrics import METRICS, Gap
from eval.store import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers; base is the neutral one.
BASE_COLOUR = "#6b7280"
ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#1f2328", "#d0d7de"


@dataclass(frozen=True)
class Material:
    """What figures are drawn from: the metrics, the trials of each arm, and the frozen thresholds."""

    metrics: Mapping[str, Any]
    rows_by_arm: Mapping[str, Sequence[Trial]]
    thresholds: Mapping[str, Any] | None

    def steered(self, arm: str) -> list[Trial]:
        """The arm's trials steered at the base model's thresholds."""
        return [row for row in self.rows_by_arm[arm] if row["condition"] == "steered"]


@dataclass(frozen=True)
class Figure:
    """A drawn figure: file stem, heading, caption, the SVG document, and its numbers with a header row."""

    name: str
    title: str
    caption: str
    svg: str
    table: list[tuple[Any, ...]]


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for every arm: grey for base, the palette in order for the others."""
    others = [arm for arm in arms if arm != "base"]
    colours = {arm: ARM_COLOURS[i % len(ARM_COLOURS)] for i, arm in enumerate(others)}
    return {arm: colours.get(arm, BASE_COLOUR) for arm in arms}


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


def inline_svg(svg: str, colours: Mapping[str, str]) -> str:
    """The SVG element alone, in the page's CSS variables instead of colours, so that it follows the theme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    names = {colour: f"var(--arm-{index})" for index, colour in enumerate(dict.fromkeys(colours.values()))}
    for colour, name in {INK: "var(--ink)", FAINT: "var(--rule)", **names}.items():
        svg = svg.replace(colour, name)
    return svg


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
        step = 0.7 / max(len(arms), 1)
        for condition, metric, arm, value, low, high, *_ in table[1:]:
            line = next(i for i, row in enumerate(shown) if row[:2] == (condition, metric))
            y = line + (arms.index(arm) - (len(arms) - 1) / 2) * step
            colour = arm_colours(arms)[arm]
            axes.plot([100 * low, 100 * high], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
            axes.plot([100 * value], [y], "o", color=colour, ms=5.5)
        axes.set_yticks(range(len(shown)), [row[2] for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("% of responses")
        axes.grid(axis="x")

    caption = "Share of valid responses, 95 % intervals clustered by latent (unsteered: by prompt)."
    svg = _svg(draw, arms, height=0.8 + 0.42 * len(shown))
    return Figure("rates", "What the responses do", caption, svg, table)


def first_scores(material: Material) -> Figure | None:
    """Density of first-attempt scores under steering."""
    return _score_density(
        material,
        "first_score",
        "How good the first attempt is",
        "Density of first-attempt scores under steering (Gaussian kernel, 4 points, folded at the ends).",
    )


def last_scores(material: Material) -> Figure | None:
    """Density of last-attempt scores under steering."""
    return _score_density(
        material,
        "last_score",
        "How good the last attempt is",
        "The same for the last attempt; a response without a restart has only one, its first.",
    )


def _score_density(material: Material, metric: str, title: str, caption: str) -> Figure | None:
    scores = {arm: _values(material.steered(arm), metric) for arm in material.rows_by_arm}
    scores = {arm: found for arm, found in scores.items() if len(found) >= 2}
    if not scores:
        return None
    grid = np.linspace(0, 100, 101)
    curves = {arm: _density(np.array(found), grid) for arm, found in scores.items()}

    def draw(axes: "Axes") -> None:
        for arm, curve in curves.items():
            colour = arm_colours(list(material.rows_by_arm))[arm]
            axes.fill_between(grid, 100 * curve, color=colour, alpha=0.13, lw=0)
            axes.plot(grid, 100 * curve, color=colour, lw=1.6)
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("score, 0-100")
        axes.set_ylabel("% of responses per point")

    rows = zip(grid.tolist(), *(curve.tolist() for curve in curves.values()), strict=True)
    svg = _svg(draw, list(material.rows_by_arm))
    return Figure(f"{metric}s", title, caption, svg, [("score", *curves), *rows])


def first_against_last(material: Material) -> Figure | None:
    """First against last score of responses with several attempts."""
    points = [
        (arm, METRICS["first_score"].of(row), METRICS["last_score"].of(row), row["key"])
        for arm in material.rows_by_arm
        for row in material.steered(arm)
        if not isinstance(METRICS["improvement"].of(row), Gap)
    ]
    if not points:
        return None

    def draw(axes: "Axes") -> None:
        axes.plot([0, 100], [0, 100], color=FAINT, lw=1, zorder=0)
        for arm, colour in arm_colours(list(material.rows_by_arm)).items():
            own = [(first, last) for name, first, last, _ in points if name == arm]
            if own:
                axes.plot(*zip(*own, strict=True), "o", color=colour, ms=4, alpha=0.45, mew=0)
        axes.set_xlim(-3, 103)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("first attempt's score")
        axes.set_ylabel("last attempt's score")
        axes.grid()

    caption = "Steered responses with several attempts; above the line the last is better than the first."
    svg = _svg(draw, list(material.rows_by_arm))
    return Figure(
        "first_vs_last", "What a restart is worth", caption, svg, [("arm", "first", "last", "key"), *points]
    )


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
    end = max(row["tokens"] for arm in material.rows_by_arm for row in material.steered(arm))

    def draw(axes: "Axes") -> None:
        for arm, colour in arm_colours(list(material.rows_by_arm)).items():
            own = [(tokens, 100 * share) for name, tokens, share in table[1:] if name == arm]
            if material.steered(arm):
                steps = [(0, 0), *own, (end, own[-1][1] if own else 0)]
                axes.step(*zip(*steps, strict=True), where="post", color=colour, lw=1.6)
        axes.set_xlim(0, end)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens into the response")
        axes.set_ylabel("% restarted by then")
        axes.grid(axis="y")

    caption = "Cumulative share of steered responses whose second attempt has begun; the place is estimated "
    caption += "from its characters."
    svg = _svg(draw, list(material.rows_by_arm))
    return Figure("restart_position", "When it turns back", caption, svg, table)


def thresholds(material: Material) -> Figure | None:
    """The strength at which each latent was used, sorted."""
    strengths = _strengths(material)
    if not strengths:
        return None
    table = sorted(
        ((norm, latent, label) for latent, (norm, label) in strengths.items()), key=lambda row: row[0]
    )

    def draw(axes: "Axes") -> None:
        axes.plot(
            range(1, len(table) + 1), [row[0] for row in table], "o", color=INK, ms=3.5, alpha=0.75, mew=0
        )
        axes.set_xlabel("latent, sorted")
        axes.set_ylabel("strength / residual norm")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")

    caption = "Strength per latent, in multiples of the layer's median residual norm."
    rows = [(latent, label, norm) for norm, latent, label in table]
    return Figure(
        "thresholds", "How hard it is pushed", caption, _svg(draw, []), [("latent", "label", "norm"), *rows]
    )


FIGURES: tuple[Callable[[Material], Figure | None], ...] = (
    rates,
    first_scores,
    last_scores,
    first_against_last,
    restart_positions,
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


def _strengths(material: Material) -> dict[Any, tuple[float, str | None]]:
    """Per latent its norm strength and label: from the threshold file, else as the steered trials had it."""
    latents = (material.thresholds or {}).get("latents", [])
    entries = latents.values() if isinstance(latents, Mapping) else latents
    known = [entry for entry in entries if isinstance(entry, Mapping) and entry.get("strength")]
    cells = known or [row["cell"] for arm in material.rows_by_arm for row in material.steered(arm)]
    return {
        cell["latent"]: (float(cell["strength"]["norm"]), cell.get("label"))
        for cell in cells
        if cell.get("strength") and cell.get("latent") is not None
    }


def _svg(draw: Callable[["Axes"], None], arms: Sequence[str], height: float = 3.0) -> str:
    """An SVG document, the same bytes for the same numbers; text stays text, in the page's font."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    # The stubs know every setting by name; a plain dictionary does not.
    with mpl.rc_context(cast(Any, STYLE)):
        canvas = Canvas(figsize=(4.9, height + (0.3 if arms else 0)), layout="constrained")
        axes = canvas.subplots()
        draw(axes)
        if arms:
            marks = [Line2D([], [], marker="o", ls="", ms=5, color=c) for c in arm_colours(arms).values()]
            canvas.legend(
                marks, list(arms), loc="outside upper left", ncols=min(len(arms), 4), handletextpad=0.1
            )
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


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
