"""Figures that set arms, or judges, beside each other: bars of prompt variants and ablations, heat maps of judges."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Any

from eval.report.drawing import ARM_COLOURS, INK, svg_of
from eval.report.material import NUMBERS, Figure, Material

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = (("multi_attempt_rate", "second attempt"), ("esr_rate", "ESR"))


def prompt_variants(material: Material) -> Figure | None:
    """Arms with words of their own around the prompt, beside those without."""
    caption = "Steered responses of arms whose prompts carry an instruction, beside arms without one."
    return _bars(material, "prompt_variants", "Prompt variants", ("prompt",), caption)


def ablations(material: Material) -> Figure | None:
    """Arms with latents set to zero or clamped, beside those without."""
    caption = "Steered responses of arms in which latents are ablated or clamped, beside arms in which none is."
    return _bars(material, "ablations", "Changed latents", ("ablate", "clamp"), caption)


def _bars(material: Material, name: str, title: str, changes: Sequence[str], caption: str) -> Figure | None:
    variants = {arm: _variant(material, arm) for arm in material.rows_by_arm}
    changed = [arm for arm, found in variants.items() if any(found.get(key) for key in changes)]
    if not changed:
        return None
    arms = [arm for arm, found in variants.items() if arm in changed or not any(found.values())]
    table: list[tuple[Any, ...]] = [("arm", *changes, "metric", *NUMBERS)]
    for arm, (metric, _) in product(arms, BARS):
        if found := material.estimate(arm, "steered", metric):
            described = [variants[arm].get(key) or "" for key in changes]
            table.append((arm, *described, metric, *(found[key] for key in NUMBERS)))
    if len(table) == 1:
        return None
    colours = dict(zip((metric for metric, _ in BARS), ARM_COLOURS, strict=False))

    def draw(axes: "Axes") -> None:
        for arm, *_, metric, value, low, high, _, _ in table[1:]:
            y = arms.index(arm) + (-0.19 if metric == BARS[0][0] else 0.19)
            axes.barh(y, 100 * value, height=0.34, color=colours[metric], alpha=0.75, lw=0)
            if low is not None:
                axes.plot([100 * low, 100 * high], [y, y], color=INK, lw=1.2, solid_capstyle="butt")
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("% of responses")
        axes.grid(axis="x")

    caption += " 95 % intervals clustered by latent. "
    caption += " ".join(f"{arm}: {_said(variants[arm], changes)};" for arm in changed).removesuffix(";") + "."
    legend = {label: colours[metric] for metric, label in BARS}
    return Figure(name, title, caption, svg_of(draw, legend, height=0.7 + 0.42 * len(arms)), table)


def _said(variant: dict[str, Any], changes: Sequence[str]) -> str:
    """What an arm changes, in words."""
    parts = []
    if "prompt" in changes and variant.get("prompt"):
        parts.append(f"“{' '.join(variant['prompt'].split()).rstrip('.')}”")
    if "ablate" in changes and variant.get("ablate"):
        parts.append(f"ablates {', '.join(map(str, variant['ablate']))}")
    if "clamp" in changes and variant.get("clamp"):
        parts.append("clamps " + ", ".join(f"{latent} to {value:g}" for latent, value in variant["clamp"].items()))
    return "; ".join(parts)


def _variant(material: Material, arm: str) -> dict[str, Any]:
    variant = next((row.variant for row in material.rows_by_arm[arm] if row.variant), None)
    return {} if variant is None else {**asdict(variant), "ablate": list(variant.ablate or ())}


def judge_rates(material: Material) -> Figure | None:
    """How often each judge finds a second attempt in the same responses."""
    if material.agreement is None:
        return None
    rates, judges = material.agreement["rates"], list(material.agreement["judges"])
    cells: dict[tuple[str, str], dict[str, Any]] = {
        (arm, judge): found
        for judge, arm in product(judges, material.metrics["arms"])
        if (found := rates[judge]["arms"].get(arm, {}).get("steered", {}).get("multi_attempt_rate")) and found["n"]
    }
    if not cells:
        return None
    table = [("arm", "judge", *NUMBERS), *((*key, *(found[name] for name in NUMBERS)) for key, found in cells.items())]
    arms = [arm for arm in material.metrics["arms"] if any(key[0] == arm for key in cells)]
    values = {key: 100 * found["value"] for key, found in cells.items()}
    svg = _heatmap(values, arms, judges, 100.0, "{:.1f}")
    caption = "% of the same steered responses in which each judge finds a second attempt."
    return Figure("judge_rates", "Second attempts by judge", caption + _key(judges), svg, table)


def judge_agreement(material: Material) -> Figure | None:
    """How far each two judges agree: on scores below the diagonal, on second attempts above it."""
    if material.agreement is None or not material.agreement["pairs"]:
        return None
    judges = list(material.agreement["judges"])
    cells: dict[tuple[str, str], float] = {}
    table: list[tuple[Any, ...]] = [("judge", "other", "alpha_last_score", "n_scores", "kappa_second_attempt", "n")]
    for pair in material.agreement["pairs"]:
        one, other = pair["judges"]
        score, event = pair["scores"]["last_score"], pair["events"]["multi_attempt_rate"]
        table.append((one, other, score["alpha"], score["n"], event["kappa"], event["n"]))
        found = {(other, one): score["alpha"], (one, other): event["kappa"]}
        cells |= {key: value for key, value in found.items() if value is not None}
    if not cells:
        return None
    caption = "Below the diagonal: Krippendorff's α of last scores; above it: Cohen's κ of second attempts. "
    caption += "An empty cell is undefined: nothing varies." + _key(judges)
    svg = _heatmap(cells, judges, judges, 1.0, "{:.2f}")
    return Figure("judge_agreement", "Agreement between judges", caption, svg, table)


def _key(judges: Sequence[str]) -> str:
    return " " + "; ".join(f"J{number}: {judge}" for number, judge in enumerate(judges, start=1)) + "."


def _heatmap(
    cells: dict[tuple[str, str], float], rows: Sequence[str], judges: Sequence[str], most: float, form: str
) -> str:
    """A heat map with its numbers in it; judges' names are long, so they stand as J1, J2, … and in the caption."""
    short = {judge: f"J{number}" for number, judge in enumerate(judges, start=1)}
    strongest = max(cells.values()) if most > 1 else most

    def draw(axes: "Axes") -> None:
        from matplotlib.patches import Rectangle

        for (row, judge), value in cells.items():
            x, y = list(judges).index(judge), list(rows).index(row)
            shade = 0.65 * min(max(value / strongest, 0.0), 1.0) if strongest > 0 else 0.0
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=ARM_COLOURS[0], alpha=shade, lw=0))
            axes.text(x, y, form.format(value), ha="center", va="center", color=INK)
        axes.set_xlim(-0.5, len(judges) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(judges)), list(short.values()))
        axes.set_yticks(range(len(rows)), [short.get(row, row) for row in rows])
        axes.tick_params(length=0)

    return svg_of(draw, {}, height=0.6 + 0.4 * len(rows))
