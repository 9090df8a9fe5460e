"""Asking a language model: retries, refusals, kept answers, what it costs, and what is never written down."""

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from esr_train.errors import InputError, RunError
from esr_train.files import read_json
from esr_train.recipe import LlmSection, Recipe, dump_recipe
from esr_train.steering.engine import Completion, Sampling
from eval import llm
from eval.llm import LEDGER, Answer, Answered, Asker, EngineLlm, InspectLlm, Ledger, Reply, Spent, without_secrets
from recipes.cli import main
from recipes.experiment import read_recipe
from recipes.planning.preflight import check, whole
from tests.conftest import ROOT
from tests.llm_stub import KEY, TEXT_FAULTS, TRANSPORT_FAULTS, Faults, LlmStub, Messages


class Scripted:
    """An `Llm` that gives the next of its replies to every question."""

    name = "scripted"
    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, *texts: str | None) -> None:
        self.texts, self.questions = list(texts), list[str]()

    def ask(self, questions: Sequence[str], answered: Answered, form: Any = None) -> None:
        self.questions += questions
        for index, text in enumerate([self.texts.pop(0) for _ in questions]):
            answered(index, Reply(text, None if text is not None else "no reply"))


def asker(model: Any, folder: Path | None = None, **settings: Any) -> Asker:
    return Asker(model, Ledger(model.name), folder, **settings)


def number(index: int, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{text!r} is not a number.")
    return int(text)


def shout(messages: Messages) -> str:
    return messages[-1]["content"].upper()


def upper(index: int, text: str) -> str:
    if not text or text != text.upper():
        raise ValueError("not in capitals")
    return text


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Callable[[LlmStub], InspectLlm]:
    def make(stub: LlmStub, concurrency: int = 16, name: str = LlmStub.model) -> InspectLlm:
        for key, value in stub.environment().items():
            monkeypatch.setenv(key, value)
        return InspectLlm(name, concurrency=concurrency)

    return make


def test_a_reply_that_cannot_be_used_is_asked_for_again_with_the_reason():
    asking = asker(Scripted("seven", "7"))
    assert asking.ask(["How many?"], number) == [Answer(7, "7")]
    assert asking.llm.questions[0] == "How many?"
    assert asking.llm.questions[1].startswith(
        "How many?\n\nAn earlier reply could not be used: 'seven' is not a number. "
    )
    assert asking.ledger.spent.refused == 1


def test_only_the_questions_without_an_answer_are_asked_again():
    asking = asker(Scripted("1", "two", "3", "2"))
    assert [answer.value for answer in asking.ask(["a", "b", "c"], number)] == [1, 2, 3]
    assert len(asking.llm.questions) == 4


def test_a_question_that_never_gets_a_usable_reply_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm, "ROUNDS", 3)
    asking = asker(Scripted("x", None, "y"))
    assert asking.ask(["How many?"], number) == [Answer(None, "y", "'y' is not a number")]
    assert asking.ledger.spent.failed == 1


def test_usable_answers_are_kept_and_refused_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(llm, "ROUNDS", 1)
        asker(Scripted("x", "1"), tmp_path / "kept").ask(["a", "b"], number)
    asking = asker(Scripted("9"), tmp_path / "kept")
    assert [answer.value for answer in asking.ask(["a", "b"], number)] == [9, 1]
    assert asking.llm.questions == ["a"]
    assert asking.ledger.spent.cached == 1


def test_kept_answers_know_models_settings_and_repeats_apart(tmp_path: Path):
    asker(Scripted("1"), tmp_path).ask(["a"], number)
    other, warm = Scripted("2"), Scripted("3")
    other.name, warm.settings = "another", {"temperature": 1.0}
    assert asker(other, tmp_path).ask(["a"], number)[0].value == 2
    assert asker(warm, tmp_path).ask(["a"], number)[0].value == 3
    assert asker(Scripted("4"), tmp_path, repeat=1).ask(["a"], number)[0].value == 4
    assert asker(Scripted(), tmp_path).ask(["a"], number)[0].value == 1


@pytest.mark.parametrize("damage", ["", "{", '{"answer": 3}', "[]", '{"answer": "x"}'])
def test_a_damaged_kept_answer_is_asked_anew_and_mended(tmp_path: Path, damage: str):
    asker(Scripted("1"), tmp_path).ask(["a"], number)
    [file] = tmp_path.rglob("*.json")
    file.write_text(damage)
    assert asker(Scripted("1"), tmp_path).ask(["a"], number)[0].value == 1
    assert json.loads(file.read_text())["answer"] == "1"


