"""Figures of replies that go on from given beginnings: what makes an arm restart, and what keeps it on topic."""

from collections.abc import Iterator, Sequence
from functools import partial

from eval.beginnings import SQUARE
from eval.conditions import (
    CORRECTION,
    MATCHED,
    PUSHED_OFF_TOPIC,
    PUSHED_ON_TOPIC,
    UNPUSHED_OFF_TOPIC,
    UNPUSHED_ON_TOPIC,
)
from eval.report.drawing import ARM_COLOURS, BASE_COLOUR, Dot, arm_colours, dots_svg
from eval.report.figures import Drawn, Material, estimates_table, figure, scaled
from eval.report.story import shown
from eval.statistics import Estimate, mean

RESTARTS = "restart_rate"
SUMS = {"off_topic": "sum of off-topic detectors", "steered": "sum of steering detectors"}
FEEL_OR_READ = (
    "Replies that go on from the base model's steered (off-topic) or unsteered (on-topic) beginning, with and without "
    "the push, on the same cells; 95 % intervals clustered by direction."
)
DETECTORS = (
    " Under it what the detectors of `esr latents search` read in these beginnings, each by its strongest activation."
)
SUSTAINED = (
    "Steered replies that go on from a correction (a cue and on-topic words) or from as many on-topic words of the "
    "same reply. What is above 0 a correction does beyond recent on-topic text: resistance that is sustained. Around "
    "0, restarting is the event, and what keeps the answer on topic behind it is the text; below, a correction helps "
    "less than as many words of an answer. Given words count in the "
    "scores of both. 95 % intervals clustered by direction."
)


@figure("feel_or_read", "Does it feel the push or read the text?")
def feel_or_read(material: Material) -> Drawn | None:
    """Restarts by push and text, and what the detectors of both contrasts read in the same texts."""
    arms = [arm for arm, measured in material.summary.arms.items() if measured.keys() >= SQUARE.keys()]
    if not arms:
        return None
    rows: list[tuple[str, str, str, Estimate]] = [
        (RESTARTS, condition, arm, estimate)
        for condition in SQUARE
        for arm in arms
        if (estimate := material.estimate(arm, condition, RESTARTS))
    ]
    rows += [row for contrast in SUMS for row in _detector_rows(material, contrast, arms)]
    panels: dict[str, list[Dot]] = {}
    for what, condition, arm, estimate in rows:
        label = SUMS.get(what, "% restart")
        panels.setdefault(label, []).append((SQUARE[condition], arm, scaled(estimate, what)))
    caption = f"{verdict(material, arms)} {FEEL_OR_READ}{DETECTORS if len(panels) > 1 else ''}"
    svg = partial(dots_svg, panels, arm_colours(arms))
    return Drawn(caption, svg, estimates_table(("of", "condition", "arm"), rows))


def _detector_rows(material: Material, contrast: str, arms: Sequence[str]) -> Iterator[tuple[str, str, str, Estimate]]:
    for condition in SQUARE:
        for arm in arms:
            read = [each for each in material.noticed.get(arm, ()) if each.condition == condition]
            read = [each for each in read if contrast in each.sums]
            if read:
                found = mean([each.sums[contrast] for each in read], [each.latent for each in read])
                yield contrast, condition, arm, found


def verdict(material: Material, arms: Sequence[str]) -> str:
    """What each arm restarts at, in one sentence: a difference counts where its interval lies above 0."""
    clauses = [clause for arm in arms if (clause := _clause(material, arm))]
    return f"By these rates {'; '.join(clauses)}." if clauses else ""


def _clause(material: Material, arm: str) -> str | None:
    corners = (PUSHED_ON_TOPIC, UNPUSHED_OFF_TOPIC, PUSHED_OFF_TOPIC)
    found = [_difference(material, arm, each, UNPUSHED_ON_TOPIC, RESTARTS) for each in corners]
    push, text, both = (_points(each, is_rate=True) for each in found)
    if push is None or text is None or both is None:
        return None
    feels, reads, meets = map(_is_above, found)
    said = f"the push alone adds {push} points of restarts, off-topic text alone {text}, both {both}"
    if feels and reads:
        return f"{arm} feels the push and reads the text: {said}"
    if feels:
        return f"{arm} feels the push, and that it reads the text alone does not show: {said}"
    if reads:
        return f"{arm} reads the text, and that it feels the push alone does not show: {said}"
    if meets:
        return f"{arm} restarts where push and off-topic text meet: {said}"
    return f"of {arm} the numbers do not decide it: {said}"


def _difference(material: Material, arm: str, condition: str, partner: str, metric: str) -> Estimate | None:
    found = material.summary.within.get(arm, {}).get(f"{condition}-{partner}", {}).get(metric)
    return found if found and found.n else None


def _is_above(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.low is not None and estimate.low > 0


def _points(estimate: Estimate | None, is_rate: bool) -> str | None:
    text = shown(estimate, is_rate, signed=True)
    return f"{text.value} ({text.interval or 'no interval'})" if text else None


@figure("sustained_resistance", "Detection event against sustained resistance")
def sustained_resistance(material: Material) -> Drawn:
    """Last scores behind a correction and behind on-topic text of its length, and their difference cell by cell."""
    series = {CORRECTION: "from a correction", MATCHED: "from on-topic text", "difference": "difference"}
    rows: list[tuple[str, str, Estimate]] = []
    for arm in material.summary.arms:
        difference = _difference(material, arm, CORRECTION, MATCHED, "last_score")
        for condition in (CORRECTION, MATCHED):
            if difference and (estimate := material.estimate(arm, condition, "last_score")):
                rows.append((arm, condition, estimate))
        rows += [(arm, "difference", difference)] if difference else []
    dots = [(arm, series[name], estimate) for arm, name, estimate in rows]
    panels = {
        "last score": [dot for dot in dots if dot[1] != "difference"],
        "difference of last scores, points": [dot for dot in dots if dot[1] == "difference"],
    }
    said = [f"{arm} {_points(estimate, is_rate=False)}" for arm, name, estimate in rows if name == "difference"]
    colours = dict(zip(series.values(), (ARM_COLOURS[0], BASE_COLOUR, ARM_COLOURS[1]), strict=True))
    caption = f"Behind a correction last scores differ by {', '.join(said)} points. {SUSTAINED}"
    return Drawn(caption, partial(dots_svg, panels, colours), estimates_table(("arm", "condition"), rows))
