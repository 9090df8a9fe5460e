"""What transcript files hold, counted and in words: the one description that statistics, pages and card show."""

import math
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from data_gen.collect import KEPT
from esr_train.errors import InputError
from esr_train.files import read_json
from esr_train.mask_preview import counted, token_texts, visible
from esr_train.masking import Labelled, Policy, label
from esr_train.transcript import SpanKind, Steering, Transcript
from eval.llm import Spent

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

Value = TypeVar("Value")
OPENING_WORDS = 3
"""Words of a cue that are compared when its variety is measured."""
FUNNEL, REQUESTS = ".funnel.json", ".requests.json"
STYLES = {SpanKind.OFF_TOPIC: "red", SpanKind.CUE: "bold yellow", SpanKind.ANSWER: "green"}
TRAINED, MASKED = "green", "dim"


@dataclass(frozen=True)
class Description:
    """What a file holds.

    Args:
        rows: rows per source, and of them those that turn back from a detour.
        topics: of the prompts -> rows, commonest first; rows that name none are not counted.
        latents: that steered a row, by number and label -> rows, commonest first.
        unit: of `lengths`: `tokens`, or `characters` without a tokenizer.
        lengths: of every span, per kind; of the replies (`reply`).
        tokens: of whole rows, with their trained ones, one pair a row; None without a tokenizer.
        corrects: whether each row turns back.
        scores: that the judge gave, 0-100, per span kind.
        openings: the first three words of cues, letters' case aside -> cues that open so, commonest first.
    """

    rows: Mapping[str, tuple[int, int]]
    topics: Mapping[str, int]
    latents: Mapping[str, int]
    unit: str
    lengths: Mapping[str, Sequence[int]]
    tokens: Sequence[tuple[int, int]] | None
    corrects: Sequence[bool]
    scores: Mapping[str, Sequence[float]]
    openings: Mapping[str, int]

    @property
    def trained(self) -> float | None:
        """Share of the tokens that carry loss."""
        if self.tokens is None:
            return None
        return sum(trained for _, trained in self.tokens) / sum(total for total, _ in self.tokens)


def describe(
    rows: Sequence[Transcript], tokenizer: "PreTrainedTokenizerBase | None" = None, policy: Policy = "masked"
) -> Description:
    """Count what `rows` hold.

    Args:
        rows: at least one.
        tokenizer: if given, rows are labelled under `policy` and their tokens counted.
        policy: of the mask.

    Raises:
        InputError: naming the row, if it cannot be labelled.
    """
    labelled = [label(tokenizer, row, policy) for row in rows] if tokenizer else None
    sources = Counter(row.source for row in rows)
    corrections = Counter(row.source for row in rows if row.corrects)
    return Description(
        rows={source: (sources[source], corrections[source]) for source in sorted(sources)},
        topics=_counted(str(row.meta["topic"]) for row in rows if "topic" in row.meta),
        latents=_latents([row.steering for row in rows if row.steering]),
        unit="characters" if labelled is None else "tokens",
        lengths=_by_kind(_characters(rows) if labelled is None else _tokens_of_spans(labelled)),
        tokens=None if labelled is None else [(len(row.labels), row.trained) for row in labelled],
        corrects=[row.corrects for row in rows],
        scores=_by_kind(_scores(rows)),
        openings=cue_openings(rows),
    )


def cue_openings(rows: Sequence[Transcript]) -> dict[str, int]:
    """The first three words of the rows' cues, letters' case aside, commonest first."""
    cues = (span.text for row in rows for span in row.spans if span.kind is SpanKind.CUE)
    return _counted(" ".join(cue.lower().split()[:OPENING_WORDS]) for cue in cues)


def entropy(counts: Mapping[str, int]) -> float:
    """Of counted things, in bits: 0 if all are the same, log2 of their number if all are equally common."""
    total = sum(counts.values())
    return sum(count / total * math.log2(total / count) for count in counts.values())


def funnels(path: Path) -> dict[str, dict[str, int]]:
    """The funnels that lie beside a file, or in a folder: source -> how many candidates ended how."""
    return {name: _counts(file) for name, file in _beside(path, FUNNEL).items()}


def requests(path: Path) -> dict[str, Spent]:
    """What writers were asked, by source, from the files that lie beside a file or in a folder."""
    names = {field.name for field in fields(Spent)}
    return {name: Spent(**_counts(file, names)) for name, file in _beside(path, REQUESTS).items()}


def funnel_parts(funnel: Mapping[str, int]) -> list[tuple[str, int]]:
    """How candidates ended: those that were kept, then the reasons against the others, commonest first."""
    rejected = Counter({name: count for name, count in funnel.items() if name != KEPT})
    return [(KEPT, funnel.get(KEPT, 0)), *rejected.most_common()]


