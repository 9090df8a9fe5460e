"""Asking a language model: retries, refusals, the cache, what it costs, and what is never written down."""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from esr_train.errors import InputError, RunError
from esr_train.steering.engine import Completion, Sampling
from eval.llm import Answer, Asker, Cache, Reply, Spent, without_secrets
from eval.llm_clients import EngineLlm, InspectLlm
from tests.llm_stub import KEY, TEXT_FAULTS, TRANSPORT_FAULTS, Faults, LlmStub, Messages


class Scripted:
    """An `Llm` that gives the next of its replies to every question."""

    name = "scripted"
    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, *texts: str | None) -> None:
        self.texts, self.spent, self.questions = list(texts), Spent(), list[str]()

    def ask(self, questions: Sequence[str], answered: Callable[[], None] = lambda: None) -> list[Reply]:
        self.questions += questions
        found = [self.texts.pop(0) for _ in questions]
        return [Reply(text, None if text is not None else "no reply") for text in found]


def number(place: int, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{text!r} is not a number.")
    return int(text)


def shout(messages: Messages) -> str:
    return messages[-1]["content"].upper()


def upper(place: int, text: str) -> str:
    if not text or text != text.upper():
        raise ValueError("not in capitals")
    return text


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Callable[[LlmStub], InspectLlm]:
    def make(stub: LlmStub, **settings: Any) -> InspectLlm:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        return InspectLlm(stub.model, **{"timeout": 60, "wait": 0.01, **settings})

    return make


def test_a_reply_that_cannot_be_used_is_asked_for_again_with_the_reason():
    llm = Scripted("seven", "7")
    assert Asker(llm).ask(["How many?"], number) == [Answer(7, "7")]
    assert llm.questions[0] == "How many?"
    assert llm.questions[1].startswith("How many?\n\nAn earlier reply could not be used: 'seven' is not a number. ")
    assert llm.spent.refused == 1


def test_only_the_questions_without_an_answer_are_asked_again():
    llm = Scripted("1", "two", "3", "2")
    answers = Asker(llm).ask(["a", "b", "c"], number)
    assert [answer.value for answer in answers] == [1, 2, 3]
    assert len(llm.questions) == 4


def test_a_question_that_never_gets_a_usable_reply_says_why():
    llm = Scripted("x", None, "y")
    [answer] = Asker(llm, rounds=3).ask(["How many?"], number)
    assert answer == Answer(None, "y", "'y' is not a number")
    assert llm.spent.failed == 1


def test_usable_answers_are_kept_and_refused_ones_are_not(tmp_path: Path):
    cache = Cache(tmp_path / "cache")
    Asker(Scripted("x", "1"), cache, rounds=1).ask(["a", "b"], number)
    llm = Scripted("9")
    answers = Asker(llm, cache).ask(["a", "b"], number)
    assert [answer.value for answer in answers] == [9, 1]
    assert llm.questions == ["a"]
    assert llm.spent.cached == 1


def test_the_cache_knows_models_settings_and_repeats_apart(tmp_path: Path):
    cache = Cache(tmp_path)
    Asker(Scripted("1"), cache).ask(["a"], number)
    other, warm = Scripted("2"), Scripted("3")
    other.name, warm.settings = "another", {"temperature": 1.0}
    assert Asker(other, cache).ask(["a"], number)[0].value == 2
    assert Asker(warm, cache).ask(["a"], number)[0].value == 3
    assert Asker(Scripted("4"), cache, repeat=1).ask(["a"], number)[0].value == 4
    assert Asker(Scripted(), cache).ask(["a"], number)[0].value == 1


@pytest.mark.parametrize("damage", ["", "{", '{"answer": 3}', "[]", '{"answer": "x"}'])
def test_a_damaged_cache_file_is_asked_anew_and_mended(tmp_path: Path, damage: str):
    cache = Cache(tmp_path)
    Asker(Scripted("1"), cache).ask(["a"], number)
    [file] = tmp_path.rglob("*.json")
    file.write_text(damage)
    assert Asker(Scripted("1"), cache).ask(["a"], number)[0].value == 1
    assert json.loads(file.read_text())["answer"] == "1"


@pytest.mark.parametrize("fault", [*TRANSPORT_FAULTS, *TEXT_FAULTS[:3]])
def test_every_fault_is_got_over(fault: str, reach):
    def answer(messages: Messages) -> str:
        return shout(messages).split()[0] + "!"

    def parse(place: int, text: str) -> str:
        if not text.endswith("!"):
            raise ValueError("not a shout")
        return text

    script = Faults(script=[fault, fault])
    with LlmStub(answer, script, subject=lambda messages: messages[-1]["content"].split()[0]) as stub:
        answers = Asker(reach(stub, timeout=2 if fault == "hang" else 60)).ask(["one", "two"], parse)
        assert [each.value for each in answers] == ["ONE!", "TWO!"]
        assert stub.met[fault] >= 2


def test_thirty_percent_of_faults_change_no_answer_and_their_number_is_known(reach, tmp_path: Path):
    questions = [f"question number {place}" for place in range(60)]
    with LlmStub(shout, Faults(share=0.3, kinds=("429", "500", "drop", "torn", "prose", "empty"))) as stub:
        llm = reach(stub)
        answers = Asker(llm, Cache(tmp_path)).ask(questions, lambda place, text: upper(place, text.split("\n")[0]))
        assert [each.value for each in answers] == [question.upper() for question in questions]
        assert llm.spent.refused == stub.met["prose"] + stub.met["empty"] > 0
        assert llm.spent.asked == 60 + llm.spent.refused
        assert llm.spent.failed == 0


def test_as_many_questions_are_open_at_once_as_were_allowed(reach):
    three = threading.Barrier(3, timeout=60)

    def together(messages: Messages) -> str:
        three.wait()
        return shout(messages)

    with LlmStub(together) as stub:
        Asker(reach(stub, concurrency=3, timeout=100)).ask([f"question {place}" for place in range(12)], upper)
        assert stub.busiest == 3


def test_tokens_and_dollars_are_counted(reach):
    with LlmStub(shout) as stub:
        llm = reach(stub, price=(2.0, 10.0))
        Asker(llm).ask(["one two three", "four"], upper)
    assert (llm.spent.read, llm.spent.written) == (4, 4)
    assert llm.spent.dollars == pytest.approx((4 * 2.0 + 4 * 10.0) / 1e6)
    assert "$0.00" in str(llm.spent)
    assert "$" not in str(Spent())


def test_the_key_is_written_nowhere(reach, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with LlmStub(shout, Faults(script=["429", "prose"])) as stub:
        answers = Asker(reach(stub), Cache(tmp_path)).ask([f"question {KEY[:4]}"], upper)
    assert answers[0].value
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 1
    assert KEY not in "".join((*written, *capfd.readouterr()))
    assert without_secrets(f"the key {KEY} is wrong") == "the key *** is wrong"


def test_a_refused_key_ends_the_run_at_once(reach, monkeypatch: pytest.MonkeyPatch):
    with LlmStub(shout) as stub:
        llm = reach(stub)
        monkeypatch.setenv("STUB_API_KEY", "another-key-altogether")
        with pytest.raises(InputError, match="stub/oracle: the key is refused"):
            Asker(llm).ask([f"question {place}" for place in range(20)], upper)


def test_a_missing_key_and_an_unknown_name_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STUB_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"openai-api/stub/x: .*STUB_API_KEY"):
        InspectLlm("openai-api/stub/x").ask(["a"])
    with pytest.raises(InputError, match="nobody/knows"):
        InspectLlm("nobody/knows").ask(["a"])


def test_a_model_out_of_reach_ends_the_run_instead_of_leaving_everything_unscored(reach, monkeypatch):
    monkeypatch.setattr("eval.llm_clients.TRIES", 2)
    with LlmStub(shout, Faults(script=["500"] * 100)) as stub:
        llm = reach(stub, concurrency=32, wait=0.0)
        with pytest.raises(RunError, match="answered none of 8 questions"):
            Asker(llm).ask([f"question {place}" for place in range(8)], upper)
        [few] = Asker(llm, rounds=1).ask(["alone"], upper)
        assert "no reply in 2 tries" in few.error


def test_a_client_goes_on_after_its_first_batch(reach):
    with LlmStub(shout) as stub:
        llm = reach(stub)
        assert [Asker(llm).ask([text], upper)[0].value for text in ("one", "two", "three")] == ["ONE", "TWO", "THREE"]


class Engine:
    name = "fake"

    def generate(self, requests: Any, sampling: Sampling, progress: Any = None) -> list[Completion]:
        self.asked, self.sampling = requests, sampling
        return [Completion(each.id, each.prompt.upper(), (1, 2, 3), "stop", 5, 0) for each in requests]


def test_a_local_model_answers_through_our_engine_and_is_loaded_when_it_is_needed():
    engine, opened = Engine(), []
    llm = EngineLlm("local", lambda: opened.append(1) or engine, max_tokens=64)  # type: ignore[func-returns-value]
    assert opened == []
    assert [each.value for each in Asker(llm).ask(["a", "b"], upper)] == ["A", "B"]
    Asker(llm).ask(["b"], upper)
    assert opened == [1]
    assert engine.sampling == Sampling(0.0, max_new_tokens=64)
    assert not any(each.interventions for each in engine.asked)
    assert (llm.spent.read, llm.spent.written) == (15, 9)
