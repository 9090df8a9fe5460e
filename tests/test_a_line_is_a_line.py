"""A line ends at a line feed and nowhere else, in every file of lines."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_gen.prompted import read_subjects
from data_gen.sources import read_cues
from esr_train.errors import InputError
from esr_train.files import read_jsonl
from esr_train.steering.latent_labels import read_labels
from esr_train.transcript import read_transcripts
from eval.cells import read_prompts
from eval.judging.restart_likelihood import read_phrases

INSIDE = ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e", "\r"]
"""What Python's `str.splitlines` takes for the end of a line, but for the line feed itself."""

READERS: dict[str, Any] = {
    "prompts.txt": lambda path: [prompt.text for prompt in read_prompts(path)],
    "subjects.txt": lambda path: read_subjects(str(path)),
    "cues.txt": lambda path: [cue for cues in read_cues(str(path)).registers.values() for cue in cues],
    "phrases.txt": lambda path: list(read_phrases(path)),
}


@pytest.mark.parametrize("letter", INSIDE)
@pytest.mark.parametrize("name", READERS)
def test_one_text_a_line_stays_one(tmp_path: Path, name: str, letter: str):
    path = tmp_path / name
    path.write_bytes(f"How is{letter}this?\nAnd that?\r\n".encode())
    assert READERS[name](path) == [f"How is{letter}this?", "And that?"]


@pytest.mark.parametrize("letter", INSIDE)
def test_so_do_the_lines_of_json(tmp_path: Path, letter: str):
    row = {"prompt": f"a{letter}b", "topic": "t"}
    lines = [json.dumps(row, ensure_ascii=False), json.dumps({"prompt": "c", "topic": "t"})]
    (tmp_path / "p.jsonl").write_bytes("\n".join(lines).encode())
    assert read_jsonl(tmp_path / "p.jsonl", dict)[0] == row
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.jsonl")] == [f"a{letter}b", "c"]
    transcript = {"id": "1", "prompt": f"a{letter}b", "spans": [{"kind": "answer", "text": "x"}], "source": "normal"}
    (tmp_path / "t.jsonl").write_bytes(json.dumps(transcript, ensure_ascii=False).encode())
    assert [row.prompt for row in read_transcripts(tmp_path / "t.jsonl")] == [f"a{letter}b"]
    label = json.dumps({"index": 3, "description": f"a{letter}b"}, ensure_ascii=False)
    (tmp_path / "l.jsonl").write_bytes(label.encode())
    assert read_labels(tmp_path / "l.jsonl") == {3: f"a{letter}b"}


@pytest.mark.parametrize("letter", [*INSIDE, "\n", "\r\n"])
def test_so_do_quoted_fields_of_csv(tmp_path: Path, letter: str):
    (tmp_path / "p.csv").write_bytes(f'prompt,topic\r\n"a{letter}b",t\r\nc,t\r\n'.encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.csv")] == [f"a{letter}b", "c"]
    (tmp_path / "l.csv").write_bytes(f'index_in_sae,label\r\n3,"a{letter}b"\r\n'.encode())
    assert read_labels(tmp_path / "l.csv") == {3: f"a{letter}b"}


@pytest.mark.parametrize("letter", INSIDE)
@pytest.mark.parametrize("name", ["prompts.txt", "subjects.txt", "cues.txt"])
def test_a_message_counts_lines_as_an_editor_does(tmp_path: Path, name: str, letter: str):
    path = tmp_path / name
    path.write_bytes(f"one{letter}more\ntwo\ntwo\n".encode())
    with pytest.raises(InputError, match=rf"{name}:3: .*comes twice"):
        READERS[name](path)
