"""Pages that need nothing else: what transcript files hold, drawn; transcripts with their loss masks."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from data_gen.description import Description, entropy, funnel_parts, heading, lines
from esr_train.mask_preview import counted, token_texts
from esr_train.masking import Policy, label
from esr_train.transcript import SpanKind, Transcript
from eval.llm import Spent
from eval.report.drawing import ARM_COLOURS, BASE_COLOUR, INK, Figure, arm_colours, inline_svg, render, svg_of

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

MOST_BARS = 20
"""The end of a longer list is left out."""
MOST_LETTERS = 34
BINS = 25
CORRECTION = "self-correction"
NAMES = {"off_topic": "off-topic", "cue": "cue", "answer": "answer", "reply": "whole reply"}
_UNSHOWN = re.compile(r"[^\x20-\x7e\xa0-\u024f\u0370-\u04ff\u2010-\u2026]+")


def stats_page(
    title: str,
    files: Mapping[Path, Description],
    funnels: Mapping[str, Mapping[str, int]],
    requests: Mapping[str, Spent],
) -> str:
    """What files hold, and what became of their candidates.

    Args:
        title: heads it.
        files: with what each holds, in order.
        funnels: source -> how many candidates ended how.
        requests: source -> what a writer was asked for it.
    """
    return render(
        "data_gen",
        "stats.html",
        title=title,
        colours=ARM_COLOURS,
        files=[
            (path.name, lines(description), _drawn(description_figures(description)))
            for path, description in files.items()
        ],
        funnels=_drawn(funnel_figures(funnels)),
        requests={source: str(spent) for source, spent in requests.items()},
    )


def preview_page(
    rows: Sequence[Transcript],
    total: int,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    policy: Policy = "masked",
) -> str:
    """Transcripts and, with a tokenizer, their tokens and masks.

    Args:
        rows: to show.
        total: rows that there are.
        tokenizer: the model's.
        policy: of the mask.

    Raises:
        InputError: naming the row, if it cannot be labelled.
    """

    def shown(row: Transcript) -> dict[str, object]:
        labelled = None if tokenizer is None else label(tokenizer, row, policy)
        return {
            "heading": heading(row),
            "system": row.system,
            "prompt": row.prompt,
            "spans": [(str(span.kind), span.text) for span in row.spans],
            "counts": labelled and counted(labelled),
            "tokens": None if labelled is None else list(token_texts(labelled)),
        }

    return render(
        "data_gen",
        "preview.html",
        colours=(),
        kinds=[str(kind) for kind in SpanKind],
        masks=tokenizer is not None,
        rows=[shown(row) for row in rows],
        total=total,
    )


def _drawn(figures: list[Figure]) -> list[tuple[Figure, str]]:
    palette = {str(index): colour for index, colour in enumerate(ARM_COLOURS)}
    return [(figure, inline_svg(figure.svg, palette)) for figure in figures]


def funnel_figures(funnels: Mapping[str, Mapping[str, int]]) -> list[Figure]:
    """A figure for every source: what was kept, and why the other candidates were not."""
    return [_funnel(source, funnel) for source, funnel in funnels.items() if sum(funnel.values())]


def description_figures(description: Description) -> list[Figure]:
    """Every figure of a file for which there are data, in reading order."""
    drawn = [
        _sources(description),
        *(_lengths(description, kind) for kind in NAMES),
        _trained(description),
        _scores(description),
        _openings(description),
        _coverage("topics", "Topics of the prompts", description.topics),
        _coverage("latents", "Latents that steered", description.latents),
    ]
    return [figure for figure in drawn if figure is not None]


def _funnel(source: str, funnel: Mapping[str, int]) -> Figure:
    parts, total = funnel_parts(funnel), sum(funnel.values())
    name, _, digest = source.rpartition("-")
    caption = f"{total:,} candidates; {parts[0][1] / total:.1%} were kept." + (f" Source {digest}." if name else "")
    svg = _bars(parts, total, [ARM_COLOURS[2], *[ARM_COLOURS[1]] * (len(parts) - 1)])
    return Figure(f"funnel-{source}", f"What became of {name or source} rows", caption, svg, [("end", "n"), *parts])


def _sources(description: Description) -> Figure:
    kinds = [
        (name, count)
        for source, (rows, corrections) in description.rows.items()
        for name, count in ((f"{source}, {CORRECTION}", corrections), (source, rows - corrections))
        if count
    ]
    total = len(description.corrects)
    caption = f"{total:,} rows; {sum(description.corrects) / total:.1%} turn back from a detour ({CORRECTION})."
    colours = [ARM_COLOURS[0] if name.endswith(CORRECTION) else BASE_COLOUR for name, _ in kinds]
    return Figure("sources", "Where the rows come from", caption, _bars(kinds, total, colours), [("kind", "n"), *kinds])


def _lengths(description: Description, kind: str) -> Figure | None:
    values = description.lengths.get(kind)
    if not values:
        return None
    caption = f"{len(values):,} of them, in {description.unit}; the dashed line is the median."
    return _histogram(
        f"length-{kind}", f"Length: {NAMES[kind]}", caption, {kind: values}, description.unit, mark_median=True
    )


def _trained(description: Description) -> Figure | None:
    if description.tokens is None:
        return None
    series: dict[str, list[float]] = {CORRECTION: [], "normal": []}
    for (total, trained), corrects in zip(description.tokens, description.corrects, strict=True):
        series[CORRECTION if corrects else "normal"].append(100 * trained / total)
    caption = f"{description.trained:.1%} of all tokens carry loss; here the share of every row, prompt included."
    return _histogram("trained", "How much of a row is trained", caption, series, "% of its tokens", limits=(0, 100))


def _scores(description: Description) -> Figure | None:
    known = sorted(description.scores.items(), key=lambda pair: list(NAMES).index(pair[0]) if pair[0] in NAMES else 9)
    series = {NAMES.get(kind, kind): values for kind, values in known}
    if not series:
        return None
    caption = "Scores that the judge gave, 0 (off the subject) to 100 (answers the question well), of the kept rows."
    return _histogram("scores", "What the judge found", caption, series, "score", limits=(0, 100))


def _openings(description: Description) -> Figure | None:
    openings = description.openings
    if not openings:
        return None
    caption = (
        f"The first three words of {sum(openings.values()):,} cues: {len(openings)} distinct openings, entropy "
        f"{entropy(openings):.2f} of at most {math.log2(len(openings)):.2f} bits."
    )
    return _ranking("cues", "How cues begin", caption, openings)


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
        axes.barh(range(len(rows)), [count for _, count in rows], color=colours, height=0.62)
        for index, (_, count) in enumerate(rows):
            axes.text(count + 0.015 * longest, index, f"{count:,} ({count / total:.1%})", va="center", color=INK)
        axes.set_yticks(range(len(rows)), [_label(name) for name, _ in rows])
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
        for key, heights in counts.items():
            axes.stairs(heights, edges, fill=True, color=colours[key], alpha=0.25)
            axes.stairs(heights, edges, color=colours[key], lw=1.4)
        if mark_median:
            axes.axvline(median(every), color=INK, lw=1, ls=(0, (4, 3)))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel(xlabel)
        axes.set_ylabel("rows" if limits or "reply" in series else "spans")

    table = [
        ("from", *counts),
        *zip(edges[:-1].tolist(), *(heights.tolist() for heights in counts.values()), strict=True),
    ]
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
