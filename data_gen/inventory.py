"""What a file of transcripts holds, counted."""

import math
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data_gen.collect import KEPT
from esr_train.files import read_json
from esr_train.masking import Labelled, Policy, label
from esr_train.transcript import SpanKind, Transcript
from eval.llm import Spent

OPENING_WORDS = 3
"""Words of a cue that are compared when its variety is measured."""
FUNNEL, REQUESTS = ".funnel.json", ".requests.json"


@dataclass(frozen=True)
class Spread:
    """A distribution in three numbers."""

    median: float
    p95: float
    longest: int


@dataclass(frozen=True)
class CueDiversity:
    """How differently rows turn back.

    Args:
        counts: first three words of cues, letters' case aside -> cue spans that open so, commonest first.
    """

    counts: Mapping[str, int]

    @property
    def cues(self) -> int:
        """Cue spans counted."""
        return sum(self.counts.values())

    @property
    def openings(self) -> int:
        """Distinct first three words."""
        return len(self.counts)

    @property
    def entropy(self) -> float:
        """Of the openings, in bits; 0 if all are the same, log2(openings) if all are equally common."""
        shares = [count / self.cues for count in self.counts.values()]
        return sum(share * math.log2(1 / share) for share in shares)

    @property
    def commonest(self) -> tuple[str, float] | None:
        """The commonest opening and its share."""
        return next(((text, count / self.cues) for text, count in self.counts.items()), None)


@dataclass(frozen=True)
class Inventory:
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
        cues: their diversity.
    """

    rows: Mapping[str, tuple[int, int]]
    topics: Mapping[str, int]
    latents: Mapping[str, int]
    unit: str
    lengths: Mapping[str, Sequence[int]]
    tokens: Sequence[tuple[int, int]] | None
    corrects: Sequence[bool]
    scores: Mapping[str, Sequence[float]]
    cues: CueDiversity

    @property
    def trained(self) -> float | None:
        """Share of the tokens that carry loss."""
        if self.tokens is None:
            return None
        return sum(trained for _, trained in self.tokens) / sum(total for total, _ in self.tokens)


def take(
    rows: Sequence[Transcript], tokenizer: PreTrainedTokenizerBase | None = None, policy: Policy = "masked"
) -> Inventory:
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
    turned = Counter(row.source for row in rows if row.corrects)
    return Inventory(
        rows={source: (sources[source], turned[source]) for source in sorted(sources)},
        topics=_counted(str(row.meta["topic"]) for row in rows if "topic" in row.meta),
        latents=_latents(rows),
        unit="characters" if labelled is None else "tokens",
        lengths=_lengths(rows) if labelled is None else _token_lengths(labelled),
        tokens=None if labelled is None else [(len(each.labels), each.trained) for each in labelled],
        corrects=[row.corrects for row in rows],
        scores=_scores(rows),
        cues=cue_diversity(rows),
    )


def cue_diversity(rows: Sequence[Transcript]) -> CueDiversity:
    """Distinct openings of the rows' cues, and their entropy."""
    cues = (span.text for row in rows for span in row.spans if span.kind is SpanKind.CUE)
    return CueDiversity(_counted(" ".join(cue.lower().split()[:OPENING_WORDS]) for cue in cues))


def spread(values: Sequence[int]) -> Spread:
    """Median, 95th percentile (the value that 95 % do not exceed) and largest of some numbers."""
    ordered = sorted(values)
    place = math.ceil(0.95 * len(ordered)) - 1
    return Spread(statistics.median(ordered), ordered[place], ordered[-1])


def funnels(path: Path) -> dict[str, dict[str, int]]:
    """The funnels that lie beside a file, or in a folder: source -> how many candidates ended how."""
    return {name: read_json(file) for name, file in _beside(path, FUNNEL).items()}


def requests(path: Path) -> dict[str, Spent]:
    """What writers were asked, by source, from the files that lie beside a file or in a folder."""
    return {name: Spent(**read_json(file)) for name, file in _beside(path, REQUESTS).items()}


