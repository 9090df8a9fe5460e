"""Figures that set arms, strengths, mixtures or judges beside each other."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from eval.metrics import METRICS, Gap
from eval.report.drawing import ARM_COLOURS, BASE_COLOUR, FAINT, INK, arm_colours, dots_svg, line_styles, panels_svg
from eval.report.figures import WIDEST, Drawn, Material, estimates_table, figure, scaled
from eval.statistics import Estimate
from eval.store import Trial, TrialVariant
from eval.summary import STEERED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_HEIGHT = 1.5
MOST_TICKS = 9
BOOST = re.compile(r"boost_x(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
"""The name of a boosted condition, with the multiple of the threshold."""
BOOST_PANELS = {
    "first_score": "first score",
    "last_score": "last score",
    "multi_attempt_rate": "% second attempt",
    "esr_rate": "% ESR",
    "success_rate": "% of second attempts that improve",
}
MIXTURE_PANELS = {
    "multi_attempt_rate": "% second attempt",
    "esr_rate": "% ESR",
    "restart_rate": "% restart, unsteered",
}
VARIANT_RATES = {"multi_attempt_rate": "second attempt", "esr_rate": "ESR", "worsening_rate": "worse"}
Point = tuple[str, float, str, Estimate]
"""Line, position, metric, and its estimate."""


@figure("boost_sweep", "Boost sweep: multiples of the threshold")
def boosts(material: Material) -> Drawn:
    """What multiples of the threshold do."""
    arms = material.summary.arms
    multiples = {name: float(match[1]) for name in material.summary.conditions if (match := BOOST.fullmatch(name))}
    boosted = [arm for arm, conditions in arms.items() if multiples.keys() & conditions.keys()]
    points = [
        (arm, multiple, metric, estimate)
        for arm in boosted
        for condition, multiple in sorted({**multiples, STEERED: 1.0}.items(), key=itemgetter(1))
        for metric in BOOST_PANELS
        if (estimate := material.estimate(arm, condition, metric))
    ]
    caption = "The same cells at other strengths; the base model's threshold is marked. "
    caption += "95 % intervals clustered by direction."
    return sweep(caption, points, BOOST_PANELS, "strength / threshold", list(arms), mark=1.0)


@figure("mixture_sweep", "Mixture sweep")
def mixtures(material: Material) -> Drawn:
    """What the share of self-correction rows does; base stands at 0 %."""
    base = {"base": 0.0} if "base" in material.summary.arms else {}
    points = [
        (sweep, round(100 * share, 6), metric, estimate)
        for sweep, arms in material.mixtures.items()
        for arm, share in sorted({**base, **arms}.items(), key=itemgetter(1))
        for metric in MIXTURE_PANELS
        if (estimate := material.estimate(arm, "unsteered" if metric == "restart_rate" else STEERED, metric))
    ]
    caption = "Arms trained alike but for the mixture; 0 % is the base model, which is not trained. 95 % intervals "
    caption += "clustered by direction (unsteered: by prompt)."
    return sweep(caption, points, MIXTURE_PANELS, "% self-correction rows in the mixture", list(material.mixtures))


def sweep(
    caption: str,
    points: Sequence[Point],
    panels: Mapping[str, str],
    label: str,
    lines: Sequence[str],
    mark: float | None = None,
) -> Drawn:
    """A panel for each metric above one another, a line for each arm or sweep."""
    positions = sorted({position for _, position, *_ in points})
    ticks = positions if len(positions) <= MOST_TICKS else None

    def panel(metric: str, axes: "Axes") -> None:
        if mark is not None:
            axes.axvline(mark, color=FAINT, lw=1, zorder=0)
        _draw_lines(axes, [point for point in points if point[2] == metric], lines)
        if ticks:
            axes.set_xticks(ticks, [f"{position:g}" for position in ticks])
        axes.set_title(panels[metric], loc="left", fontsize=9, color=INK)

    drawn, colours = {name for name, *_ in points}, arm_colours(lines)
    legend = {line: colours[line] for line in lines if line in drawn}
    svg = partial(panels_svg, [partial(panel, metric) for metric in panels], legend, PANEL_HEIGHT, xlabel=label)
    return Drawn(caption, svg, estimates_table(("line", label, "metric"), points))


def _draw_lines(axes: "Axes", points: Sequence[Point], lines: Sequence[str]) -> None:
    """One metric's estimates with their intervals, those of a line joined."""
    from matplotlib.ticker import MaxNLocator

    colours, styles = arm_colours(lines), line_styles(lines)
    for line in lines:
        own = [
            (at, 100 if METRICS[metric].is_rate else 1, number) for name, at, metric, number in points if name == line
        ]
        values = [scale * (number.value or 0) for _, scale, number in own]
        axes.plot([at for at, *_ in own], values, "o", ms=4, lw=1.4, color=colours[line], ls=styles[line])
        for at, scale, number in own:
            if number.low is not None and number.high is not None:
                ends = [scale * number.low, scale * number.high]
                axes.plot([at, at], ends, color=colours[line], lw=1.2, solid_capstyle="butt")
    # A little room below 0, so that a line of zeros is seen.
    axes.set_ylim(-0.04 * axes.get_ylim()[1], axes.get_ylim()[1])
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")