@pytest.mark.parametrize("fault", [*TRANSPORT_FAULTS, *TEXT_FAULTS[:3]])
def test_every_fault_is_got_over(fault: str, reach, monkeypatch: pytest.MonkeyPatch):
    def answer(messages: Messages) -> str:
        return shout(messages).split()[0] + "!"

    def parse(index: int, text: str) -> str:
        if not text.endswith("!"):
            raise ValueError("not a shout")
        return text

    monkeypatch.setattr(llm, "TIMEOUT", 2 if fault == "hang" else 60)
    script = Faults(script=[fault, fault])
    with LlmStub(answer, script, subject=lambda messages: messages[-1]["content"].split()[0]) as stub:
        answers = asker(reach(stub)).ask(["one", "two"], parse)
        assert [each.value for each in answers] == ["ONE!", "TWO!"]
        assert stub.met[fault] >= 2


def test_thirty_percent_of_faults_change_no_answer_and_their_number_is_known(reach, tmp_path: Path):
    questions = [f"question number {index}" for index in range(60)]
    with LlmStub(shout, Faults(share=0.3, kinds=("429", "500", "drop", "torn", "prose", "empty"))) as stub:
        asking = asker(reach(stub), tmp_path)
        answers = asking.ask(questions, lambda index, text: upper(index, text.split("\n")[0]))
        assert [each.value for each in answers] == [question.upper() for question in questions]
        spent = asking.ledger.spent
        assert spent.refused == stub.met["prose"] + stub.met["empty"] > 0
        assert spent.asked == 60 + spent.refused
        assert spent.lost == len(stub.requests) - spent.asked > 0
        assert spent.failed == 0


def test_as_many_questions_are_open_at_once_as_were_allowed(reach):
    three = threading.Barrier(3, timeout=60)

    def together(messages: Messages) -> str:
        three.wait()
        return shout(messages)

    with LlmStub(together) as stub:
        asker(reach(stub, concurrency=3)).ask([f"question {index}" for index in range(12)], upper)
        assert stub.busiest == 3


def test_tokens_and_dollars_are_counted(reach):
    with LlmStub(shout) as stub:
        ledger = Ledger(stub.model, LlmSection(prices={stub.model: (2.0, 10.0)}))
        Asker(reach(stub), ledger).ask(["one two three", "four"], upper)
    assert (ledger.spent.read, ledger.spent.written) == (4, 4)
    assert ledger.spent.dollars == pytest.approx((4 * 2.0 + 4 * 10.0) / 1e6)
    assert "$0.00" in str(ledger.spent)
    assert "$" not in str(Spent())


def test_a_shipped_price_counts_for_a_dated_name_too_and_the_recipe_s_price_counts_before_it():
    def cost(model: str, **prices: tuple[float, float]) -> float | None:
        ledger = Ledger(model, LlmSection(prices=prices))
        ledger.count(Reply("x", None, 1_000_000, 0))
        return ledger.spent.dollars

    assert cost("anthropic/claude-haiku-4-5") == cost("anthropic/claude-haiku-4-5-20251001") == 1.0
    assert cost("openai/gpt-4o-2024-08-06") == cost("openai/gpt-4o")
    assert cost("anthropic/claude-haiku-4-5", **{"anthropic/claude-haiku-4-5": (7.0, 0.0)}) == 7.0
    assert cost("nobody/knows") is None


def test_free_models_have_a_price_too():
    ledger = Ledger("mine/own", LlmSection(limit_dollars=1, prices={"mine/own": (0.0, 0.0)}))
    ledger.count(Reply("x", None, 10**9, 10**9))
    assert (ledger.spent.dollars, ledger.is_exhausted(0.5), ledger.is_exhausted(1.0)) == (0.0, False, True)


def test_a_limit_without_a_price_is_refused_before_anything_is_asked():
    with pytest.raises(InputError, match=r"llm\.limit_dollars: .*what nobody/knows costs.*Set llm\.prices"):
        Ledger("nobody/knows", LlmSection(limit_dollars=1.0))