def _beside(path: Path, ending: str) -> dict[str, Path]:
    folder = path if path.is_dir() else path.parent
    found = sorted({*folder.glob(f"*{ending}"), *folder.glob(f"sources/*{ending}")})
    return {each.name.removesuffix(ending): each for each in found}


def lines(inventory: Inventory) -> list[str]:
    """The inventory for a person to read."""
    total, corrections = len(inventory.corrects), sum(inventory.corrects)
    sources = ", ".join(f"{name} {count}" for name, (count, _) in inventory.rows.items())
    said = [
        f"rows: {total} ({sources})",
        f"self-correction: {corrections} ({corrections / total:.1%})",
        f"topics: {len(inventory.topics)}",
        f"latents: {len(inventory.latents)}",
        *(f"{name} length: {_shown(spread(each))} {inventory.unit}" for name, each in inventory.lengths.items()),
    ]
    if inventory.tokens is not None:
        said += [f"row length: {_shown(spread([total for total, _ in inventory.tokens]))} tokens"]
        said += [f"trained tokens: {inventory.trained:.1%}"]
    return [*said, *_cue_lines(inventory.cues)]


def funnel_lines(source: str, funnel: Mapping[str, int]) -> list[str]:
    """One source's funnel for a person to read: what was kept, and why the others were not."""
    head, *rejected = funnel_parts(funnel)
    total = sum(funnel.values())
    passed = f"{source}: {head[1]} of {total} candidates passed" + (f" ({head[1] / total:.1%})" if total else "")
    return [passed, *(f"  {name}: {count}" for name, count in rejected)]


def funnel_parts(funnel: Mapping[str, int]) -> list[tuple[str, int]]:
    """How candidates ended: those that were kept, then the reasons against the others, commonest first."""
    rejected = Counter({name: count for name, count in funnel.items() if name != KEPT})
    return [(KEPT, funnel.get(KEPT, 0)), *rejected.most_common()]


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _latents(rows: Sequence[Transcript]) -> dict[str, int]:
    steered = [row.steering for row in rows if row.steering]
    counts = Counter((each.sae, each.latent) for each in steered)
    labels = {(each.sae, each.latent): each.label for each in steered}
    saes = {each.sae for each in steered}
    named = {}
    for (sae, latent), count in counts.most_common():
        parts = [
            f"{latent} {labels[sae, latent] or ''}".strip(),
            *([f"({sae.id if sae else 'a vector'})"] if len(saes) > 1 else []),
        ]
        named[" ".join(parts)] = count
    return named


def _lengths(rows: Sequence[Transcript]) -> dict[str, list[int]]:
    lengths: dict[str, list[int]] = {"reply": [len(row.content) for row in rows]}
    for row in rows:
        for span in row.spans:
            lengths.setdefault(str(span.kind), []).append(len(span.text))
    return lengths


def _token_lengths(labelled: Sequence[Labelled]) -> dict[str, list[int]]:
    """As `_lengths`; a token belongs to the span in which it begins."""
    lengths: dict[str, list[int]] = {"reply": []}
    for row in labelled:
        starts = [start for start, end in row.offsets if end > start]
        counts = [bisect_left(starts, end) - bisect_left(starts, start) for _, start, end in row.spans]
        lengths["reply"].append(sum(counts))
        for (kind, _, _), count in zip(row.spans, counts, strict=True):
            lengths.setdefault(str(kind), []).append(count)
    return lengths


def _scores(rows: Sequence[Transcript]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        scores = row.meta.get("scores")
        for kind, score in scores.items() if isinstance(scores, dict) else ():
            if isinstance(score, int | float):
                found.setdefault(kind, []).append(float(score))
    return found


def _shown(value: Spread) -> str:
    return f"median {value.median:g}, 95 % up to {value.p95:g}, longest {value.longest}"


def _cue_lines(cues: CueDiversity) -> list[str]:
    if cues.commonest is None:
        return ["cues: none"]
    text, share = cues.commonest
    return [
        f"cues: {cues.cues}, {cues.openings} distinct openings of three words, entropy {cues.entropy:.2f} bits; "
        f"commonest {text!r} ({share:.1%})"
    ]
