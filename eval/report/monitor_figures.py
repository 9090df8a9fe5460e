"""How monitors are shown: a table for the terminal, and their ROC curves."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from eval.monitoring import Detection, Lead
from eval.report.drawing import ARM_COLOURS, INK, Figure, panels_svg
from eval.report.story import number_text, shown
from eval.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def detection_table(found: Mapping[str, Sequence[Detection]], cost: Mapping[str, float]) -> list[str]:
    """Lines for a terminal: of every arm each detector, on steered and unsteered replies to held-out prompts."""
    lines: list[str] = []
    for arm, detections in found.items():
        first = detections[0]
        lines += [f"{arm}: {first.caught.n} steered and {first.false_alarms.n} unsteered replies, held out"]
        for each in detections:
            lines.append(f"  {each.name}: AUC {each.token_auc:.3f} per token, {each.reply_auc:.3f} per reply")
            lines.append(
                f"    false alarms {_rate(each.false_alarms)}; caught {_rate(each.caught)}, of those off topic "
                f"{_rate(each.caught_off_topic)}, at token {number_text(each.alarm_token, 1)}"
            )
            lines += [f"    {_lead(lead)}" for lead in each.leads]
    plain = cost.get("none")
    if plain:
        parts = [f"{name} {value:.3f} ({value / plain:.2f} ×)" for name, value in cost.items() if name != "none"]
        lines.append(f"milliseconds per token: without a monitor {plain:.3f}, {', '.join(parts)}")
    return lines


def _lead(lead: Lead) -> str:
    where = "the restart" if lead.event == "restart" else "the end of the judge's first off-topic sentence"
    return (
        f"before {where} in {_rate(lead.before)} of {lead.before.n}, there {number_text(lead.tokens, 1)} tokens earlier"
    )


def _rate(estimate: Estimate) -> str:
    text = shown(estimate, is_rate=True)
    return "–" if text is None else f"{text.value} ({text.interval})" if text.interval else text.value


def roc_figure(found: Mapping[str, Sequence[Detection]]) -> Figure:
    """The ROC curves of every arm's detectors over replies, with their working points."""
    names = list(dict.fromkeys(each.name for detections in found.values() for each in detections))
    colours = {name: ARM_COLOURS[number % len(ARM_COLOURS)] for number, name in enumerate(names)}
    table = [("arm", "detector", "false_alarms", "caught")]
    table += [
        (arm, each.name, *point)  # type: ignore[misc]
        for arm, detections in found.items()
        for each in detections
        for point in each.roc
    ]
    caption = "Share of steered replies caught over false alarms, held-out topics; dots: the thresholds of the files."
    panels = [partial(_draw, arm, each, colours) for arm, each in found.items()]
    draw = partial(panels_svg, panels, colours, 3.0)
    return Figure("roc", "Monitors", caption, draw().decode(), list(table), draw)


def _draw(arm: str, detections: Sequence[Detection], colours: Mapping[str, str], axes: "Axes") -> None:
    for each in detections:
        x, y = zip(*((100 * false, 100 * caught) for false, caught in each.roc), strict=True)
        axes.plot(x, y, color=colours[each.name], lw=1.4, drawstyle="steps-post")
        if each.caught.value is not None and each.false_alarms.value is not None:
            at = [100 * each.false_alarms.value], [100 * each.caught.value]
            axes.plot(*at, "o", color=colours[each.name], ms=5)
    axes.set_title(arm, loc="left", fontsize=9, color=INK)
    axes.set_xlabel("% of unsteered replies with an alarm")
    axes.set_ylabel("% of steered replies")
    axes.grid()
