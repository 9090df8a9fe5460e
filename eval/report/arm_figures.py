"""Figures that set arms, strengths, mixtures or judges beside each other; and the strengths of all latents."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING, Any

from eval.metrics import METRICS
from eval.report.drawing import (
    ARM_COLOURS,
    FAINT,
    INK,
    arm_colours,
    dots_height,
    draw_dots,
    line_styles,
    panels_svg,
    svg_of,
)
from eval.report.figures import NUMBERS, Drawn, Material, figure
from eval.statistics import Estimate
from eval.store import TrialVariant
from eval.summary import STEERED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_HEIGHT = 1.5
MOST_TICKS = 9
BOOST = re.compile(r"boost_x(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
"""The name of a boosted condition, with the multiple of the threshold."""
BOOST_PANELS = {"first_score": "first score", "multi_attempt_rate": "% second attempt", "esr_rate": "% ESR"}
MIXTURE_PANELS = (
    ("steered", "multi_attempt_rate", "% second attempt"),
    ("steered", "esr_rate", "% ESR"),
    ("unsteered", "restart_rate", "% restart, unsteered"),
)
VARIANT_RATES = {"multi_attempt_rate": "second attempt", "esr_rate": "ESR", "worsening_rate": "worse"}
LatentStrength = tuple[int, str | None, float, float | None, float | None]
"""Latent, its label, the strength in `norm` units, and the ends of its interval."""
Point = tuple[str, float, str, Estimate]
"""Line, position, metric, and its estimate."""


@figure("boost_sweep", "Boost sweep: multiples of the threshold")
def boosts(material: Material) -> Drawn | None:
    """What multiples of the threshold do."""
    arms = material.summary.arms
    multiples = {each: float(match[1]) for each in material.summary.conditions if (match := BOOST.fullmatch(each))}
    if not multiples:
        return None
    multiples[STEERED] = 1.0
    points = [
        (arm, multiples[condition], metric, estimate)
        for arm, conditions in arms.items()
        if any(BOOST.fullmatch(each) for each in conditions)
        for condition in sorted(multiples, key=lambda each: multiples[each])
        for metric in BOOST_PANELS
        if (estimate := material.estimate(arm, condition, metric))
    ]
    caption = "The same cells at other strengths; the base model's threshold is marked. "
    caption += "95 % intervals clustered by latent."
    return _sweep(caption, points, BOOST_PANELS, "strength / threshold", list(arms), mark=1.0)


@figure("mixture_sweep", "Mixture sweep")
def mixtures(material: Material) -> Drawn | None:
    """What the share of self-correction rows does; base stands at 0 %."""
    base = {"base": 0.0} if "base" in material.summary.arms else {}
    points = [
        (sweep, round(100 * share, 6), metric, estimate)
        for sweep, arms in material.mixtures.items()
        for arm, share in sorted({**base, **arms}.items(), key=lambda each: each[1])
        for condition, metric, _ in MIXTURE_PANELS
        if (estimate := material.estimate(arm, condition, metric))
    ]
    if not points:
        return None
    caption = "Arms trained alike but for the mixture; 0 % is the base model, which is not trained. 95 % intervals "
    caption += "clustered by latent (unsteered: by prompt)."
    panels = {metric: label for _, metric, label in MIXTURE_PANELS}
    return _sweep(caption, points, panels, "% self-correction rows in the mixture", list(material.mixtures))


def _sweep(
    caption: str,
    points: Sequence[Point],
    panels: Mapping[str, str],
    label: str,
    lines: Sequence[str],
    mark: float | None = None,
) -> Drawn:
    """A panel for each metric above one another, a line for each arm or sweep."""
    positions = sorted({position for _, position, *_ in points})
    draws = [
        _panel([each for each in points if each[2] == metric], title, lines, positions, mark)
        for metric, title in panels.items()
    ]
    drawn, colours = {name for name, *_ in points}, arm_colours(lines)
    legend = {line: colours[line] for line in lines if line in drawn}
    table = [(*point[:3], *astuple(point[3])) for point in points]
    svg = panels_svg(draws, legend, PANEL_HEIGHT, xlabel=label)
    return Drawn(caption, svg, [("line", label, "metric", *NUMBERS), *table])


def _panel(
    points: Sequence[Point], title: str, lines: Sequence[str], positions: Sequence[float], mark: float | None
) -> Callable[["Axes"], None]:
    """What draws one metric's points, those of a line joined."""
    colours, styles = arm_colours(lines), line_styles(lines)

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        if mark is not None:
            axes.axvline(mark, color=FAINT, lw=1, zorder=0)
        for line in lines:
            own = [(at, found, 100 if METRICS[name].is_rate else 1) for each, at, name, found in points if each == line]
            values = [scale * (found.value or 0) for _, found, scale in own]
            axes.plot([at for at, *_ in own], values, "o", ms=4, lw=1.4, color=colours[line], ls=styles[line])
            for at, found, scale in own:
                if found.low is not None and found.high is not None:
                    ends = [scale * found.low, scale * found.high]
                    axes.plot([at, at], ends, color=colours[line], lw=1.2, solid_capstyle="butt")
        # A little room below 0, so that a line of zeros is seen.
        axes.set_ylim(-0.04 * axes.get_ylim()[1], axes.get_ylim()[1])
        if len(positions) <= MOST_TICKS:
            axes.set_xticks(positions, [f"{position:g}".replace("-", "−") for position in positions])
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.grid(axis="y")

    return draw