def _variants(changes: Sequence[str], caption: str, material: Material) -> Drawn:
    """Arms that change something in the prompt, or in latents, beside those that change nothing."""
    variants = {
        arm: asdict(next((row.variant for row in rows if row.variant), TrialVariant(None)))
        for arm, rows in material.rows_by_arm.items()
    }
    changed = [arm for arm, variant in variants.items() if any(variant[key] for key in changes)]
    rows = [
        (arm, *(_cell(variant[key]) for key in changes), metric, estimate)
        for arm, variant in variants.items()
        if arm in changed or not any(variant.values())
        for metric in VARIANT_RATES
        if changed and (estimate := material.estimate(arm, STEERED, metric))
    ]
    words = [f"{arm}: " + "; ".join(_in_words(key, variants[arm][key]) for key in changes) for arm in changed]
    caption += " 95 % intervals clustered by direction. " + "; ".join(text.strip("; ") for text in words) + "."
    dots = [(row[0], VARIANT_RATES[row[-2]], row[-1]) for row in rows]
    colours = dict(zip(VARIANT_RATES.values(), ARM_COLOURS, strict=False))
    svg = partial(dots_svg, {"% of responses": dots}, colours, 100)
    return Drawn(caption, svg, estimates_table(("arm", *changes, "metric"), rows))


def _cell(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) and value else value or ""


def _in_words(change: str, value: Any) -> str:
    """What an arm changes."""
    if not value:
        return ""
    if change == "prompt":
        return f"“{' '.join(value.split()).rstrip('.')}”"
    if change == "monitor":
        return f"where it sounds: {value}"
    if change == "ablate":
        return f"ablates {', '.join(map(str, value))}"
    if change == "amplify":
        return "amplifies " + ", ".join(f"{latent} by {factor:g}" for latent, factor in value.items())
    return "clamps " + ", ".join(f"{latent} to {level:g}" for latent, level in value.items())


PROMPTS = "Steered responses of arms whose prompts carry an instruction, beside arms without one."
RESISTANCE = "resistance"
INTERVAL = "value and 95 % interval"
EDITS = ("ablate", "clamp", "amplify")
EDIT_PANELS = {
    (STEERED, "first_score"): "first score, steered",
    (STEERED, "multi_attempt_rate"): "% second attempt",
    (STEERED, "esr_after_shown_detour"): "% ESR, given a bad first attempt",
    (STEERED, "esr_rate"): "% ESR, of all",
    ("unsteered", "first_score"): "first score, unsteered: damage",
    ("unsteered", "restart_rate"): "% restart, unsteered",
    ("steered_recalibrated", RESISTANCE): "own threshold / base model's",
}
LATENTS = (
    "Arms in which latents are changed, beside arms in which none is. ESR can rise because an edit makes first "
    "attempts worse, so it stands beside the first score and what the edit does when nobody steers. 95 % intervals "
    "clustered by direction (unsteered: by prompt)."
)
WATCHED = "Steered responses of arms that a monitor follows, beside arms without one."
figure("prompt_variants", "Prompt variants")(partial(_variants, ("prompt",), PROMPTS))


BARS = {"better (ESR)": ARM_COLOURS[2], "neither": BASE_COLOUR, "worse": ARM_COLOURS[1]}
"""What a bar of second attempts is divided into."""


SECONDS = ("multi_attempt_rate", "esr_rate", "worsening_rate")
FALSE = ("unsteered", "restart_rate")


