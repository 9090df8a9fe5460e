"""What a file of transcripts holds, counted."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from esr_train.errors import InputError
from esr_train.files import read_json
from esr_train.masking import Policy, label
from esr_train.sections.data import CueDiversitySection
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
        cues: cue spans counted.
        openings: distinct first three words, letters' case aside.
        entropy: of the openings, in bits; 0 if all are the same, log2(openings) if all are equally common.
        commonest: the commonest opening and its share.
    """

    cues: int
    openings: int
    entropy: float
    commonest: tuple[str, float] | None


@dataclass(frozen=True)
class Inventory:
    """What a file holds.

    Args:
        rows: rows per source.
        corrections: rows that turn back from a detour.
        topics, latents: distinct ones, where rows name them.
        lengths: of replies, in characters, per span kind (`reply`: the whole).
        tokens: of whole rows; None without a tokenizer.
        trained: share of the tokens that carry loss; None without a tokenizer.
        cues: their diversity.
    """

    rows: dict[str, int]
    corrections: int
    topics: int
    latents: int
    lengths: dict[str, Spread]
    tokens: Spread | None
    trained: float | None
    cues: CueDiversity


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
    labelled = [label(tokenizer, row, policy) for row in rows] if tokenizer else []
    tokens = [len(each.labels) for each in labelled]
    return Inventory(
        rows=dict(sorted(Counter(row.source for row in rows).items())),
        corrections=sum(row.corrects for row in rows),
        topics=len({row.meta["topic"] for row in rows if "topic" in row.meta}),
        latents=len({(row.steering.sae, row.steering.latent) for row in rows if row.steering}),
        lengths=_lengths(rows),
        tokens=spread(tokens) if tokens else None,
        trained=sum(each.trained for each in labelled) / sum(tokens) if tokens else None,
        cues=cue_diversity(rows),
    )


def cue_diversity(rows: Sequence[Transcript]) -> CueDiversity:
    """Distinct openings of the rows' cues, and their entropy."""
    cues = [span.text for row in rows for span in row.spans if span.kind is SpanKind.CUE]
    openings = Counter(" ".join(cue.lower().split()[:OPENING_WORDS]) for cue in cues)
    shares = [count / len(cues) for count in openings.values()]
    commonest = next(((text, count / len(cues)) for text, count in openings.most_common(1)), None)
    entropy = sum(share * math.log2(1 / share) for share in shares)
    return CueDiversity(len(cues), len(openings), entropy, commonest)


def require_diversity(rows: Sequence[Transcript], least: CueDiversitySection) -> None:
    """Refuse rows whose cues are more alike than a recipe allows.

    Raises:
        InputError: naming what was measured and what was demanded.
    """
    found = cue_diversity(rows)
    if found.openings < least.openings or found.entropy < least.entropy:
        raise InputError(
            f"the cues of the {len(rows)} rows have {found.openings} distinct openings of three words and "
            f"{found.entropy:.2f} bits of entropy; at least {least.openings} and {least.entropy:g} are demanded",
            "data.cue_diversity",
            "Take a cue file with more phrasings (leave `cues` out for the shipped one), or demand less.",
        )


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
    total = sum(inventory.rows.values())
    sources = ", ".join(f"{name} {count}" for name, count in inventory.rows.items())
    said = [
        f"rows: {total} ({sources})",
        f"self-correction: {inventory.corrections} ({inventory.corrections / total:.1%})",
        f"topics: {inventory.topics}, latents: {inventory.latents}",
        *(f"{name} length: {_shown(each)} characters" for name, each in inventory.lengths.items()),
    ]
    if inventory.tokens and inventory.trained is not None:
        said += [f"row length: {_shown(inventory.tokens)} tokens", f"trained tokens: {inventory.trained:.1%}"]
    return [*said, *_cue_lines(inventory.cues)]


def funnel_lines(source: str, funnel: dict[str, int]) -> list[str]:
    """One source's funnel for a person to read: what was kept, and why the others were not."""
    total, kept = sum(funnel.values()), funnel.get("kept", 0)
    rejected = sorted(((name, n) for name, n in funnel.items() if name != "kept"), key=lambda pair: -pair[1])
    head = f"{source}: {kept} of {total} candidates passed" + (f" ({kept / total:.1%})" if total else "")
    return [head, *(f"  {name}: {count}" for name, count in rejected)]


def _lengths(rows: Sequence[Transcript]) -> dict[str, Spread]:
    lengths: dict[str, list[int]] = {"reply": [len(row.content) for row in rows]}
    for row in rows:
        for span in row.spans:
            lengths.setdefault(str(span.kind), []).append(len(span.text))
    return {name: spread(values) for name, values in lengths.items()}


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
