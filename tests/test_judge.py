"""Judges from outside, and the way in from Python."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest

from esr_train.errors import InputError
from esr_train.recipe import JudgeSection, Recipe
from eval.judging.judge import (
    Attempt,
    JudgeContext,
    JudgeItem,
    Judgement,
    first_scores,
    judge_responses,
    open_judge,
    register_judge,
)
from eval.judging.lexical import LexicalJudge
from recipes.resources import Resources
from tests.llm_stub import LlmStub
from tests.oracle import Oracle

LEXICAL = LexicalJudge({"sailing": ["mast", "jib", "rope"], "baking": ["dough", "oven", "flour"]})
PROMPT = "How do I raise the mast?"


class LengthSection(JudgeSection):
    """Longer replies are better ones."""

    kind: Literal["length"] = "length"
    longest: int = 10


@dataclass
class LengthJudge:
    """A judge from outside: the score is the share of the longest reply's length."""

    longest: int
    name: str = "length"

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        return [self._one(item.response) for item in items]

    def _one(self, response: str) -> Judgement:
        if not response:
            return Judgement((), self.name, error="nothing to measure")
        return Judgement((Attempt(0, len(response), 100 * len(response) / self.longest),), self.name)


@pytest.fixture
def length(registered_here: None) -> None:
    @register_judge("length", LengthSection)
    def open_length(section: LengthSection, context: JudgeContext) -> LengthJudge:
        return LengthJudge(section.longest)


def values(**judge: object) -> dict[str, object]:
    return {"name": "r", "model": {"path": "m"}, "judge": judge}


def test_a_kind_from_outside_is_registered_with_its_own_keys_and_a_recipe_names_it(length):
    recipe = Recipe.model_validate(values(kind="length", longest=20))
    judge = Resources(recipe).judge()
    assert judge.judge([JudgeItem("?", "ten chars!")])[0].attempts[0].score == 50
    assert recipe.model_dump()["judge"] == {"kind": "length", "longest": 20}
    with pytest.raises(ValueError, match="'lexical' has no key 'longest'; one of kind length has"):
        Recipe.model_validate(values(longest=20))


def test_without_registration_the_kind_is_unknown():
    with pytest.raises(ValueError, match=r"'length' is no kind of judge \(lexical, model, local, likelihood\)"):
        Recipe.model_validate(values(kind="length"))


def test_a_lexical_judge_without_vocabulary_is_told_the_key():
    with pytest.raises(InputError, match=r"judges\.1\.vocabulary: this key is missing"):
        open_judge(Recipe.model_validate(values()).judge, JudgeContext("judges.1"))


def test_a_local_judge_without_an_engine_says_so():
    section = Recipe.model_validate(values(kind="local", model="my/model")).judge
    with pytest.raises(InputError, match="my/model: there is no engine here"):
        open_judge(section, JudgeContext()).judge([JudgeItem("?", "Yes.")])


def test_first_scores_are_none_where_the_judge_failed():
    assert first_scores(LengthJudge(10), [JudgeItem("?", "ten chars!"), JudgeItem("?", "")]) == [100.0, None]
    two = LEXICAL.judge([JudgeItem(PROMPT, "Knead the dough. Oops. Raise the mast.")])
    assert [attempt.score for attempt in two[0].attempts] == [0.0, 100.0]
    assert first_scores(LEXICAL, [JudgeItem(PROMPT, "Knead the dough. Oops. Raise the mast.")]) == [0.0]


def test_responses_are_judged_from_python():
    found = judge_responses(LEXICAL, [PROMPT] * 2, ["Raise the mast.", "Knead the dough."], ["baking", "baking"])
    assert [each.attempts[0].score for each in found] == [100.0, 0.0]
    assert [each.flags["hijacked"] for each in found] == [False, True]
    assert "hijacked" not in judge_responses(LEXICAL, [PROMPT], ["Knead the dough."])[0].flags


def test_prompts_and_responses_that_do_not_pair_up_are_refused():
    with pytest.raises(InputError, match="2 prompts, 1 responses and 2 labels do not pair up"):
        judge_responses(LEXICAL, [PROMPT] * 2, ["Raise the mast."])


def test_a_model_is_asked_by_its_name_within_a_notebooks_event_loop(monkeypatch: pytest.MonkeyPatch):
    async def cell() -> list[Judgement]:
        return judge_responses(LlmStub.model, [PROMPT], ["Knead the dough. Oops. Raise the mast."])

    with LlmStub(Oracle(LEXICAL)) as stub:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        [found] = asyncio.run(cell())
    assert [attempt.score for attempt in found.attempts] == [0.0, 100.0]
