"""The stub itself: through inspect_ai's model API it answers, and fails, as scripted."""

import asyncio
import json

import pytest

from tests.llm_stub import FAULTS, KEY, PROSE, Faults, LlmStub, spoiled

ANSWER = '{"attempts": [{"begins": "Knead", "score": 12}], "degenerate": false}'


def ask(stub: LlmStub, text: str) -> str:
    from inspect_ai.model import GenerateConfig, get_model

    async def generate() -> str:
        config = GenerateConfig(max_retries=0)
        async with get_model(stub.model, base_url=stub.url, api_key=KEY, memoize=False, config=config) as model:
            return (await model.generate(text)).completion

    return asyncio.run(generate())


def test_it_answers_through_inspect_ai_and_counts_tokens():
    with LlmStub(lambda messages: messages[-1]["content"].upper()) as stub:
        assert ask(stub, "hello there") == "HELLO THERE"
        assert [each[-1]["content"] for each in stub.requests] == ["hello there"]


def test_a_wrong_key_is_refused():
    from inspect_ai.model import GenerateConfig, get_model

    async def generate() -> None:
        config = GenerateConfig(max_retries=0)
        async with get_model(stub.model, base_url=stub.url, api_key="x", memoize=False, config=config) as model:
            await model.generate("hello")

    with LlmStub(lambda messages: "hi") as stub:
        with pytest.raises(Exception, match="401"):
            asyncio.run(generate())
        assert stub.requests == []


def test_faults_depend_on_the_request_and_on_how_often_it_came_before():
    faults = Faults(share=0.3)
    drawn = [faults.of(f"request {number}", 0) for number in range(2000)]
    assert 0.25 < sum(each is not None for each in drawn) / 2000 < 0.35
    assert set(drawn) == {None, *FAULTS}
    assert drawn == [faults.of(f"request {number}", 0) for number in range(2000)]
    assert drawn != [faults.of(f"request {number}", 1) for number in range(2000)]


def test_a_script_is_followed_and_then_ends():
    faults = Faults(script=["429", None, "half"])
    assert [faults.of("any", before) for before in range(5)] == ["429", None, "half", None, None]


def test_a_spoiled_answer_is_what_its_name_says():
    assert spoiled(ANSWER, None) == ANSWER
    assert ANSWER.startswith(spoiled(ANSWER, "half"))
    assert spoiled(ANSWER, "prose") == PROSE
    assert spoiled(ANSWER, "empty") == ""
    scores = [json.loads(spoiled(ANSWER, fault))["attempts"][0]["score"] for fault in FAULTS[-3:]]
    assert scores == [250, "high", "12"]
