"""A transcript: one prompt, one reply cut into spans, and the steering that made it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from esr_train.files import read_jsonl, write_jsonl
from esr_train.values import only_keys, typed

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
class VectorRef:
    """A steering vector of one's own: its file, and the hash of what is in it."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Steering:
    """The steering under which a detour was written: h += raw * v after decoder layer `layer`.

    Args:
        sae, latent: v is the latent's decoder row; None where `vector` is v.
        layer: counted from 0.
        label: what v stands for, if known.
        strength: how far along v.
        vector: v itself; None where it is a latent's.

    Raises:
        ValueError: unless there is either a latent of an SAE or a vector.
    """

    sae: SaeRef | None
    layer: int
    latent: int | None
    label: str | None
    strength: Strength
    vector: VectorRef | None = None

    def __post_init__(self) -> None:
        if (self.sae is None) is (self.vector is None) or (self.sae is None) is not (self.latent is None):
            raise ValueError("steering names either `sae` and `latent`, or `vector`")


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
        "steering": transcript.steering and _steering_to_json(transcript.steering),
        "source": transcript.source,
        "meta": transcript.meta,
    }


def _steering_to_json(steering: Steering) -> dict[str, Any]:
    values = asdict(steering)
    left_out = ("sae", "latent") if steering.vector else ("vector",)
    order = ("sae", "vector", "layer", "latent", "label", "strength")
    return {key: values[key] for key in order if key not in left_out}


def from_json(value: Any) -> Transcript:
    """The inverse of `to_json`; `system`, `steering` and `meta` may be left out.

    Raises:
        ValueError, KeyError, TypeError: for anything that is not a transcript; messages name the key.
    """
    if not isinstance(value, dict):
        raise TypeError(f"a transcript is a JSON object, not {type(value).__name__}")
    only_keys(value, ("id", "prompt", "system", "spans", "steering", "source", "meta"), "a transcript")
    source = value["source"]
    if source not in get_args(Source):
        raise ValueError(f"source {source!r} is none of {', '.join(get_args(Source))}")
    spans = tuple(_span(span) for span in typed(value, "spans", list))
    if not any(span.text.strip() for span in spans):
        raise ValueError("the reply is empty: no span has text")
    meta = {} if value.get("meta") is None else dict(typed(value, "meta", dict))
    if meta.get("threshold") is not None:
        typed(typed(meta, "threshold", dict), "raw", float)
    return Transcript(
        id=typed(value, "id", str),
        prompt=typed(value, "prompt", str),
        system=None if value.get("system") is None else typed(value, "system", str),
        spans=spans,
        steering=None if value.get("steering") is None else _steering(typed(value, "steering", dict)),
        source=source,
        meta=meta,
    )


def _span(value: Any) -> Span:
    if not isinstance(value, dict):
        raise TypeError(f"a span is a JSON object, not {type(value).__name__}")
    only_keys(value, ("kind", "text"), "a span")
    kind = value["kind"]
    if kind not in list(SpanKind):
        raise ValueError(f"span kind {kind!r} is none of {', '.join(SpanKind)}")
    return Span(SpanKind(kind), typed(value, "text", str))


def _steering(value: dict[str, Any]) -> Steering:
    only_keys(value, ("sae", "vector", "layer", "latent", "label", "strength"), "steering")
    sae, latent, vector = (value.get(key) for key in ("sae", "latent", "vector"))
    if sae is not None:
        only_keys(typed(value, "sae", dict), ("release", "id"), "an SAE's name")
        sae = SaeRef(typed(sae, "release", str), typed(sae, "id", str))
        latent = _index(value, "latent")
    if vector is not None:
        only_keys(typed(value, "vector", dict), ("file", "sha256"), "a vector's name")
        vector = VectorRef(typed(vector, "file", str), typed(vector, "sha256", str))
    label = None if value.get("label") is None else typed(value, "label", str)
    return Steering(sae, _index(value, "layer"), latent, label, _strength(typed(value, "strength", dict)), vector)


def _index(value: dict[str, Any], key: str) -> int:
    index = typed(value, key, int)
    if index < 0:
        raise ValueError(f"{key} is counted from 0, and {index} is less")
    return index


def _strength(value: dict[str, Any]) -> Strength:
    only_keys(value, ("raw", "norm"), "a strength")
    return Strength(typed(value, "raw", float), typed(value, "norm", float))


def read_transcripts(path: Path | str) -> list[Transcript]:
    """Read a transcript JSONL file; errors name `file:line`."""
    return read_jsonl(path, from_json)


def write_transcripts(path: Path | str, transcripts: Iterable[Transcript]) -> int:
    """Write a transcript JSONL file, whole or not at all; returns the number of rows."""
    return write_jsonl(path, (to_json(transcript) for transcript in transcripts))
