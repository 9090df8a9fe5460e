"""Pages that need nothing else: what transcript files hold, drawn; transcripts with their loss masks."""

import math
import re
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from data_gen.description import Holdings, Part, heading, text_of
from esr_train.mask_preview import counted, token_texts
from esr_train.masking import Policy, label
from esr_train.transcript import SpanKind, Transcript
from eval.report.drawing import ARM_COLOURS, BASE_COLOUR, INK, Figure, arm_colours, inline_svg, render, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

MOST_BARS = 20
"""The end of a longer list is left out."""
MOST_LETTERS = 34
BINS = 25
_UNSHOWN = re.compile(r"[^\x20-\x7e\xa0-\u024f\u0370-\u04ff\u2010-\u2026]+")


def stats_page(title: str, holdings: Holdings) -> str:
    """What files hold, and what became of their candidates."""
    palette = {str(index): colour for index, colour in enumerate(ARM_COLOURS)}

    def drawn(parts: Sequence[Part]) -> list[tuple[Figure, str]]:
        return [(figure, inline_svg(figure.svg, palette)) for part in parts if (figure := draw_part(part))]

    return render(
        "data_gen",
        "stats.html",
        title=title,
        colours=ARM_COLOURS,
        files=[(path.name, text_of(parts), drawn(parts)) for path, parts in holdings.parts.items()],
        funnels=drawn(holdings.funnels),
        requests={source: str(spent) for source, spent in holdings.requests.items()},
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


def draw_part(part: Part) -> Figure | None:
    """The figure of a part; None if there is nothing to draw."""
    if part.counts:
        return _bars(part)
    return _histogram(part) if any(part.series.values()) else None


def _bars(part: Part) -> Figure:
    """A horizontal bar for each kind, with its count and its share of all."""
    shown = list(part.counts.items())[:MOST_BARS]
    longest, total = max(part.counts.values()), sum(part.counts.values())
    colours = [BASE_COLOUR if kind in part.minor else ARM_COLOURS[0] for kind, _ in shown]
    more = f" Shown: the {len(shown)} commonest." if len(part.counts) > len(shown) else ""

    def draw(axes: "Axes") -> None:
        axes.barh(range(len(shown)), [count for _, count in shown], color=colours, height=0.62)
        for index, (_, count) in enumerate(shown):
            axes.text(count + 0.015 * longest, index, f"{count:,} ({count / total:.1%})", va="center", color=INK)
        axes.set_yticks(range(len(shown)), [_label(kind) for kind, _ in shown])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 1.32 * longest)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)

    svg = svg_of(draw, {}, height=0.25 + 0.21 * len(shown))
    return Figure(part.name, part.title, part.caption + more, svg, [("kind", "n"), *part.counts.items()])


def _histogram(part: Part) -> Figure:
    """Bins of equal width, whole numbers where the axis has no ends of its own; a line at the median of one series."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    every = [value for values in part.series.values() for value in values]
    if part.ends is None:
        step = math.ceil((max(every) + 1) / BINS)
        edges = np.arange(0, max(every) + 1 + step, step, dtype=float)
    else:
        edges = np.linspace(*part.ends, BINS + 1)
    counts = {name: np.histogram(values, edges)[0] for name, values in part.series.items()}
    colours = arm_colours(list(counts))

    def draw(axes: "Axes") -> None:
        for name, heights in counts.items():
            axes.stairs(heights, edges, fill=True, color=colours[name], alpha=0.25)
            axes.stairs(heights, edges, color=colours[name], lw=1.4)
        if part.ends is None:
            axes.axvline(median(every), color=INK, lw=1, ls=(0, (4, 3)))
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel(part.unit)
        axes.set_ylabel("how many")

    columns = (edges[:-1].tolist(), *(heights.tolist() for heights in counts.values()))
    table = [("from", *counts), *zip(*columns, strict=True)]
    svg = svg_of(draw, colours if len(counts) > 1 else {}, height=2.3)
    return Figure(part.name, part.title, part.caption, svg, table)


def _label(text: str) -> str:
    """A text as a bar's name: on one line, short, in letters that every drawing font has."""
    text = _UNSHOWN.sub("\N{HORIZONTAL ELLIPSIS}", " ".join(text.split())) or "(empty)"
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