def lines(description: Description) -> list[str]:
    """A description for a person to read."""
    total, corrections = len(description.corrects), sum(description.corrects)
    sources = ", ".join(f"{name} {count}" for name, (count, _) in description.rows.items())
    said = [
        f"rows: {total} ({sources})",
        f"self-correction: {corrections} ({corrections / total:.1%})",
        f"topics: {len(description.topics)}",
        f"latents: {len(description.latents)}",
        *(f"{name} length: {_spread(lengths)} {description.unit}" for name, lengths in description.lengths.items()),
    ]
    if description.tokens is not None:
        said += [f"row length: {_spread([length for length, _ in description.tokens])} tokens"]
        said += [f"trained tokens: {description.trained:.1%}"]
    if not description.openings:
        return [*said, "cues: none"]
    cues, (commonest, count) = sum(description.openings.values()), next(iter(description.openings.items()))
    distinct = f"{len(description.openings)} distinct openings of three words"
    bits = f"entropy {entropy(description.openings):.2f} bits"
    return [*said, f"cues: {cues}, {distinct}, {bits}; commonest {commonest!r} ({count / cues:.1%})"]


def funnel_lines(source: str, funnel: Mapping[str, int]) -> list[str]:
    """One source's funnel for a person to read: what was kept, and why the others were not."""
    (_, kept), *rejected = funnel_parts(funnel)
    total = sum(funnel.values())
    passed = f"{source}: {kept} of {total} candidates passed" + (f" ({kept / total:.1%})" if total else "")
    return [passed, *(f"  {name}: {count}" for name, count in rejected)]


def show(
    rows: Sequence[Transcript],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    policy: Policy = "masked",
    console: "Console | None" = None,
) -> None:
    """Print transcripts, each span in its colour.

    Args:
        rows: to print.
        tokenizer: if given, each row is printed a second time as the model reads it: trained tokens green, masked ones
            dim.
        policy: of the mask.
        console: where to print; None is standard output.

    Raises:
        InputError: naming the row, if it cannot be labelled.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    kinds = [(f"{kind}  ", STYLES[kind]) for kind in SpanKind]
    console.print(Text.assemble(*kinds, "(with a tokenizer: ", ("trained", TRAINED), " ", ("masked", MASKED), ")"))
    for row in rows:
        console.print(Text(f"\n{heading(row)}", "bold"))
        console.print(Text(visible(row.prompt), "cyan"))
        console.print(Text.assemble(*[(visible(span.text), STYLES[span.kind]) for span in row.spans]))
        if tokenizer is not None:
            labelled = label(tokenizer, row, policy)
            console.print(Text(counted(labelled), "bold"))
            pieces = [(visible(text), TRAINED if trained else MASKED) for text, trained, _ in token_texts(labelled)]
            console.print(Text.assemble(*pieces))


def heading(row: Transcript) -> str:
    """A row's id, source and steering."""
    steering = row.steering
    if steering is None:
        return f"{row.id} ({row.source})"
    name = f" {steering.label!r}" if steering.label else ""
    what = "vector" if steering.latent is None else f"latent {steering.latent}"
    return f"{row.id} ({row.source}; {what}{name}, strength {steering.strength.norm:.2f})"


def _beside(path: Path, ending: str) -> dict[str, Path]:
    folder = path if path.is_dir() else path.parent
    files = sorted({*folder.glob(f"*{ending}"), *folder.glob(f"sources/*{ending}")})
    return {file.name.removesuffix(ending): file for file in files}


def _counts(file: Path, names: Collection[str] | None = None) -> dict[str, int]:
    counts = read_json(file)
    if (
        not isinstance(counts, dict)
        or not all(isinstance(count, int | float) or count is None for count in counts.values())
        or (names is not None and not counts.keys() <= set(names))
    ):
        raise InputError("these are no counts", str(file), "Generate the rows again, or remove the file.")
    return counts


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _by_kind(pairs: Iterable[tuple[str, Value]]) -> dict[str, list[Value]]:
    values: dict[str, list[Value]] = {}
    for kind, value in pairs:
        values.setdefault(kind, []).append(value)
    return values


def _latents(steered: Sequence[Steering]) -> dict[str, int]:
    def name(steering: Steering) -> str:
        what = "vector" if steering.latent is None else str(steering.latent)
        place = steering.sae.id if steering.sae else steering.vector.file if steering.vector else ""
        return " ".join(filter(None, (what, steering.label, f"({place})" if several else "")))

    several = len({steering.sae or steering.vector for steering in steered}) > 1
    return _counted(map(name, steered))


def _characters(rows: Sequence[Transcript]) -> Iterator[tuple[str, int]]:
    yield from (("reply", len(row.content)) for row in rows)
    yield from ((str(span.kind), len(span.text)) for row in rows for span in row.spans)


def _tokens_of_spans(labelled: Sequence[Labelled]) -> Iterator[tuple[str, int]]:
    """As `_characters`; a token belongs to the span in which it begins."""
    for row in labelled:
        starts = [start for start, end in row.offsets if end > start]
        counts = [bisect_left(starts, end) - bisect_left(starts, start) for _, start, end in row.spans]
        yield "reply", sum(counts)
        yield from ((str(kind), count) for (kind, _, _), count in zip(row.spans, counts, strict=True))


def _scores(rows: Sequence[Transcript]) -> Iterator[tuple[str, float]]:
    for row in rows:
        scores = row.meta.get("scores")
        for kind, score in scores.items() if isinstance(scores, dict) else ():
            if isinstance(score, int | float):
                yield kind, float(score)


def _spread(values: Sequence[int]) -> str:
    """Median, 95th percentile (the value that 95 % do not exceed) and largest."""
    ordered = sorted(values)
    most = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return f"median {statistics.median(ordered):g}, 95 % up to {most:g}, longest {ordered[-1]}"
