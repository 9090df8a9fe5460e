"""How a search for detectors is shown: a table for the terminal, and a figure with the map of the groups."""

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from eval.detectors import Detectors, DetectorSet
from eval.report.drawing import ARM_COLOURS, BASE_COLOUR, FAINT, INK, PAGE, Figure, Look, panels_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "off_topic": "replies behind another prompt against behind their own",
    "steered": "replies read under steering against unsteered",
}
NAMED = 34
"""Characters of a name in the terminal and on the map."""
COLUMNS = ("contrast", "latent", "name", "group", "auc", "error", "p", "q", "held_out")
SHARES = ("negative_share", "positive_share", "frequency")


def search_table(detectors: Detectors) -> list[str]:
    """Lines for a terminal: of each contrast how well the set does, and its latents."""
    lines: list[str] = []
    for found in detectors.sets:
        lines += [f"{found.contrast}: {TITLES[found.contrast]}", *(f"  {line}" for line in summary_lines(found))]
        if found.detectors:
            lines.append("  latent  AUC ± error      q  held out  silent/active  group  name")
        for each in found.detectors:
            shares = f"{100 * each.negative_share:.0f} % / {100 * each.positive_share:.0f} %"
            lines.append(
                f"  {each.latent:6} {each.auc:5.2f} ± {each.error:.2f} {each.q:7.1g} {each.held_out:7.2f}   "
                f"{shares:>13} {each.group:6}  {_short(each.name)}"
            )
    return lines


def summary_lines(found: DetectorSet) -> list[str]:
    """In sentences: how many latents were found, and what their sum does on held-out prompts and topics."""
    rule = f"the paper's rule (never on negatives, on 80 % of positives) selects {len(found.paper_rule)}"
    tested = f"{found.latents:,} latents on {found.pairs} pairs: {rule}; {len(found.detectors)} by AUC"
    if found.held_out is None:
        return [tested]
    low, high = min(found.random_aucs), max(found.random_aucs)
    auc, first = found.held_out, found.detectors[0]
    groups = len({each.group for each in found.detectors})
    return [
        f"{tested}, in {groups} groups",
        f"their sum on {auc.n} held-out pairs: AUC {auc.value:.2f} ({auc.low:.2f} to {auc.high:.2f}); "
        f"{len(found.random_aucs)} matched random sets: {low:.2f} to {high:.2f}; the first latent alone: "
        f"{first.held_out:.2f}",
    ]


def search_figure(detectors: Detectors) -> Figure:
    """Of each contrast the set and its latents against the random sets, and the map of its groups."""
    table: list[tuple[Any, ...]] = [(*COLUMNS, *SHARES)]
    for found in detectors.sets:
        table += [
            (found.contrast, *(getattr(each, name) for name in (*COLUMNS[1:], *SHARES))) for each in found.detectors
        ]
    draw = partial(_document, detectors)
    caption = "AUC on held-out prompts and topics, and groups of latents that are alike."
    return Figure("detectors", "Latents that notice", caption, draw().decode(), table, draw)


def _document(detectors: Detectors, look: Look = PAGE) -> bytes:
    shown = [found for found in detectors.sets if found.held_out]
    draws = [partial(draw, found) for found in shown for draw in (_draw_aucs, _draw_map)]
    colours = {"the set's sum": ARM_COLOURS[0], "its latents alone": ARM_COLOURS[5], "random sets": BASE_COLOUR}
    return panels_svg(draws or [_draw_nothing], colours if shown else {}, 2.4, look=look)


def _draw_aucs(found: DetectorSet, axes: "Axes") -> None:
    assert found.held_out is not None
    alone = [each.held_out for each in found.detectors]
    rows = [("random sets", found.random_aucs, BASE_COLOUR), ("latents alone", alone, ARM_COLOURS[5])]
    for height, (_, values, colour) in enumerate(rows):
        axes.plot(values, [height] * len(values), "|", color=colour, ms=12)
    top, auc = len(rows), found.held_out
    axes.plot([auc.low, auc.high], [top, top], color=ARM_COLOURS[0], lw=1.6)
    axes.plot([auc.value], [top], "o", color=ARM_COLOURS[0], ms=5.5)
    axes.axvline(0.5, color=INK, lw=0.8, zorder=0)
    axes.set_yticks(range(top + 1), [*(name for name, *_ in rows), "their sum"])
    axes.set_ylim(-0.5, top + 0.5)
    axes.set_xlabel("AUC, held out")
    axes.set_title(TITLES[found.contrast], loc="left", fontsize=9, color=INK)
    axes.grid(axis="x")


def _draw_map(found: DetectorSet, axes: "Axes") -> None:
    sizes = Counter(each.group for each in found.detectors)
    named = {group: colour for (group, _), colour in zip(sizes.most_common(), ARM_COLOURS, strict=False)}
    for each in found.detectors:
        axes.plot(*([end] for end in each.place), "o", color=named.get(each.group, FAINT), ms=5)
    middle = sum(axes.get_xlim()) / 2
    for each in found.detectors:
        if each.group in named:
            del named[each.group]  # a group is named once, by its best latent
            side, offset = ("right", -4) if each.place[0] > middle else ("left", 4)
            name, shift = _short(each.name), (offset, 3)
            text = axes.annotate(name, each.place, shift, ha=side, textcoords="offset points", fontsize=7)
            text.set_in_layout(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("its latents; the largest groups are coloured and named", loc="left", fontsize=9, color=INK)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def _draw_nothing(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "no latent stands out", ha="center", color=INK)
    axes.set_axis_off()


def _short(name: str) -> str:
    text = " ".join(name.split())
    if len(text) <= NAMED:
        return text
    # Of an excerpt the token between << and >> is what matters.
    start = max(text.find("<<") - NAMED // 2, 0)
    return ("…" if start else "") + text[start : start + NAMED - 1] + "…"