@figure("prompting_and_tuning", "Prompting against fine-tuning")
def prompting_and_tuning(material: Material) -> Drawn | None:
    """Second attempts of prompted and of tuned arms, divided by what became of them; what each does unsteered."""
    variants = {arm: _variant(rows) for arm, rows in material.rows_by_arm.items()}
    keys = [*((STEERED, name) for name in SECONDS), FALSE]
    found = {
        arm: {key: each for key in keys if (each := material.estimate(arm, *key))}
        for arm, variant in variants.items()
        if not (variant.monitor or any(getattr(variant, key) for key in EDITS))
    }
    found = {arm: each for arm, each in found.items() if len(each) - (FALSE in each) == len(SECONDS)}
    prompted = {arm for arm in found if variants[arm].prompt}
    if not prompted or not found.keys() - prompted - {"base"}:
        return None
    lines = {f"{arm} (prompt)" if arm in prompted else arm: found[arm] for arm in found}
    draws = [partial(_draw_seconds, lines)]
    if measured := any(FALSE in each for each in found.values()):
        draws.append(partial(_draw_false, lines))
    caption = (
        "How often an arm begins again under steering, and what became of it: the last attempt scores better than "
    )
    caption += "the first, worse, or the same" + (
        "; below, how often it restarts when nobody steers" if measured else ""
    )
    caption += ". 95 % intervals clustered by direction (unsteered: by prompt)."
    table = [(arm, arm in prompted, *key, each) for arm, measures in found.items() for key, each in measures.items()]
    svg = partial(panels_svg, draws, BARS, 0.7 + 0.3 * len(lines))
    return Drawn(caption, svg, estimates_table(("arm", "prompted", "condition", "metric"), table))


Measures = Mapping[tuple[str, str], Estimate]
"""(condition, metric) -> its estimate."""


def _draw_seconds(lines: Mapping[str, Measures], axes: "Axes") -> None:
    for y, measures in enumerate(lines.values()):
        whole, better, worse = (measures[STEERED, name].value or 0 for name in SECONDS)
        left = 0.0
        for colour, share in zip(BARS.values(), (better, max(whole - better - worse, 0), worse), strict=True):
            axes.barh([y], [100 * share], 0.6, 100 * left, color=colour)
            left += share
        _draw_interval(axes, y, measures[STEERED, SECONDS[0]])
    _name_lines(axes, list(lines), "% second attempt, steered")


def _draw_false(lines: Mapping[str, Measures], axes: "Axes") -> None:
    for y, measures in enumerate(lines.values()):
        if restarts := measures.get(FALSE):
            axes.barh([y], [100 * (restarts.value or 0)], 0.6, color=FAINT)
            _draw_interval(axes, y, restarts)
    _name_lines(axes, list(lines), "% restart, unsteered")


def _draw_interval(axes: "Axes", y: int, estimate: Estimate) -> None:
    if estimate.low is not None and estimate.high is not None:
        axes.plot([100 * estimate.low, 100 * estimate.high], [y, y], color=INK, lw=1.2, solid_capstyle="butt")


