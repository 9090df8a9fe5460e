"""What a judge is given and what it says. A judge never sees which arm wrote a response."""

from collections.abc import Mapping, Sequence
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
    """One response to judge.

    Args:
        prompt: the user's message.
        response: the model's reply.
        label: what the steering latent stands for; None: unsteered, or unknown.
        recovery: whether `silent_recovery` is wanted, which may cost a question of its own.
    """

    prompt: str
    response: str
    label: str | None = None
    recovery: bool = False


@dataclass(frozen=True)
class Judgement:
    """A judge's word on one response.

    Args:
        attempts: in order, covering the response; empty when `error` is set.
        judge: the judge's name.
        raw: its answer as it came (for a person to check).
        flags: further yes/no findings: `degenerate` (word salad or repetition), `hijacked` (the last attempt is
            mainly about the latent's label), `silent_recovery` (off-topic at first, back on topic at the end,
            without a restart). A finding the judge cannot make is left out; one that it failed to make is None.
        error: why there is no score; the trial is then `unscored`, never 0.
    """

    attempts: tuple[Attempt, ...]
    judge: str
    raw: str = ""
    flags: Mapping[str, bool | None] = field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The judgement as it stands in a trial row."""
        return {
            "attempts": [{"start": a.start, "end": a.end, "score": a.score} for a in self.attempts],
            "judge": self.judge,
            "judge_raw": self.raw,
            "flags": dict(self.flags),
            "error": self.error,
        }


class Judge(Protocol):
    """Splits responses into attempts and scores each for answering the prompt, 0-100."""

    name: str

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """One judgement an item, in order; failures come back as `error`, they are not raised."""
        ...
