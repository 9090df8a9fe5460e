"""A transcript: one prompt, one reply cut into spans, and the steering that made it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from esr_train.files import read_jsonl, write_jsonl

Source = Literal["steered", "prompted", "normal", "imported"]


class SpanKind(StrEnum):
    """What a stretch of the reply is: the detour, the words that turn back, or a real answer."""

    OFF_TOPIC = "off_topic"
    CUE = "cue"
    ANSWER = "answer"


@dataclass(frozen=True)
class Span:
    """A stretch of the reply. Whitespace between two spans belongs to the later one."""

    kind: SpanKind
    text: str


@dataclass(frozen=True)
class SaeRef:
    """An SAE by sae-lens release and id; a local one by folder (`release`) and sub-folder (`id`)."""

    release: str
    id: str


@dataclass(frozen=True)
class Strength:
    """How far along a latent's direction, in both units.

    `raw` counts multiples of the SAE's decoder row (the paper's b); `norm` counts multiples of the layer's
    median residual norm (BOS left out) along the unit direction.
    """

    raw: float
    norm: float

    def times(self, factor: float) -> "Strength":
        """The same direction, `factor` times as far."""
        return Strength(self.raw * factor, self.norm * factor)


@dataclass(frozen=True)
class Steering:
    """The steering under which a detour was written: h += raw * W_dec[latent] after decoder layer `layer`."""

    sae: SaeRef
    layer: int
    latent: int
    label: str | None
    strength: Strength


@dataclass(frozen=True)
class Transcript:
    """One row of training data. The spans' texts concatenated are exactly the assistant's content."""

    id: str
    prompt: str
    spans: tuple[Span, ...]
    source: Source
    system: str | None = None
    steering: Steering | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The assistant's whole reply."""
        return "".join(span.text for span in self.spans)

    @property
    def corrects(self) -> bool:
        """Whether the reply turns back from a detour."""
        return any(span.kind is SpanKind.CUE for span in self.spans)


def to_json(transcript: Transcript) -> dict[str, Any]:
    """The transcript as a JSON object, keys in the documented order."""
    return {
        "id": transcript.id,
        "prompt": transcript.prompt,
        "system": transcript.system,
        "spans": [{"kind": str(span.kind), "text": span.text} for span in transcript.spans],
        "steering": asdict(transcript.steering) if transcript.steering else None,
        "source": transcript.source,
        "meta": transcript.meta,
    }


def from_json(value: Any) -> Transcript:
    """The inverse of `to_json`.

    Raises:
        ValueError, KeyError, TypeError: for anything that is not a transcript; messages name the key.
    """
    if not isinstance(value, dict):
        raise TypeError(f"a transcript is a JSON object, not {type(value).__name__}")
    source = value["source"]
    if source not in get_args(Source):
        raise ValueError(f"source {source!r} is none of {', '.join(get_args(Source))}")
    spans = tuple(_span(span) for span in _typed(value, "spans", list))
    if not any(span.text.strip() for span in spans):
        raise ValueError("the reply is empty: no span has text")
    return Transcript(
        id=_typed(value, "id", str),
        prompt=_typed(value, "prompt", str),
        system=None if value.get("system") is None else _typed(value, "system", str),
        spans=spans,
        steering=None if value.get("steering") is None else _steering(_typed(value, "steering", dict)),
        source=source,
        meta={} if value.get("meta") is None else dict(_typed(value, "meta", dict)),
    )


def _typed(value: dict[str, Any], key: str, kind: type) -> Any:
    found = value[key]
    if not isinstance(found, kind):
        raise TypeError(f"{key} must be of type {kind.__name__}, not {type(found).__name__}")
    return found


def _span(value: Any) -> Span:
    if not isinstance(value, dict):
        raise TypeError(f"a span is a JSON object, not {type(value).__name__}")
    kind = value["kind"]
    if kind not in set(SpanKind):
        raise ValueError(f"span kind {kind!r} is none of {', '.join(SpanKind)}")
    return Span(SpanKind(kind), _typed(value, "text", str))


def _steering(value: dict[str, Any]) -> Steering:
    sae, strength = _typed(value, "sae", dict), _typed(value, "strength", dict)
    return Steering(
        sae=SaeRef(str(sae["release"]), str(sae["id"])),
        layer=int(value["layer"]),
        latent=int(value["latent"]),
        label=value.get("label"),
        strength=Strength(float(strength["raw"]), float(strength["norm"])),
    )


def read_transcripts(path: Path | str) -> list[Transcript]:
    """Read a transcript JSONL file; errors name `file:line`."""
    return read_jsonl(path, from_json)


def write_transcripts(path: Path | str, transcripts: Iterable[Transcript]) -> int:
    """Write a transcript JSONL file, whole or not at all; returns the number of rows."""
    return write_jsonl(path, (to_json(transcript) for transcript in transcripts))
