"""Pages that need nothing else: what transcript files hold, drawn; transcripts with their loss masks."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from data_gen.collect import KEPT, TRIMMED
from data_gen.description import Holdings, Part, heading, text_of
from esr_train.errors import InputError
from esr_train.files import replacing
from esr_train.masking import Policy, counted, label, token_texts
from esr_train.recipe import Recipe
from esr_train.transcript import SpanKind, Transcript
from eval.report.drawing import ARM_COLOURS, BASE_COLOUR, INK, Figure, arm_colours, inline_svg, render, svg_of

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData
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

    Raises:
        InputError: naming the row, if it cannot be labelled.
    """

    def shown(row: Transcript) -> dict[str, object]:
        labelled = None if tokenizer is None else label(tokenizer, row, policy)
        return {
            "heading": heading(row),
            "system": row.system,
            "prompt": row.prompt,
            "replies": [
                [(str(span.kind), span.text) for span in spans] for spans in (row.spans, row.rejected) if spans
            ],
            "counts": labelled and counted(labelled),
            "tokens": None if labelled is None else list(token_texts(labelled)),
        }

    return render(
        "data_gen",
        "preview.html",
        title="Transcripts",
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

    svg = svg_of(draw, {}, height=0.25 + 0.21 * len(shown)).decode()
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
    svg = svg_of(draw, colours if len(counts) > 1 else {}, height=2.3).decode()
    return Figure(part.name, part.title, part.caption, svg, table)


def _label(text: str) -> str:
    """A text as a bar's name: on one line, short, in letters that every drawing font has."""
    text = _UNSHOWN.sub("\N{HORIZONTAL ELLIPSIS}", " ".join(text.split())) or "(empty)"
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


TEMPLATE = Path(__file__).with_name("card.jinja")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's names for numbers of rows."""


def write_card(path: Path, holdings: Holdings, recipe: Recipe | None, made: Sequence[Mapping[str, Any]]) -> None:
    """Write the card of transcript files. The licence is left to whoever publishes them.

    Args:
        path: of the card; the hub wants it to be a `README.md` in or above the files' folder.
        holdings: the files and what is said of them.
        recipe: that made the files, if it is known.
        made: commit and versions of every stage that made rows, as `stages.json` has them.

    Raises:
        InputError: if there is a file already: what somebody wrote into a card is not overwritten; if a file is not
            below the card's folder.
    """
    from huggingface_hub import DatasetCard

    if path.exists():
        raise InputError("there is a card already", str(path), "Remove it, or name another file with --out.")
    rows = [row for transcripts in holdings.rows.values() for row in transcripts]
    title = f"Self-correction transcripts: {recipe.name if recipe else next(iter(holdings.rows)).stem}"
    steerings = [row.steering for row in rows if row.steering]
    asked_for = {name for name, section in recipe.data if getattr(section, "rows", 0)} if recipe else set()
    card = DatasetCard.from_template(
        _header(path, title, holdings, len(rows)),
        template_path=str(TEMPLATE),
        title=title,
        rows=len(rows),
        corrections=sum(row.corrects for row in rows),
        models=_listed(f"`{model}`" for row in rows if (model := row.meta.get("model"))),
        saes=_listed(f"`{each.sae.release}`, `{each.sae.id}`, layer {each.layer}" for each in steerings if each.sae),
        vectors=_listed(f"`{each.vector.file}`, layer {each.layer}" for each in steerings if each.vector),
        files={file.name: text_of(parts) for file, parts in holdings.parts.items()},
        sources=sorted({str(row.source) for row in rows} | asked_for),
        recipe=recipe,
        code=_code(made),
        funnels={part.name.removeprefix("funnel-"): part.counts for part in holdings.funnels},
        kept=(KEPT, TRIMMED),
        requests=holdings.requests,
    )
    with replacing(path) as file:
        file.write(str(card).rstrip() + "\n")


def _code(made: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The commits and the versions of libraries that made rows."""
    changed = {stage.get("commit"): " with changes" if stage.get("dirty") else "" for stage in made}
    versions = {f"{name} {number}" for stage in made for name, number in stage.get("versions", {}).items() if number}
    return {
        "commit": [f"`{commit}`{change}" for commit, change in changed.items() if commit],
        "versions": sorted(versions),
    }


def _header(path: Path, title: str, holdings: Holdings, rows: int) -> "DatasetCardData":
    from huggingface_hub import DatasetCardData

    return DatasetCardData(
        license="unknown",
        pretty_name=title,
        task_categories=["text-generation"],
        size_categories=[next((name for most, name in SIZES if rows < most), "n>1M")],
        tags=["activation-steering", "self-correction"],
        configs=[
            {"config_name": file.stem, "data_files": [{"split": "train", "path": _below(file, path)}]}
            for file in holdings.rows
        ],
    )


def _below(file: Path, card: Path) -> str:
    try:
        return file.resolve().relative_to(card.resolve().parent).as_posix()
    except ValueError:
        raise InputError(
            f"the card's folder does not hold {file}", str(card), "Put the card into the files' folder, or above it."
        ) from None


def _listed(names: Iterable[str]) -> str:
    return "; ".join(f"{name} ({count:,} rows)" for name, count in Counter(names).most_common())