def test_the_limit_is_one_for_all_the_ledgers_of_a_run_and_holds_over_interruptions(reach, tmp_path: Path):
    def ledger(name: str, limit: float) -> Ledger:
        section = LlmSection(limit_dollars=limit, prices={LlmStub.model: (1e6, 0.0)})
        return Ledger(LlmStub.model, section, tmp_path / name / f"x{LEDGER}", tmp_path)

    with LlmStub(shout) as stub:
        judge = Asker(reach(stub, concurrency=1), ledger("judge", 5))
        assert len(judge.ask(["a", "b", "c"], upper)) == 3
        for _ in range(2):
            writer = Asker(reach(stub, concurrency=1), ledger("writer", 5), tmp_path / "kept")
            with pytest.raises(RunError, match=r"the limit of \$5 is reached .*raise llm\.limit_dollars"):
                writer.ask(["d", "e", "f"], upper)
        assert len(stub.requests) == 5
        assert read_json(tmp_path / "writer" / f"x{LEDGER}")["dollars"] == 2.0
        writer = Asker(reach(stub), ledger("writer", 6), tmp_path / "kept")
        assert [each.value for each in writer.ask(["d", "e", "f"], upper)] == ["D", "E", "F"]
        assert len(stub.requests) == 6


def test_the_key_is_written_nowhere(reach, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with LlmStub(shout, Faults(script=["429", "prose"])) as stub:
        answers = asker(reach(stub), tmp_path).ask([f"question {KEY[:4]}"], upper)
    assert answers[0].value
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 1
    assert KEY not in "".join((*written, *capfd.readouterr()))
    assert without_secrets(f"the key {KEY} is wrong") == "the key *** is wrong"


def test_a_refused_key_ends_the_run_at_once(reach, monkeypatch: pytest.MonkeyPatch):
    with LlmStub(shout) as stub:
        model = reach(stub)
        monkeypatch.setenv("STUB_API_KEY", "another-key-altogether")
        with pytest.raises(InputError, match="stub/oracle: the key is refused"):
            asker(model).ask([f"question {index}" for index in range(20)], upper)


def test_a_missing_key_and_an_unknown_name_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("STUB_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"openai-api/stub/x: .*STUB_API_KEY"):
        asker(InspectLlm("openai-api/stub/x")).ask(["a"], upper)
    with pytest.raises(InputError, match="nobody/knows"):
        asker(InspectLlm("nobody/knows")).ask(["a"], upper)


@pytest.mark.parametrize(
    "word",
    [
        "judge={kind: model, model: openai-api/stub/x}",
        "judges=[{kind: model, model: openai-api/stub/x}]",
        "data.prompted={rows: 5, writer: openai-api/stub/x}",
    ],
)
def test_a_run_without_the_key_is_refused_before_a_model_is_loaded(word, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("STUB_API_KEY", raising=False)
    monkeypatch.delenv("STUB_BASE_URL", raising=False)
    monkeypatch.setattr("recipes.resources.load_model", None)
    assert main(["run", str(ROOT / "recipes/tiny/quickstart.yaml"), f"runs={tmp_path}", word]) == 2
    assert "STUB_API_KEY" in capsys.readouterr().err


def test_a_finished_run_asks_nobody_and_needs_no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("STUB_API_KEY", raising=False)
    monkeypatch.delenv("STUB_BASE_URL", raising=False)
    words = [f"runs={tmp_path}", "judge={kind: model, model: openai-api/stub/x}"]
    made = read_recipe("tiny/quickstart", [*words, "data.prompted={rows: 5, writer: openai-api/stub/x}"])
    made.directory.mkdir()
    (made.directory / "recipe.yaml").write_text(dump_recipe(made))

    def is_refused(stages: dict[str, bool], recipe: Recipe = made, redo: tuple[str, ...] = ()) -> bool:
        records = {name: {"fingerprint": "x", "done": done, "inputs": {}} for name, done in stages.items()}
        (made.directory / "stages.json").write_text(json.dumps(records))
        try:
            check(recipe, whole(recipe, redo))
        except InputError as error:
            return "STUB_API_KEY" in str(error)
        return False

    assert is_refused({"trials/base": True})
    assert is_refused({"trials/base": False, "report": True})
    assert not is_refused({"trials/base": True, "report": True})
    assert is_refused({"trials/base": True, "report": True}, redo=("report",))
    assert is_refused({"trials/base": True, "report": True}, read_recipe("tiny/quickstart", [*words, "eval.trials=9"]))


def test_a_model_out_of_reach_ends_the_run_instead_of_leaving_everything_unscored(reach, monkeypatch):
    monkeypatch.setattr(llm, "RETRIES", 1)
    with LlmStub(shout, Faults(script=["500"] * 100)) as stub:
        asking = asker(reach(stub))
        with pytest.raises(RunError, match=r"answered none of 8 questions, the last time with: .*scripted 500"):
            asking.ask([f"question {index}" for index in range(8)], upper)
        assert asking.ledger.spent.lost == len(stub.requests) == 16
        monkeypatch.setattr(llm, "ROUNDS", 1)
        [few] = asking.ask(["alone"], upper)
        assert "scripted 500" in few.error


def test_a_client_goes_on_after_its_first_batch(reach):
    with LlmStub(shout) as stub:
        asking = asker(reach(stub))
        assert [asking.ask([text], upper)[0].value for text in ("one", "two", "three")] == ["ONE", "TWO", "THREE"]


def test_it_asks_within_a_running_event_loop_as_a_notebook_has(reach):
    async def cell(asking: Asker) -> list[Answer[str]]:
        return asking.ask(["one", "two"], upper)

    with LlmStub(shout) as stub:
        asking = asker(reach(stub))
        assert [each.value for each in asyncio.run(cell(asking))] == ["ONE", "TWO"]
        assert [each.value for each in asking.ask(["three"], upper)] == ["THREE"]
        assert [each.value for each in asyncio.run(cell(asking))] == ["ONE", "TWO"]


def test_a_mistake_within_a_running_event_loop_is_the_same_mistake(monkeypatch: pytest.MonkeyPatch):
    async def cell() -> None:
        asker(InspectLlm("nobody/knows")).ask(["a"], upper)

    with pytest.raises(InputError, match="nobody/knows"):
        asyncio.run(cell())


class Form(BaseModel):
    score: int


def test_a_provider_that_can_be_held_to_a_form_is(reach, monkeypatch: pytest.MonkeyPatch):
    with LlmStub(shout) as stub:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        asker(reach(stub, name="openai/gpt-4o")).ask(["one"], upper, Form)
        asker(reach(stub)).ask(["two"], upper, Form)
    asked, own_server = stub.bodies
    assert asked["response_format"]["json_schema"]["schema"]["properties"]["score"]["type"] == "integer"
    assert "response_format" not in own_server


def test_a_model_that_refuses_to_be_held_to_a_form_is_asked_without(reach, monkeypatch: pytest.MonkeyPatch):
    with LlmStub(shout, refuses=("response_format",)) as stub:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        asking = asker(reach(stub, concurrency=1, name="openai/gpt-4o"))
        assert [each.value for each in asking.ask(["one", "two"], upper, Form)] == ["ONE", "TWO"]
    assert ["response_format" in body for body in stub.bodies] == [True, False, False]


class Engine:
    name = "fake"

    def generate(self, requests: Any, sampling: Sampling, progress: Any = None) -> list[Completion]:
        self.asked, self.sampling = requests, sampling
        return [Completion(each.id, each.prompt.upper(), (1, 2, 3), "stop", 5, 0) for each in requests]


def test_a_local_model_answers_through_our_engine_and_is_loaded_when_it_is_needed():
    engine, opened = Engine(), []
    asking = asker(EngineLlm("local", lambda: opened.append(1) or engine))  # type: ignore[func-returns-value]
    assert opened == []
    assert [each.value for each in asking.ask(["a", "b"], upper)] == ["A", "B"]
    asking.ask(["b"], upper)
    assert opened == [1]
    assert engine.sampling == Sampling(0.0, max_new_tokens=llm.MAX_TOKENS)
    assert not any(each.interventions for each in engine.asked)
    assert (asking.ledger.spent.read, asking.ledger.spent.written) == (15, 9)


def test_a_local_model_asked_once_more_draws_anew():
    engine = Engine()
    seeds = set()
    for repeat in (0, 1, 1):
        asker(EngineLlm("local", lambda: engine, 1.0, repeat)).ask(["a"], upper)
        seeds.add(engine.asked[0].seed)
    assert len(seeds) == 2
