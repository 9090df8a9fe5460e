"""What a file of transcripts holds, drawn."""

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from data_gen.inventory import Inventory, funnel_parts
from eval.report.drawing import ARM_COLOURS, BASE_COLOUR, INK, arm_colours, svg_of
from eval.report.material import Figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

MOST_BARS = 20
"""The end of a longer list is left out."""
MOST_LETTERS = 34
BINS = 25
TURNED = "self-correction"
NAMES = {"off_topic": "off-topic", "cue": "cue", "answer": "answer", "reply": "whole reply"}
_UNSHOWN = re.compile(r"[^\x20-\x7e\xa0-\u024f\u0370-\u04ff\u2010-\u2026]+")


def funnel_figures(funnels: Mapping[str, Mapping[str, int]]) -> list[Figure]:
    """A figure for every source: what was kept, and why the other candidates were not."""
    return [_funnel(source, funnel) for source, funnel in funnels.items() if sum(funnel.values())]


def inventory_figures(inventory: Inventory) -> list[Figure]:
    """Every figure of a file for which there are data, in reading order."""
    drawn = [
        _sources(inventory),
        *(_lengths(inventory, kind) for kind in NAMES),
        _trained(inventory),
        _scores(inventory),
        _openings(inventory),
        _coverage("topics", "Topics of the prompts", inventory.topics),
        _coverage("latents", "Latents that steered", inventory.latents),
    ]
    return [figure for figure in drawn if figure is not None]


def _funnel(source: str, funnel: Mapping[str, int]) -> Figure:
    parts, total = funnel_parts(funnel), sum(funnel.values())
    name, _, digest = source.rpartition("-")
    caption = f"{total:,} candidates; {parts[0][1] / total:.1%} were kept." + (f" Source {digest}." if name else "")
    svg = _bars(parts, total, [ARM_COLOURS[2], *[ARM_COLOURS[1]] * (len(parts) - 1)])
    return Figure(f"funnel-{source}", f"What became of {name or source} rows", caption, svg, [("end", "n"), *parts])


def _sources(inventory: Inventory) -> Figure:
    kinds = [
        (name, count)
        for source, (rows, turned) in inventory.rows.items()
        for name, count in ((f"{source}, {TURNED}", turned), (source, rows - turned))
        if count
    ]
    total, turned = len(inventory.corrects), sum(inventory.corrects)
    caption = f"{total:,} rows; {turned / total:.1%} turn back from a detour ({TURNED})."
    colours = [ARM_COLOURS[0] if name.endswith(TURNED) else BASE_COLOUR for name, _ in kinds]
    return Figure("sources", "Where the rows come from", caption, _bars(kinds, total, colours), [("kind", "n"), *kinds])


def _lengths(inventory: Inventory, kind: str) -> Figure | None:
    values = inventory.lengths.get(kind)
    if not values:
        return None
    caption = f"{len(values):,} of them, in {inventory.unit}; the dashed line is the median."
    return _histogram(
        f"length-{kind}", f"Length: {NAMES[kind]}", caption, {kind: values}, inventory.unit, mark_median=True
    )


def _trained(inventory: Inventory) -> Figure | None:
    if inventory.tokens is None:
        return None
    series: dict[str, list[float]] = {TURNED: [], "normal": []}
    for (total, trained), corrects in zip(inventory.tokens, inventory.corrects, strict=True):
        series[TURNED if corrects else "normal"].append(100 * trained / total)
    caption = f"{inventory.trained:.1%} of all tokens carry loss; here the share of every row, prompt included."
    return _histogram("trained", "How much of a row is trained", caption, series, "% of its tokens", limits=(0, 100))


def _scores(inventory: Inventory) -> Figure | None:
    known = sorted(inventory.scores.items(), key=lambda pair: list(NAMES).index(pair[0]) if pair[0] in NAMES else 9)
    series = {NAMES.get(kind, kind): values for kind, values in known}
    if not series:
        return None
    caption = "Scores that the judge gave, 0 (off the subject) to 100 (answers the question well), of the kept rows."
    return _histogram("scores", "What the judge found", caption, series, "score", limits=(0, 100))


