"""A language model writes rows: nothing is lost silently, nothing is paid for twice, limits hold, no key is written."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_gen.collect import Collected, collect
from data_gen.description import describe_files
from data_gen.prompted import ANSWER_WORDS, PARTS, Task, prompted, read_subjects
from data_gen.sources import Context, read_cues
from esr_train.errors import InputError, RunError
from esr_train.files import read_json, write_jsonl
from esr_train.recipe import LlmSection, PromptedSection, SplitSection, load_recipe
from esr_train.restarts import attempts
from esr_train.steering.engine import Sampling
from esr_train.transcript import SpanKind, write_transcripts
from eval import llm
from eval.cells import Pools, Prompt, Side
from eval.judging.judge import Attempt, JudgeItem, Judgement
from eval.llm import ROUNDS, Asker, InspectLlm, Ledger
from recipes.stages.rows import check_held_out
from tests.llm_stub import KEY, TEXT_FAULTS, TRANSPORT_FAULTS, Faults, LlmStub, Messages

PROMPTS = tuple(Prompt(f"How do I bake loaf number {n}?", "bread") for n in range(6))
POOLS = Pools({"bread": "train"}, PROMPTS, (), (), PROMPTS)
SUBJECTS = ["owls", "kites", "sledges", "the Silk Road"]
TAKING_BACK = {"Wait,": "that is not right.", "Sorry,": "I got off track.", "Oops,": "wrong subject."}
CUES = "[plain]\n" + "\n".join(f"{stem} {rest}" for stem, rest in TAKING_BACK.items())
ROWS = 12


def writes(messages: Messages) -> str:
    """A good writer: a detour about the subject, an acknowledgement from the stem, an answer to the question."""
    question = messages[-1]["content"]
    subject = re.search(r'"detour": .*? about (.*?), in the tone', question)
    prompt = re.search(r"----\n(.*?)\n----", question, re.DOTALL)
    begins = re.search(r'begin with "(.*?)"', question)
    assert subject
    assert prompt
    parts = {"detour": f"Off-topic words on {subject[1]}.", "answer": f"On-topic words on {prompt[1]}"}
    if begins:
        first = begins[1].split()[0]
        parts["acknowledgement"] = f"{first} {TAKING_BACK[first]}"
    return f"```json\n{json.dumps(parts)}\n```"


class TopicJudge:
    """Scores what says that it is off-topic 0, and anything else 100."""

    name = "topic"

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        scores = [0.0 if "Off-topic" in item.response else 100.0 for item in items]
        return [Judgement((Attempt(0, 1, score),), self.name) for score in scores]


class World:
    """Everything that making rows needs, in one folder."""

    def __init__(self, folder: Path, stub: LlmStub, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        self.folder, self.stub = folder, stub
        folder.mkdir(exist_ok=True)
        (folder / "cues.txt").write_text(CUES)

    def asker(self, concurrency: int = 4, **limits: Any) -> Asker:
        ledger = Ledger(self.stub.model, LlmSection(**limits), self.folder / "prompted.requests.json")
        return Asker(InspectLlm(self.stub.model, concurrency=concurrency), ledger, self.folder / "cache")

    def collect(self, rows: int = ROWS, chunk: int = 6, subjects: Sequence[str] = SUBJECTS, **settings) -> Collected:
        write_jsonl(self.folder / "subjects.jsonl", ({"subject": subject} for subject in subjects))
        section = PromptedSection(rows=rows, writer=self.stub.model, subjects=str(self.folder / "subjects.jsonl"))
        context = Context(
            engine=None,  # type: ignore[arg-type]
            judge=TopicJudge(),
            sampling=Sampling(),
            positions="all",
            model="m",
            seed=0,
            tokenizer=None,  # type: ignore[arg-type]
            prompts=POOLS,
            cues=read_cues(str(self.folder / "cues.txt")),
            splits=SplitSection(validation=0, test=0),
            open_writer=lambda name: self.asker(**settings),
        )
        make = prompted(context, section)
        return collect("prompted", rows, make, self.folder / "candidates.jsonl", chunk)

    @property
    def ledger(self) -> dict[str, Any]:
        return read_json(self.folder / "prompted.requests.json")

    def check_ledger(self, found: Collected) -> None:
        """Every request and every candidate is somewhere in the books."""
        funnel = Counter(found.funnel) + Counter(found.surplus)
        spent = self.ledger
        assert spent["asked"] + spent["lost"] == len(self.stub.requests)
        assert spent["lost"] == sum(self.stub.met[fault] for fault in TRANSPORT_FAULTS)
        written_ = sum(count for reason, count in funnel.items() if not reason.startswith("writer:"))
        assert spent["asked"] - spent["refused"] + spent["cached"] == written_
        assert spent["failed"] == sum(funnel.values()) - written_


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    return lambda stub, name="w": World(tmp_path / name, stub, monkeypatch)


def test_a_writer_s_rows_have_three_spans_and_say_what_they_are(world):
    with LlmStub(writes) as stub:
        here = world(stub)
        found = here.collect()
    assert found.funnel == {"kept": ROWS}
    here.check_ledger(found)
    assert len({(row.prompt, row.meta["subject"]) for row in found.transcripts}) == ROWS
    for row in found.transcripts:
        assert [span.kind for span in row.spans] == [SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER]
        assert row.meta["subject"] in row.spans[0].text
        assert row.spans[2].text.endswith(row.prompt)
        assert len(attempts(row.content)) == 2
        assert (row.source, row.steering, row.meta["model"]) == ("prompted", None, here.stub.model)
    assert len({row.spans[1].text for row in found.transcripts}) == len(TAKING_BACK)


def test_with_every_fault_the_same_rows_come_out_and_every_request_is_in_the_books(world):
    with LlmStub(writes) as stub:
        wanted = world(stub, "calm").collect(rows=24)
    kinds = ("429", "500", "drop", "torn", "half", "prose", "empty")
    with LlmStub(writes, Faults(share=0.5, kinds=kinds)) as stub:
        here = world(stub, "storm")
        found = here.collect(rows=24)
        assert sum(stub.met.values()) >= 12
        assert len(stub.met) >= 5
    assert [row.spans for row in found.transcripts] == [row.spans for row in wanted.transcripts]
    here.check_ledger(found)
    assert here.ledger["refused"] == sum(stub.met[fault] for fault in TEXT_FAULTS)


@pytest.mark.slow
def test_a_request_that_is_never_answered_is_given_up_counted_and_sent_again(world, monkeypatch):
    monkeypatch.setattr(llm, "TIMEOUT", 10)
    with LlmStub(writes, Faults(script=["hang"])) as stub:
        here = world(stub)
        found = here.collect(rows=2, chunk=2)
        assert stub.met["hang"] == 2
    assert found.funnel == {"kept": 2}
    assert here.ledger["lost"] >= 2
    assert here.ledger["asked"] == 2


def test_an_answer_that_stays_malformed_and_one_that_never_comes_are_counted_with_their_reason(world):
    def sometimes(messages: Messages) -> str:
        return "I would rather not." if "kites" in messages[-1]["content"] else writes(messages)

    with LlmStub(sometimes) as stub:
        here = world(stub)
        found = here.collect()
    malformed = sum(each.get("writer: malformed answer", 0) for each in (found.funnel, found.surplus))
    assert malformed >= 1
    assert set(found.funnel) == {"kept", "writer: malformed answer"}
    assert {row.meta["subject"] for row in found.transcripts} == set(SUBJECTS) - {"kites"}
    assert here.ledger["refused"] == ROUNDS * malformed
    here.check_ledger(found)


def test_a_writer_that_is_gone_ends_the_run_with_what_it_said_and_the_run_goes_on_later(world, monkeypatch):
    monkeypatch.setattr(llm, "RETRIES", 1)
    with LlmStub(writes, Faults(script=["500"] * 50)) as stub:
        here = world(stub)
        with pytest.raises(RunError, match=r"answered none of 8 questions.*scripted 500"):
            here.collect(chunk=8)
        assert here.ledger["lost"] == len(stub.requests) == 16
    with LlmStub(writes) as stub:
        found = world(stub).collect(chunk=8)
    assert found.funnel["kept"] >= ROWS


def test_an_interrupted_run_pays_for_no_answer_twice(world, monkeypatch):
    with LlmStub(writes) as stub:
        wanted = world(stub, "whole").collect()
    keep, kept = Asker._keep, []

    def dying(self: Asker, *parts: str) -> None:
        keep(self, *parts)
        kept.append(parts)
        if len(kept) == 8:
            raise KeyboardInterrupt

    with LlmStub(writes) as stub:
        here = world(stub, "cut")
        with monkeypatch.context() as patch:
            patch.setattr(Asker, "_keep", dying)
            with pytest.raises(KeyboardInterrupt):
                here.collect(concurrency=1)
        assert len(stub.requests) == 8
        found = here.collect(concurrency=1)
        assert len(stub.requests) == ROWS
    assert found.transcripts == wanted.transcripts


def test_a_limit_ends_the_run_in_time_and_counts_over_interruptions(world):
    prices = {LlmStub.model: (10_000.0, 50_000.0)}
    with LlmStub(writes) as stub:
        wanted = world(stub, "free").collect(prices=prices)
        whole = world(stub, "free").ledger
    assert whole["dollars"] == pytest.approx((whole["read"] + 5 * whole["written"]) / 100)
    with LlmStub(writes) as stub:
        here = world(stub, "limited")
        limit = whole["dollars"] / 2
        for _ in range(2):
            with pytest.raises(RunError, match=r"limit of \$[\d.]+ is reached \(\d+ asked.* raise llm\.limit_dollars"):
                here.collect(prices=prices, limit_dollars=limit, concurrency=2)
        assert limit <= here.ledger["dollars"] <= limit + 3 * whole["dollars"] / ROWS
        assert len(stub.requests) == here.ledger["asked"]
        assert here.collect(prices=prices, limit_dollars=4 * limit).transcripts == wanted.transcripts
        assert len(stub.requests) == ROWS


def test_no_key_is_in_any_file_or_message(world, tmp_path, capsys):
    with LlmStub(writes, Faults(share=0.3, kinds=("429", "half"))) as stub:
        world(stub).collect()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= ROWS
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    said = capsys.readouterr()
    assert KEY not in said.out + said.err


TASK = Task(PROMPTS[0], "owls", 2, "Wait,", False)
GOOD = {"detour": "Owls fly.", "acknowledgement": "Wait, that's not right.", "answer": "Knead it."}


def test_the_question_names_what_the_row_is_to_be():
    asked = TASK.question()
    for part in (
        "2 sentences about owls",
        'begin with "Wait,"',
        f"at most {ANSWER_WORDS} words",
        PROMPTS[0].text,
        *PARTS,
    ):
        assert part in asked


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("No.", "no whole JSON object"),
        ('{"detour": "x"', "it is cut off"),
        (json.dumps({**GOOD, "answer": " "}), "no text under 'answer'"),
        (json.dumps({**GOOD, "detour": ["x"]}), "no text under 'detour'"),
        (json.dumps({**GOOD, "acknowledgement": "Wait here with me."}), "must take something back"),
        (json.dumps({**GOOD, "answer": "Knead it. Oops, wrong subject. Bake."}), "plainly and once"),
    ],
)
def test_a_reply_that_is_no_row_is_refused_with_what_to_change(reply, message):
    with pytest.raises(ValueError, match=message):
        TASK.read(reply)


@pytest.mark.parametrize("form", ["{}", "```json\n{}\n```", "Here you are: {} Good luck!"])
def test_a_reply_may_have_a_fence_or_words_around_it(form):
    assert TASK.read(form.replace("{}", json.dumps({**GOOD, "more": 1}))) == tuple(GOOD.values())


def test_a_silent_return_is_ours_and_the_writer_writes_two_parts():
    task = Task(PROMPTS[0], "owls", 1, "Here is how it works.", True)
    assert "acknowledgement" not in task.question()
    assert "one sentence about owls" in task.question()
    reply = json.dumps({"detour": "Owls fly.", "answer": "Knead it."})
    assert task.read(reply) == ("Owls fly.", "Here is how it works.", "Knead it.")


def test_rows_about_a_held_out_subject_are_refused(world):
    with LlmStub(writes) as stub:
        rows = world(stub).collect(rows=3, chunk=3, subjects=["Owls"]).transcripts
    with pytest.raises(InputError, match="share 1 off-topic subject"):
        check_held_out(rows, Side(subjects=frozenset(["owls"])))
    check_held_out(rows, Side(subjects=frozenset(["kites"])))


def test_the_shipped_subjects_fit_the_question():
    for subject in read_subjects(None):
        assert f"about {subject}, in the tone" in Task(PROMPTS[0], subject, 1, "Wait,", False).question()


def test_a_recipe_names_its_writer_and_says_how_models_are_asked(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nmodel: {path: b}\n")
    overrides = ["data.prompted.writer=openai/x", "llm={limit_dollars: 3, prices: {openai/x: [1, 5]}}"]
    recipe = load_recipe(path, overrides)
    assert recipe.data.prompted.writer == "openai/x"
    assert (recipe.llm.limit_dollars, recipe.llm.prices, recipe.llm.concurrency) == (3.0, {"openai/x": (1.0, 5.0)}, 16)
    with pytest.raises(
        InputError, match=r"data\.prompted\.writr: unknown key \(did you mean data\.prompted\.writer\?\)"
    ):
        load_recipe(path, ["data.prompted.writr=x"])


def test_what_was_asked_is_in_the_statistics(world):
    with LlmStub(writes) as stub:
        here = world(stub)
        write_transcripts(here.folder / "rows.jsonl", here.collect().transcripts)
    assert describe_files(here.folder / "rows.jsonl").requests["prompted"].asked == ROWS
