"""What a judge is given and what it says. A judge never sees which arm wrote a response."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Attempt:
    """A stretch [start, end) of a response, in characters, and its score 0-100 (None: unscored)."""

    start: int
    end: int
    score: float | None


@dataclass(frozen=True)
class JudgeItem:
    """One response to judge: the prompt, the response, and the steering latent's label (None: unknown)."""

    prompt: str
    response: str
    label: str | None = None


@dataclass(frozen=True)
class Judgement:
    """A judge's word on one response.

    Args:
        attempts: in order, covering the response; empty when `error` is set.
        judge: the judge's name.
        raw: its answer as it came (for a person to check).
        flags: further yes/no findings: `degenerate` (word salad or repetition), `hijacked` (the last attempt is
            mainly about the latent's label), `silent_recovery` (off-topic at first, back on topic at the end,
            without a restart). A finding the judge cannot make is left out.
        error: why there is no score; the trial is then `unscored`, never 0.
    """

    attempts: tuple[Attempt, ...]
    judge: str
    raw: str = ""
    flags: dict[str, bool] = field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The judgement as it stands in a trial row."""
        return {
            "attempts": [{"start": a.start, "end": a.end, "score": a.score} for a in self.attempts],
            "judge": self.judge,
            "judge_raw": self.raw,
            "flags": self.flags,
            "error": self.error,
        }


class Judge(Protocol):
    """Splits responses into attempts and scores each for answering the prompt, 0-100."""

    name: str

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """One judgement an item, in order; failures come back as `error`, they are not raised."""
        ...