def _openings(inventory: Inventory) -> Figure | None:
    cues = inventory.cues
    if not cues.cues:
        return None
    caption = (
        f"The first three words of {cues.cues:,} cues: {cues.openings} distinct openings, entropy {cues.entropy:.2f} "
        f"of at most {math.log2(cues.openings):.2f} bits."
    )
    return _ranking("cues", "How cues begin", caption, cues.counts)


def _coverage(name: str, title: str, counts: Mapping[str, int]) -> Figure | None:
    if not counts:
        return None
    least, most = min(counts.values()), max(counts.values())
    caption = (
        f"{len(counts)} {name}, {least:,} to {most:,} rows each, half of them {median(counts.values()):g} or more."
    )
    return _ranking(name, title, caption, counts)


def _ranking(name: str, title: str, caption: str, counts: Mapping[str, int]) -> Figure:
    shown = list(counts.items())[:MOST_BARS]
    if len(counts) > len(shown):
        caption += f" Shown: the {len(shown)} commonest."
    svg = _bars(shown, sum(counts.values()), [ARM_COLOURS[0]] * len(shown))
    return Figure(name, title, caption, svg, [(name, "n"), *counts.items()])


def _bars(rows: Sequence[tuple[str, int]], total: int, colours: Sequence[str]) -> str:
    """A horizontal bar for each row, with its count and its share of `total` behind it."""
    longest = max(count for _, count in rows)

    def draw(axes: "Axes") -> None:
        places = range(len(rows))
        axes.barh(places, [count for _, count in rows], color=colours, height=0.62)
        for place, (_, count) in zip(places, rows, strict=True):
            axes.text(count + 0.015 * longest, place, f"{count:,} ({count / total:.1%})", va="center", color=INK)
        axes.set_yticks(places, [_label(name) for name, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.32 * longest)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)

    return svg_of(draw, {}, height=0.25 + 0.21 * len(rows))


def _histogram(
    name: str,
    title: str,
    caption: str,
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    limits: tuple[float, float] | None = None,
    mark_median: bool = False,
) -> Figure:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    series = {key: values for key, values in series.items() if values}
    every = [value for values in series.values() for value in values]
    edges = _edges(max(every), limits)
    counts = {key: np.histogram(values, edges)[0] for key, values in series.items()}
    colours = arm_colours(list(counts))

    def draw(axes: "Axes") -> None:
        for key, found in counts.items():
            axes.stairs(found, edges, fill=True, color=colours[key], alpha=0.25)
            axes.stairs(found, edges, color=colours[key], lw=1.4)
        if mark_median:
            axes.axvline(median(every), color=INK, lw=1, ls=(0, (4, 3)))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel(xlabel)
        axes.set_ylabel("rows" if limits or "reply" in series else "spans")

    table = [("from", *counts), *zip(edges[:-1].tolist(), *(found.tolist() for found in counts.values()), strict=True)]
    return Figure(name, title, caption, svg_of(draw, colours if len(counts) > 1 else {}, height=2.3), table)


def _edges(largest: float, limits: tuple[float, float] | None) -> "NDArray[np.float64]":
    """The borders of about `BINS` bins; without limits whole numbers, all bins of one whole width."""
    import numpy as np

    if limits is not None:
        return np.linspace(*limits, BINS + 1)
    step = math.ceil((largest + 1) / BINS)
    return np.arange(0, largest + 1 + step, step, dtype=float)


def _label(text: str) -> str:
    """A text as a bar's name: on one line, short, in letters that every drawing font has."""
    text = _UNSHOWN.sub("\N{HORIZONTAL ELLIPSIS}", " ".join(text.split())) or "(empty)"
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
