"""What transcript files hold, in words and numbers: the one description that statistics, pages and card show."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from data_gen.collect import KEPT, TRIMMED
from esr_train.errors import InputError
from esr_train.files import read_json
from esr_train.masking import END, Labelled, Policy, counted, label, marked, visible
from esr_train.transcript import Span, SpanKind, Transcript, read_transcripts
from eval.llm import Spent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Value = TypeVar("Value")
OPENING_WORDS = 3
"""Words of a cue that are compared when its variety is measured."""
FUNNEL, REQUESTS = ".funnel.json", ".requests.json"
CORRECTION = "self-correction"
NAMES = {"off_topic": "off-topic", "cue": "cue", "answer": "answer", "reply": "whole reply"}
STYLES = {SpanKind.OFF_TOPIC: "\033[31m", SpanKind.CUE: "\033[1;33m", SpanKind.ANSWER: "\033[32m"}
BOLD, CYAN = "\033[1m", "\033[36m"


@dataclass(frozen=True)
class Part:
    """One thing that is said of a file.

    Args:
        name: of its figure, for links and tests.
        counts: kinds and how many there are of each, drawn as bars.
        series: what is measured and its values, drawn as a histogram.
        ends: of the values' axis; None: 0 and the largest value.
        minor: kinds whose bars are grey.
    """

    name: str
    title: str
    lines: tuple[str, ...]
    caption: str
    counts: Mapping[str, int] = field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    unit: str = ""
    ends: tuple[float, float] | None = None
    minor: Collection[str] = ()


def describe(
    rows: Sequence[Transcript], tokenizer: "PreTrainedTokenizerBase | None" = None, policy: Policy = "masked"
) -> list[Part]:
    """Count what `rows` hold.

    Args:
        rows: at least one.
        tokenizer: if given, rows are labelled under `policy` and their tokens counted; characters are if not.
        policy: of the mask.

    Raises:
        InputError: naming the row, if it cannot be labelled.
    """
    labelled = [label(tokenizer, row, policy) for row in rows] if tokenizer else []
    topics = (str(row.meta["topic"]) for row in rows if "topic" in row.meta)
    noun = "vectors" if any(row.steering and row.steering.vector for row in rows) else "latents"
    return [
        _sources(rows),
        _coverage("topics", "Topics of the prompts", topics),
        _coverage(noun, f"{noun.capitalize()} that steered", _latents(rows)),
        *_lengths(_tokens(labelled) if labelled else _characters(rows), "tokens" if labelled else "characters"),
        *([_trained(rows, labelled)] if labelled else []),
        _scores(rows),
        _cues(cue_openings(rows)),
    ]


def text_of(parts: Iterable[Part]) -> list[str]:
    """What is said without figures, line by line."""
    return [line for part in parts for line in part.lines]


def cue_openings(rows: Sequence[Transcript]) -> dict[str, int]:
    """The first three words of the rows' cues, letters' case aside, commonest first."""
    cues = (span.text for row in rows for span in row.spans if span.kind is SpanKind.CUE)
    return dict(Counter(" ".join(cue.lower().split()[:OPENING_WORDS]) for cue in cues).most_common())


def entropy(counts: Mapping[str, int]) -> float:
    """Of counted things, in bits: 0 if all are the same, log2 of their number if all are equally common."""
    total = sum(counts.values())
    return sum(count / total * math.log2(total / count) for count in counts.values())


@dataclass(frozen=True)
class Holdings:
    """What a transcript file, or the files of a run directory, hold.

    Args:
        parts: what is said of each file.
        funnels: what became of the candidates of each source, from the files beside them.
        requests: source -> what a writer was asked for it.
    """

    rows: Mapping[Path, Sequence[Transcript]]
    parts: Mapping[Path, Sequence[Part]]
    funnels: Sequence[Part]
    requests: Mapping[str, Spent]


def describe_files(
    path: Path, tokenizer: "PreTrainedTokenizerBase | None" = None, policy: Policy = "masked"
) -> Holdings:
    """Read and count a transcript file, or those of a run directory, and what lies beside them.

    Raises:
        InputError: for a file that cannot be read or holds no rows; for a folder without such files.
    """
    folder, files = path.parent, [path]
    if path.is_dir():
        folder = path / "data" if (path / "data").is_dir() else path
        files = [file for file in sorted(folder.glob("*.jsonl")) if not file.name.endswith(".candidates.jsonl")]
    if not files:
        raise InputError("there is no transcript file here", str(folder), "Generate data first, or name a file.")
    rows = {file: read_file(file) for file in files}
    known = {field.name for field in fields(Spent)}
    return Holdings(
        rows,
        {file: describe(read, tokenizer, policy) for file, read in rows.items()},
        [_funnel(name, _counts(file)) for name, file in _beside(folder, FUNNEL).items()],
        {name: Spent(**_counts(file, known)) for name, file in _beside(folder, REQUESTS).items()},
    )


def read_file(path: Path) -> list[Transcript]:
    """The rows of a transcript file.

    Raises:
        InputError: if it cannot be read, or holds none.
    """
    rows = read_transcripts(path)
    if not rows:
        raise InputError("there is no row in the file", str(path), "Name a transcript file with rows.")
    return rows


def shown(
    row: Transcript,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    policy: Policy = "masked",
    colour: bool = False,
) -> str:
    """A row as a person reads it, each span in its colour.

    Args:
        tokenizer: if given, the row is shown a second time as the model reads it (see `masking.marked`).
        colour: whether to write terminal colours.

    Raises:
        InputError: naming the row, if it cannot be labelled.
    """

    def painted(text: str, style: str) -> str:
        return f"{style}{visible(text)}{END}" if colour else visible(text)

    def reply(spans: Sequence[Span]) -> str:
        return "".join(painted(span.text, STYLES[span.kind]) for span in spans)

    lines = [painted(heading(row), BOLD), painted(row.prompt, CYAN), reply(row.spans)]
    lines += [painted("rejected:", BOLD), reply(row.rejected)] if row.rejected else []
    if tokenizer is not None:
        labelled = label(tokenizer, row, policy)
        lines += [painted(counted(labelled), BOLD), marked(labelled, colour)]
    return "\n".join(lines)


def heading(row: Transcript) -> str:
    """A row's id, source and steering."""
    steering = row.steering
    if steering is None:
        return f"{row.id} ({row.source})"
    name = f" {steering.label!r}" if steering.label else ""
    what = "vector" if steering.latent is None else f"latent {steering.latent}"
    return f"{row.id} ({row.source}; {what}{name}, strength {steering.strength.norm:.2f})"