def _name_lines(axes: "Axes", names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.grid(axis="x")


@figure("ablations", "Changed latents")
def ablations(material: Material) -> Drawn:
    """Arms whose latents are changed, never by ESR alone: an edit that only does harm can raise it."""
    variants = {arm: _variant(rows) for arm, rows in material.rows_by_arm.items()}
    changed = [arm for arm, variant in variants.items() if any(getattr(variant, key) for key in EDITS)]
    shown = [arm for arm, variant in variants.items() if arm in changed or not (variant.prompt or variant.monitor)]
    rows = [
        (arm, *(_cell(getattr(variants[arm], key)) for key in EDITS), condition, metric, estimate)
        for arm in shown
        for condition, metric in EDIT_PANELS
        if changed and (estimate := _beside_esr(material, arm, condition, metric))
    ]
    panels = {
        label: [(row[0], INTERVAL, scaled(row[-1], key[1])) for row in rows if row[-3:-1] == key]
        for key, label in EDIT_PANELS.items()
    }
    words = [f"{arm}: " + "; ".join(_in_words(key, getattr(variants[arm], key)) for key in EDITS) for arm in changed]
    caption = f"{LATENTS} " + "; ".join(text.strip("; ") for text in words) + "."
    svg = partial(dots_svg, {label: dots for label, dots in panels.items() if dots}, {INTERVAL: ARM_COLOURS[0]})
    return Drawn(caption, svg, estimates_table(("arm", *EDITS, "condition", "metric"), rows))


def _variant(rows: Sequence[Trial]) -> TrialVariant:
    return next((row.variant for row in rows if row.variant), TrialVariant(None))


def _beside_esr(material: Material, arm: str, condition: str, metric: str) -> Estimate | None:
    """An arm's estimate; its threshold over the base model's, which is no metric of trials, as one."""
    found = material.summary.resistance.get(arm)
    if metric != RESISTANCE:
        return material.estimate(arm, condition, metric)
    return Estimate(found.value, found.low, found.high, found.n) if found and found.value is not None else None


figure("monitors", "Monitored arms")(partial(_variants, ("monitor",), WATCHED))


@figure("judge_rates", "Second attempts by judge")
def judge_rates(material: Material) -> Drawn | None:
    """How often each judge finds a second attempt in the same responses."""
    if material.agreement is None:
        return None
    rows = [
        (arm, judge, rates[STEERED]["multi_attempt_rate"])
        for arm in material.summary.arms
        for judge, summary in material.agreement.rates.items()
        if STEERED in (rates := summary.arms.get(arm, {})) and rates[STEERED]["multi_attempt_rate"].n
    ]
    short = _short(material.agreement.judges)
    colours = {name: ARM_COLOURS[i % len(ARM_COLOURS)] for i, name in enumerate(short.values())}
    dots = [(arm, short[judge], estimate) for arm, judge, estimate in rows]
    svg = partial(dots_svg, {"% of responses": dots}, colours, 100)
    caption = "% of the same steered responses in which each judge finds a second attempt. " + _key(short)
    return Drawn(caption, svg, estimates_table(("arm", "judge"), rows))


@figure("judge_agreement", "Agreement between judges")
def judge_agreement(material: Material) -> Drawn | None:
    """How far each two judges agree, on last scores and on second attempts."""
    if material.agreement is None:
        return None
    short = _short(material.agreement.judges)
    colours = dict(zip(("α of last scores", "κ of second attempts"), ARM_COLOURS, strict=False))
    dots, table = [], []
    for one, other, pair in ((*pair.judges, pair) for pair in material.agreement.pairs):
        score, event = pair.scores["last_score"], pair.events["multi_attempt_rate"]
        table.append((one, other, score.alpha, score.n, event.kappa, event.n))
        for name, value, n in zip(colours, (score.alpha, event.kappa), (score.n, event.n), strict=True):
            if value is not None:
                dots.append((f"{short[one]}, {short[other]}", name, Estimate(value, None, None, n)))
    caption = "Krippendorff's α of last scores and Cohen's κ of second attempts: 1 is full agreement, 0 chance. "
    caption += "What is missing is undefined: nothing varies. " + _key(short)
    header = ("judge", "other", "alpha_last_score", "n_scores", "kappa_second_attempt", "n")
    return Drawn(caption, partial(dots_svg, {"agreement": dots}, colours), [header, *table]) if dots else None


@figure("judge_scatter", "Last scores, judge against judge")
def judge_scatter(material: Material) -> Drawn | None:
    """Last scores of the same responses by every two judges, a panel for each pair; a dot's area counts responses."""
    if len(material.panel) < 2:
        return None
    score, short = METRICS["last_score"].of, _short(list(material.panel))
    points: list[tuple[str, str, float, float]] = []
    for one, other in combinations(material.panel, 2):
        for arm, trials in material.panel[one].items():
            for row, again in zip(trials, material.panel[other][arm], strict=True):
                first, second = score(row), score(again)
                if not isinstance(first, Gap) and not isinstance(second, Gap):
                    points.append((one, other, first, second))

    def draw(pair: tuple[str, str], axes: "Axes") -> None:
        counts = Counter(point[2:] for point in points if point[:2] == pair)
        size = min(3.0, WIDEST / max(counts.values(), default=1) ** 0.5)
        axes.plot([0, 100], [0, 100], color=FAINT, lw=1, zorder=0)
        for (first, second), count in counts.items():
            axes.plot([first], [second], "o", color=ARM_COLOURS[0], ms=size * count**0.5, alpha=0.5, mew=0)
        axes.set(xlim=(-8, 108), ylim=(-8, 108), xlabel=f"score by {short[pair[0]]}", ylabel=f"by {short[pair[1]]}")
        axes.grid()

    pairs = list(dict.fromkeys(point[:2] for point in points))
    svg = partial(panels_svg, [partial(draw, pair) for pair in pairs], {}, 3.0)
    caption = "Last scores of the same responses, all arms and conditions; on the line both judges agree. "
    return Drawn(caption + _key(short), svg, [("judge", "other", "score", "other's"), *points])


def _short(judges: Sequence[str]) -> dict[str, str]:
    """Judges' names are long: they stand as J1, J2, … in a figure, and in its caption."""
    return {judge: f"J{number}" for number, judge in enumerate(judges, start=1)}


def _key(short: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {judge}" for judge, name in short.items()) + "."
