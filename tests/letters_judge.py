"""A plug-in: a judge that any reply of a random model differs by, the share of its characters that are one letter."""

from collections.abc import Sequence
from typing import Literal

from esr_train.recipe import JudgeSection
from eval.judging.judge import Attempt, JudgeContext, JudgeItem, Judgement, register_judge


class LettersJudgeSection(JudgeSection):
    """Its keys under `judge`."""

    kind: Literal["letters"] = "letters"


class LettersJudge:
    """One attempt a reply."""

    name = "letters"

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """One judgement an item, in order."""
        shares = [100.0 * item.response.count("e") / (len(item.response) + 1) for item in items]
        return [Judgement((Attempt(0, 1, share),), self.name) for share in shares]


@register_judge("letters", LettersJudgeSection)
def letters(section: LettersJudgeSection, context: JudgeContext) -> LettersJudge:
    """Opens the judge that a recipe describes."""
    return LettersJudge()