@figure("prompt_variants", "Prompt variants")
def prompt_variants(material: Material) -> Drawn | None:
    """Arms with words of their own around the prompt, beside those without."""
    caption = "Steered responses of arms whose prompts carry an instruction, beside arms without one."
    return _variants(material, ("prompt",), caption)


@figure("ablations", "Changed latents")
def ablations(material: Material) -> Drawn | None:
    """Arms with latents set to zero or clamped, beside those without."""
    caption = "Steered responses of arms in which latents are ablated or clamped, beside arms in which none is."
    return _variants(material, ("ablate", "clamp"), caption)


def _variants(material: Material, changes: Sequence[str], caption: str) -> Drawn | None:
    variants = {
        arm: asdict(next((row.variant for row in rows if row.variant), TrialVariant(None)))
        for arm, rows in material.rows_by_arm.items()
    }
    changed = [arm for arm, found in variants.items() if any(found[key] for key in changes)]
    if not changed:
        return None
    found = [
        (arm, metric, estimate)
        for arm, variant in variants.items()
        if arm in changed or not any(variant.values())
        for metric in VARIANT_RATES
        if (estimate := material.estimate(arm, STEERED, metric))
    ]
    if not found:
        return None
    lines = list(dict.fromkeys(arm for arm, *_ in found))
    colours = dict(zip(VARIANT_RATES.values(), ARM_COLOURS, strict=False))

    def draw(axes: "Axes") -> None:
        dots = [(arm, VARIANT_RATES[metric], estimate) for arm, metric, estimate in found]
        draw_dots(axes, dots, lines, colours, 100)
        axes.set_xlim(left=0)
        axes.set_xlabel("% of responses")

    caption += " 95 % intervals clustered by latent. "
    caption += "; ".join(f"{arm}: {_in_words(variants[arm], changes)}" for arm in changed) + "."
    table = [
        (arm, *(_plain(variants[arm][key]) for key in changes), metric, *astuple(estimate))
        for arm, metric, estimate in found
    ]
    svg = svg_of(draw, colours, height=0.7 + dots_height(lines, list(colours)))
    return Drawn(caption, svg, [("arm", *changes, "metric", *NUMBERS), *table])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) and value else value or ""


def _in_words(variant: Mapping[str, Any], changes: Sequence[str]) -> str:
    """What an arm changes."""
    parts = []
    if "prompt" in changes and variant["prompt"]:
        parts.append(f"“{' '.join(variant['prompt'].split()).rstrip('.')}”")
    if "ablate" in changes and variant["ablate"]:
        parts.append(f"ablates {', '.join(map(str, variant['ablate']))}")
    if "clamp" in changes and variant["clamp"]:
        parts.append("clamps " + ", ".join(f"{latent} to {value:g}" for latent, value in variant["clamp"].items()))
    return "; ".join(parts)


@figure("judge_rates", "Second attempts by judge")
def judge_rates(material: Material) -> Drawn | None:
    """How often each judge finds a second attempt in the same responses."""
    if material.agreement is None:
        return None
    judges, arms = material.agreement.judges, list(material.summary.arms)
    cells = {
        (arm, judge): found
        for judge in judges
        for arm in arms
        if (rates := material.agreement.rates[judge].arms.get(arm, {}).get(STEERED))
        and (found := rates["multi_attempt_rate"]).value is not None
    }
    if not cells:
        return None
    values = {key: 100 * (found.value or 0) for key, found in cells.items()}
    svg = _heatmap(values, [arm for arm in arms if any(arm == key[0] for key in cells)], judges, "{:.1f}")
    caption = "% of the same steered responses in which each judge finds a second attempt." + _key(judges)
    table = [(*key, *astuple(found)) for key, found in cells.items()]
    return Drawn(caption, svg, [("arm", "judge", *NUMBERS), *table])