def _sources(rows: Sequence[Transcript]) -> Part:
    sources = sorted(Counter(row.source for row in rows).items())
    kinds = Counter(f"{row.source}, {CORRECTION}" if row.corrects else row.source for row in rows)
    total, corrections = len(rows), sum(row.corrects for row in rows)
    lines = (
        f"rows: {total} ({', '.join(f'{name} {count}' for name, count in sources)})",
        f"{CORRECTION}: {corrections} ({corrections / total:.1%})",
    )
    caption = f"{total:,} rows; {corrections / total:.1%} turn back from a detour ({CORRECTION})."
    minor = [kind for kind in kinds if not kind.endswith(CORRECTION)]
    return Part("sources", "Where the rows come from", lines, caption, dict(sorted(kinds.items())), minor=minor)


def _coverage(name: str, title: str, names: Iterable[str]) -> Part:
    counts = dict(Counter(names).most_common())
    each = sorted(counts.values()) or [0]
    caption = f"{len(counts)} {name}, {each[0]:,} to {each[-1]:,} rows each, half of them {median(each):g} or more."
    return Part(name, title, (f"{name}: {len(counts)}",), caption, counts)


def _latents(rows: Sequence[Transcript]) -> Iterator[str]:
    steered = [row.steering for row in rows if row.steering]
    several = len({steering.sae or steering.vector for steering in steered}) > 1
    for steering in steered:
        unnamed = "" if steering.label else "vector"
        what = unnamed if steering.latent is None else str(steering.latent)
        origin = steering.sae.id if steering.sae else steering.vector.file if steering.vector else ""
        yield " ".join(filter(None, (what, steering.label, f"({origin})" if several else "")))


def _lengths(lengths: Iterable[tuple[str, int]], unit: str) -> Iterator[Part]:
    for kind, values in _grouped(lengths).items():
        line = f"{kind} length: {_spread(values)} {unit}"
        caption = f"{len(values):,} of them, in {unit}; the dashed line is the median."
        yield Part(f"length-{kind}", f"Length: {NAMES[kind]}", (line,), caption, series={kind: values}, unit=unit)


def _characters(rows: Sequence[Transcript]) -> Iterator[tuple[str, int]]:
    for row in rows:
        yield "reply", len(row.content)
        yield from ((str(span.kind), len(span.text)) for span in row.spans)


