"""A transcript: one prompt, one reply cut into spans, and the steering that made it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from esr_train.files import read_jsonl, write_jsonl
from esr_train.values import typed

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
        vector: v itself; None where it is a latent's.

    Raises:
        ValueError: unless there is either a latent of an SAE or a vector; for a layer or latent below 0.
    """

    sae: SaeRef | None
    layer: int
    latent: int | None
    label: str | None
    strength: Strength
    vector: VectorRef | None = None

    def __post_init__(self) -> None:
        if min(self.layer, self.latent or 0) < 0:
            raise ValueError("layer and latent are counted from 0")
        if (self.sae is None) is (self.vector is None) or (self.sae is None) is not (self.latent is None):
            raise ValueError("steering names either `sae` and `latent`, or `vector`")


@dataclass(frozen=True)
class Transcript:
    """One row of training data. The spans' texts concatenated are exactly the assistant's content.

    `rejected` is another whole reply, to which this one is preferred; most rows have none.
    """

    id: str
    prompt: str
    spans: tuple[Span, ...]
    source: Source
    system: str | None = None
    steering: Steering | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[Span, ...] | None = None

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
    rejected = {} if transcript.rejected is None else {"rejected": _spans_to_json(transcript.rejected)}
    return {
        "id": transcript.id,
        "prompt": transcript.prompt,
        "system": transcript.system,
        "spans": _spans_to_json(transcript.spans),
        **rejected,
        "steering": transcript.steering and _steering_to_json(transcript.steering),
        "source": transcript.source,
        "meta": transcript.meta,
    }


def _spans_to_json(spans: Iterable[Span]) -> list[dict[str, str]]:
    return [{"kind": str(span.kind), "text": span.text} for span in spans]


def _steering_to_json(steering: Steering) -> dict[str, Any]:
    values = asdict(steering)
    left_out = ("sae", "latent") if steering.vector else ("vector",)
    order = ("sae", "vector", "layer", "latent", "label", "strength")
    return {key: values[key] for key in order if key not in left_out}


def from_json(value: Any) -> Transcript:
    """The inverse of `to_json`; `system`, `rejected`, `steering` and `meta` may be left out.

    Raises:
        ValueError: for anything that is not a transcript; the message names the key.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a transcript is a JSON object, not {type(value).__name__}")
    steering = value.get("steering")
    if isinstance(steering, dict):
        steering = {"sae": None, "latent": None, "label": None, **steering}
    meta = {} if value.get("meta") is None else value["meta"]
    transcript = typed(Transcript, {**value, "steering": steering, "meta": meta})
    if not transcript.content.strip():
        raise ValueError("the reply is empty: no span has text")
    if transcript.rejected is not None:
        rejected = "".join(span.text for span in transcript.rejected)
        if not rejected.strip() or rejected == transcript.content:
            raise ValueError("rejected: it is empty, or the same reply")
    if transcript.meta.get("threshold") is not None:
        typed(float, typed(dict, transcript.meta["threshold"], "meta.threshold").get("raw"), "meta.threshold.raw")
    return transcript


def read_transcripts(path: Path | str) -> list[Transcript]:
    """Read a transcript JSONL file; errors name `file:line`."""
    return read_jsonl(path, from_json)


def write_transcripts(path: Path | str, transcripts: Iterable[Transcript]) -> int:
    """Write a transcript JSONL file, whole or not at all; returns the number of rows."""
    return write_jsonl(path, (to_json(transcript) for transcript in transcripts))