@figure("judge_agreement", "Agreement between judges")
def judge_agreement(material: Material) -> Drawn | None:
    """How far each two judges agree: on scores below the diagonal, on second attempts above it."""
    cells: dict[tuple[str, str], float] = {}
    table: list[tuple[Any, ...]] = [("judge", "other", "alpha_last_score", "n_scores", "kappa_second_attempt", "n")]
    for pair in material.agreement.pairs if material.agreement else ():
        one, other = pair.judges
        score, event = pair.scores["last_score"], pair.events["multi_attempt_rate"]
        table.append((one, other, score.alpha, score.n, event.kappa, event.n))
        found = {(other, one): score.alpha, (one, other): event.kappa}
        cells |= {key: value for key, value in found.items() if value is not None}
    if not cells or material.agreement is None:
        return None
    judges = material.agreement.judges
    caption = "Below the diagonal: Krippendorff's α of last scores; above it: Cohen's κ of second attempts. "
    caption += "An empty cell is undefined: nothing varies." + _key(judges)
    return Drawn(caption, _heatmap(cells, judges, judges, "{:.2f}", most=1.0), table)


def _key(judges: Sequence[str]) -> str:
    return " " + "; ".join(f"J{number}: {judge}" for number, judge in enumerate(judges, start=1)) + "."


def _heatmap(
    cells: Mapping[tuple[str, str], float],
    rows: Sequence[str],
    judges: Sequence[str],
    form: str,
    most: float | None = None,
) -> str:
    """A heat map with its numbers in it; judges' names are long, so they stand as J1, J2, … and in the caption."""
    short = {judge: f"J{number}" for number, judge in enumerate(judges, start=1)}
    strongest = max(cells.values()) if most is None else most

    def draw(axes: "Axes") -> None:
        from matplotlib.patches import Rectangle

        for (row, judge), value in cells.items():
            x, y = judges.index(judge), rows.index(row)
            shade = 0.65 * min(max(value / strongest, 0.0), 1.0) if strongest > 0 else 0.0
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=ARM_COLOURS[0], alpha=shade, lw=0))
            axes.text(x, y, form.format(value), ha="center", va="center", color=INK)
        axes.set_xlim(-0.5, len(judges) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(judges)), list(short.values()))
        axes.set_yticks(range(len(rows)), [short.get(row, row) for row in rows])
        axes.tick_params(length=0)

    return svg_of(draw, {}, height=0.6 + 0.4 * len(rows))


@figure("thresholds", "Strength of every latent")
def thresholds(material: Material) -> Drawn | None:
    """The strength at which each latent is used, sorted, with its posterior interval where it is known."""
    kept = [each for each in material.thresholds if not each.bound]
    rows: list[LatentStrength] = [(each.latent, each.label, each.norm, each.low, each.high) for each in kept]
    found = sorted(rows if material.thresholds else _used_strengths(material), key=lambda row: row[2])
    if not found:
        return None

    def draw(axes: "Axes") -> None:
        for position, (_, _, norm, low, high) in enumerate(found, start=1):
            if low is not None and high is not None:
                axes.plot([position, position], [low, high], color=FAINT, lw=1.6, solid_capstyle="butt")
            axes.plot([position], [norm], "o", color=INK, ms=3.5, mew=0)
        axes.set_xlabel("latent, sorted")
        axes.set_ylabel("strength / residual norm")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")

    caption = "Strength per latent, in multiples of the layer's median residual norm"
    caption += ", with 90 % posterior intervals." if kept else "."
    if left_out := len(material.thresholds) - len(kept):
        caption += f" Left out because the threshold lies at a bound: {left_out}."
    return Drawn(caption, svg_of(draw, {}), [("latent", "label", "norm", "low", "high"), *found])


def _used_strengths(material: Material) -> list[LatentStrength]:
    """Per latent the strength its steered trials had, without an interval."""
    cells = [row.cell for arm in material.rows_by_arm for row in material.steered(arm)]
    found: dict[int, LatentStrength] = {
        cell.latent: (cell.latent, cell.label, cell.strength.norm, None, None)
        for cell in cells
        if cell.latent is not None and cell.strength and cell.strength.norm is not None
    }
    return list(found.values())