def _tokens(labelled: Sequence[Labelled]) -> Iterator[tuple[str, int]]:
    """As `_characters`; a token belongs to the span in which it begins."""
    for row in labelled:
        starts = [start for start, end in row.offsets if end > start]
        counts = [bisect_left(starts, end) - bisect_left(starts, start) for _, start, end in row.spans]
        yield "reply", sum(counts)
        yield from ((str(kind), count) for (kind, _, _), count in zip(row.spans, counts, strict=True))


def _trained(rows: Sequence[Transcript], labelled: Sequence[Labelled]) -> Part:
    lengths = [len(row.labels) for row in labelled]
    share = f"{sum(row.trained for row in labelled) / sum(lengths):.1%}"
    names = (CORRECTION if row.corrects else "normal" for row in rows)
    shares = (100 * row.trained / len(row.labels) for row in labelled)
    return Part(
        "trained",
        "How much of a row is trained",
        (f"row length: {_spread(lengths)} tokens", f"trained tokens: {share}"),
        f"{share} of all tokens carry loss; here the share of every row, prompt included.",
        series=_grouped(zip(names, shares, strict=True)),
        unit="% of its tokens",
        ends=(0, 100),
    )


def _scores(rows: Sequence[Transcript]) -> Part:
    scores = [row.meta["scores"] for row in rows if isinstance(row.meta.get("scores"), dict)]
    series = _grouped(
        (name, float(found[kind]))
        for kind, name in NAMES.items()
        for found in scores
        if isinstance(found.get(kind), int | float)
    )
    lines = tuple(f"{name} score: median {median(values):g}" for name, values in series.items())
    caption = "Scores that the judge gave, 0 (off the subject) to 100 (answers the question well), of the kept rows."
    return Part("scores", "What the judge found", lines, caption, series=series, unit="score", ends=(0, 100))


def _cues(openings: Mapping[str, int]) -> Part:
    if not openings:
        return Part("cues", "How cues begin", ("cues: none",), "")
    cues, (commonest, count) = sum(openings.values()), next(iter(openings.items()))
    bits, distinct = entropy(openings), f"{len(openings)} distinct openings"
    most = f"commonest {commonest!r} ({count / cues:.1%})"
    line = f"cues: {cues}, {distinct} of three words, entropy {bits:.2f} bits; {most}"
    caption = (
        f"The first three words of {cues:,} cues: {distinct}, entropy {bits:.2f} of at most "
        f"{math.log2(len(openings)):.2f} bits."
    )
    return Part("cues", "How cues begin", (line,), caption, openings)


def _funnel(source: str, funnel: Mapping[str, int]) -> Part:
    """What was kept, then the reasons against the others, commonest first."""
    rejected = Counter({name: n for name, n in funnel.items() if name not in (KEPT, TRIMMED)}).most_common()
    counts = {name: funnel[name] for name in (KEPT, TRIMMED) if name in funnel} or {KEPT: 0}
    kept, total = sum(counts.values()), sum(funnel.values())
    share = f"{kept / total:.1%}" if total else "none"
    passed = f"{source}: {kept} of {total} candidates passed" + (f" ({share})" if total else "")
    name, _, digest = source.rpartition("-")
    return Part(
        f"funnel-{source}",
        f"What became of {name or source} rows",
        (passed, *(f"  {reason}: {n}" for reason, n in [*counts.items(), *rejected] if reason != KEPT)),
        f"{total:,} candidates; {share} were kept." + (f" Source {digest}." if name else ""),
        counts={**counts, **dict(rejected)} if total else {},
        minor=[reason for reason, _ in rejected],
    )


def _counts(file: Path, known: Collection[str] | None = None) -> dict[str, int]:
    counts = read_json(file)
    if (
        not isinstance(counts, dict)
        or not all(isinstance(count, int | float) or count is None for count in counts.values())
        or (known is not None and not counts.keys() <= set(known))
    ):
        raise InputError("these are no counts", str(file), "Generate the rows again, or remove the file.")
    return counts


def _beside(folder: Path, ending: str) -> dict[str, Path]:
    files = sorted({*folder.glob(f"*{ending}"), *folder.glob(f"sources/*{ending}")})
    return {file.name.removesuffix(ending): file for file in files}


def _grouped(pairs: Iterable[tuple[str, Value]]) -> dict[str, list[Value]]:
    values: dict[str, list[Value]] = {}
    for kind, value in pairs:
        values.setdefault(kind, []).append(value)
    return values


def _spread(values: Sequence[int]) -> str:
    """Median, 95th percentile (the value that 95 % do not exceed) and largest."""
    ordered = sorted(values)
    most = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return f"median {median(ordered):g}, 95 % up to {most:g}, longest {ordered[-1]}"
