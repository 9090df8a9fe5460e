"""`esr data generate` with a language model as writer, from the recipe to the file, as a user runs it."""

import json
import re
from random import Random

import pytest

from data_gen.__main__ import main as data
from esr_train.transcript import SpanKind, read_transcripts
from eval.judging.lexical import LexicalJudge
from eval.llm import TEST_QUESTION
from tests.conftest import ROOT
from tests.llm_stub import KEY, Faults, LlmStub, Messages
from tools.tiny_world.language import answer, topics, vocabulary

ROWS = 6


def writes(messages: Messages) -> str:
    """A writer that knows the tiny world: words of no topic about the subject, then a right answer."""
    question = messages[-1]["content"]
    if question == TEST_QUESTION:
        return "yes"
    prompt = re.search(r"----\n(.*?)\n----", question, re.DOTALL)
    begins = re.search(r'begin with "(.*?)"', question)
    assert prompt
    asked = LexicalJudge(vocabulary()).topic_of(prompt[1])
    topic = next(each for each in topics() if each.name == asked)
    parts = {"detour": "Some like it, some do not.", "answer": answer(topic, Random(prompt[1]))}
    if begins:
        parts["acknowledgement"] = f"{begins[1].rstrip()} that is not right."
    return json.dumps(parts)


@pytest.mark.slow
def test_a_recipe_s_writer_is_asked_and_its_rows_are_kept(assets, tmp_path, monkeypatch, capsys):
    (tmp_path / "cues.txt").write_text("Wait, that is not right.\n")
    overrides = [
        f"runs={tmp_path}",
        "data.steered.rows=0",
        "data.normal.rows=0",
        "train.live=null",
        "llm.concurrency=2",
        f"data.cues={tmp_path / 'cues.txt'}",
    ]
    with LlmStub(writes, Faults(share=0.3, seed=1)) as stub:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        prompted = {"rows": ROWS, "writer": stub.model}
        recipe = ROOT / "recipes" / "tiny" / "quickstart.yaml"
        assert data(["generate", str(recipe), *overrides, f"data.prompted={json.dumps(prompted)}"]) == 0
        asked = len(stub.requests) - 1  # the test question, of which there is no second one
    rows = read_transcripts(tmp_path / "quickstart" / "data" / "tuned.jsonl")
    assert len(rows) == ROWS
    assert all([span.kind for span in row.spans] == list(SpanKind) for row in rows)
    assert all(row.source == "prompted" and row.meta["scores"]["answer"] >= 80 for row in rows)
    sources = tmp_path / "quickstart" / "data" / "sources"
    ledger, funnel = (json.loads(next(sources.glob(f"*.{name}.json")).read_text()) for name in ("requests", "funnel"))
    assert ledger["asked"] + ledger["lost"] == asked
    assert ledger["asked"] - ledger["refused"] + ledger["cached"] + ledger["failed"] == sum(funnel.values())
    assert funnel["kept"] == ROWS
    assert not (tmp_path / "quickstart" / "thresholds.json").exists(), "nothing here is steered"
    assert not any(KEY in path.read_text(errors="ignore") for path in tmp_path.rglob("*.json*"))
