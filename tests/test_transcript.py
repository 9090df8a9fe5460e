"""Transcripts on disk, and files that are whole or not there at all."""

import json
from pathlib import Path
from typing import Any

import pytest

from esr_train.errors import InputError
from esr_train.files import read_json, read_jsonl, read_text, replacing, write_json, write_jsonl
from esr_train.transcript import (
    SaeRef,
    Span,
    SpanKind,
    Steering,
    Strength,
    Transcript,
    VectorRef,
    from_json,
    read_transcripts,
    to_json,
    write_transcripts,
)

DOCUMENTED: dict[str, Any] = {
    "id": "s1",
    "prompt": "How do you fold a fitted sheet?",
    "system": None,
    "spans": [
        {"kind": "off_topic", "text": "Trim the jib."},
        {"kind": "cue", "text": " Wait, \u2026"},
        {"kind": "answer", "text": " Start by \u2026"},
    ],
    "steering": {
        "sae": {"release": "r", "id": "i"},
        "layer": 26,
        "latent": 1234,
        "label": "sailing",
        "strength": {"raw": 210.0, "norm": 0.9},
    },
    "source": "steered",
    "meta": {"seed": 7, "scores": {"off_topic": 4}},
}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in DOCUMENTED.items() if name != key}


def test_the_documented_row_reads_and_writes_as_it_stands() -> None:
    transcript = from_json(DOCUMENTED)
    assert json.dumps(to_json(transcript)) == json.dumps(DOCUMENTED)
    assert transcript.steering == Steering(SaeRef("r", "i"), 26, 1234, "sailing", Strength(210.0, 0.9))


def test_a_vector_of_one_s_own_stands_in_place_of_sae_and_latent(tmp_path: Path) -> None:
    vector = {"vector": {"file": "v.safetensors", "sha256": "0" * 64}, "layer": 3, "label": None}
    row = {**DOCUMENTED, "steering": {**vector, "strength": {"raw": 2.0, "norm": 0.5}}}
    transcript = from_json(row)
    expected = Steering(None, 3, None, None, Strength(2.0, 0.5), VectorRef("v.safetensors", "0" * 64))
    assert transcript.steering == expected
    assert json.dumps(to_json(transcript)) == json.dumps(row)
    write_transcripts(tmp_path / "t.jsonl", [transcript])
    assert read_transcripts(tmp_path / "t.jsonl") == [transcript]


@pytest.mark.parametrize(
    "named",
    [
        {"sae": None, "latent": None, "vector": None},
        {"vector": {"file": "v", "sha256": "0"}},
        {"vector": {"file": "v", "sha256": "0"}, "sae": None},
        {"vector": {"file": "v", "sha256": "0"}, "latent": None},
        {"latent": None},
        {"sae": None},
    ],
)
def test_a_steering_names_a_latent_or_a_vector_and_never_both(named: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="either `sae` and `latent`, or `vector`"):
        from_json({**DOCUMENTED, "steering": {**DOCUMENTED["steering"], **named}})


def test_content_is_the_spans_texts_concatenated() -> None:
    assert from_json(DOCUMENTED).content == "Trim the jib. Wait, … Start by …"


def test_a_reply_corrects_when_it_has_a_cue() -> None:
    normal = Transcript("n", "p", (Span(SpanKind.ANSWER, "a"),), "normal")
    assert from_json(DOCUMENTED).corrects
    assert not normal.corrects


def test_system_steering_and_meta_may_be_left_out() -> None:
    row = {key: DOCUMENTED[key] for key in ("id", "prompt", "spans", "source")}
    transcript = from_json(row)
    assert (transcript.system, transcript.steering, transcript.meta) == (None, None, {})


def test_strengths_scale_in_both_units() -> None:
    assert Strength(2.0, 0.5).times(3) == Strength(6.0, 1.5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("id"), "the key 'id' is missing"),
        (without("spans"), "the key 'spans' is missing"),
        (without("source"), "the key 'source' is missing"),
        (
            {**DOCUMENTED, "source": "dreamt"},
            'source is none of steered, prompted, normal, imported: "dreamt"',
        ),
        ({**DOCUMENTED, "prompt": 3}, "prompt is not a text: 3"),
        ({**DOCUMENTED, "system": 3}, "system is not a text: 3"),
        ({**DOCUMENTED, "spans": [{"kind": "joke", "text": "a"}]}, "spans\\[0\\].kind is none of off_topic"),
        ({**DOCUMENTED, "spans": [{"kind": "cue"}]}, "the key 'spans\\[0\\].text' is missing"),
        ({**DOCUMENTED, "spans": ["a"]}, 'spans\\[0\\] is not an object: "a"'),
        ({**DOCUMENTED, "spans": []}, "the reply is empty"),
        ({**DOCUMENTED, "spans": [{"kind": "cue", "text": " "}]}, "the reply is empty"),
        ({**DOCUMENTED, "steering": []}, "steering is not an object: \\[\\]"),
        ([], "a transcript is a JSON object, not list"),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(DOCUMENTED) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"t\.jsonl:3: .*{message}"):
        read_transcripts(path)


def test_broken_json_is_refused_with_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(DOCUMENTED) + '\n{"id": \n')
    with pytest.raises(InputError, match=r"t\.jsonl:2: not valid JSON \(Expecting value at column"):
        read_transcripts(path)


def test_transcripts_survive_a_file_with_any_characters(tmp_path: Path) -> None:
    spans = (Span(SpanKind.ANSWER, 'é😀\u2028\x85\r\n\t"\\'),)
    rows = [from_json(DOCUMENTED), Transcript("n", "p\u2029", spans, "normal")]
    assert write_transcripts(tmp_path / "deep" / "t.jsonl", rows) == 2
    assert read_transcripts(tmp_path / "deep" / "t.jsonl") == rows


def test_writing_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_jsonl(path, [1])
    with pytest.raises(ZeroDivisionError):
        write_jsonl(path, (1 / n for n in (1, 0)))
    assert read_jsonl(path, int) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as file:
        file.write("half")
        assert not (tmp_path / "a.txt").exists()
    assert read_text(tmp_path / "a.txt") == "half"


def test_json_reads_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}


def test_files_that_cannot_be_read_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "broken").write_text("{\n]")
    with pytest.raises(InputError, match=r"none: the file does not exist\. Check the path\."):
        read_text(tmp_path / "none")
    with pytest.raises(InputError, match="this is a folder"):
        read_text(tmp_path)
    with pytest.raises(InputError, match=r"latin:1: not UTF-8 text .*0xe9"):
        read_text(tmp_path / "latin")
    with pytest.raises(InputError, match=r"broken:2: not valid JSON"):
        read_json(tmp_path / "broken")
