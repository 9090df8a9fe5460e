"""A judge: an attempt scores the share of its sentences in which a word of the question occurs.

plugins: [examples/plugins/judge.py]
judge: {kind: overlap, letters: 4}
"""

import re
from collections.abc import Sequence
from typing import Literal

from esr_train.recipe import JudgeSection
from esr_train.restarts import attempts, sentences
from eval.judging.judge import Attempt, JudgeContext, JudgeItem, Judgement, register_judge


class OverlapJudgeSection(JudgeSection):
    """Its keys under `judge`."""

    kind: Literal["overlap"] = "overlap"
    letters: int = 4


class OverlapJudge:
    """Words of fewer than `letters` letters do not count."""

    def __init__(self, letters: int) -> None:
        self.name = f"overlap-{letters}"
        self._word = re.compile(rf"\w{{{letters},}}")

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """One judgement an item, in order; what cannot be judged has an `error`, never a score of 0."""
        return [self._judge(item) for item in items]

    def _judge(self, item: JudgeItem) -> Judgement:
        if not (asked := self._words(item.prompt)):
            return Judgement((), self.name, error="the question has no long word")
        scored = []
        for start, end in attempts(item.response):
            text = item.response[start:end]
            hits = [bool(asked & self._words(text[first:last])) for first, last in sentences(text)]
            scored.append(Attempt(start, end, 100.0 * sum(hits) / max(len(hits), 1)))
        return Judgement(tuple(scored), self.name)

    def _words(self, text: str) -> set[str]:
        return set(self._word.findall(text.casefold()))


@register_judge("overlap", OverlapJudgeSection)
def overlap(section: OverlapJudgeSection, context: JudgeContext) -> OverlapJudge:
    """Opens the judge that a recipe describes."""
    return OverlapJudge(section.letters)
