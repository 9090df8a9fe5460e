"""Files of other projects become transcripts and come back as they were."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esr_train.errors import InputError
from esr_train.interchange import export_file, import_file, read_training_file
from esr_train.masking import IGNORED, label
from esr_train.restarts import split_cue
from esr_train.transcript import SaeRef, Span, SpanKind, Steering, Strength, Transcript
from tests.conftest import Family

OFF, CUE, ANSWER = SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER
HEAD = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|>"
HEAD += "<|start_header_id|>assistant<|end_header_id|>\n\n"
GEMMA = "<bos><start_of_turn>user\nHow?<end_of_turn>\n<start_of_turn>model\n"
SEGMENTS_FILE, NORMAL_FILE = "dataset_masked_ratio_50pct_train.jsonl", "dataset_normal_responses.json"


def write(path: Path, *rows: list[tuple[bool, str]], **more: Any) -> Path:
    lines = [json.dumps({**more, "segments": [{"label": label, "text": text} for label, text in row]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def spans(transcript: Transcript) -> list[tuple[SpanKind, str]]:
    return [(span.kind, span.text) for span in transcript.spans]


def steered() -> Transcript:
    return Transcript(
        "s1",
        "How?",
        (Span(OFF, "Trim the jib."), Span(CUE, " Wait, no."), Span(ANSWER, " Smooth it.")),
        "steered",
        system="Be brief.",
        steering=Steering(SaeRef("r", "i"), 3, 7, "sailing", Strength(4.0, 0.5)),
        meta={"seed": 7},
    )


def test_the_paper_s_file_has_its_rows_and_one_cut_in_mid_word(paper: Path) -> None:
    transcripts, report = import_file(paper / SEGMENTS_FILE, "segments")
    assert (report.rows, report.with_detour, report.normal) == (918, 459, 459)
    assert report.problems == {"loss begins or ends in the middle of a word": [429]}
    assert len({transcript.id for transcript in transcripts}) == 918
    kinds = [tuple(kind for kind, _ in spans(transcript)) for transcript in transcripts]
    assert kinds.count((OFF, CUE, ANSWER)) == kinds.count((ANSWER,)) == 459
    assert {transcript.system for transcript in transcripts} == {None}  # but for a date, which templates write
    assert transcripts[1].prompt == "Explain how to write a research paper."


def test_labels_of_the_paper_s_rows_decode_to_what_their_segments_train(paper: Path, llama: Family) -> None:
    lines = (paper / SEGMENTS_FILE).read_text().splitlines()
    transcripts = read_training_file(paper / SEGMENTS_FILE)
    straddling = []
    for number, (line, transcript) in enumerate(zip(lines, transcripts, strict=True), start=1):
        labelled = label(llama.tokenizer, transcript)
        decoded = llama.tokenizer.decode([value for value in labelled.labels if value != IGNORED])
        trained = "".join(part["text"] for part in json.loads(line)["segments"] if part["label"])
        if labelled.straddling:
            straddling.append(number)
            assert trained.endswith(decoded)
        else:
            assert decoded == trained
    assert set(straddling) <= {429}


def test_the_paper_s_files_come_back_byte_by_byte(paper: Path, tmp_path: Path) -> None:
    for name, format in ((SEGMENTS_FILE, "segments"), (NORMAL_FILE, "normal")):
        transcripts, _ = import_file(paper / name, format)
        export_file(tmp_path / name, transcripts, format)
        assert (tmp_path / name).read_bytes() == (paper / name).read_bytes()


def test_the_paper_s_normal_answers_are_one_answer_each(paper: Path) -> None:
    transcripts, report = import_file(paper / NORMAL_FILE, "normal")
    assert (report.rows, report.with_detour, report.normal) == (760, 0, 760)
    assert all([kind for kind, _ in spans(transcript)] == [ANSWER] for transcript in transcripts)
    assert transcripts[0].prompt == "Explain how to add two fractions."


@pytest.mark.parametrize(("head", "end"), [(HEAD, "<|eot_id|>"), (GEMMA, "<end_of_turn>\n")])
def test_template_text_of_both_families_is_stripped(tmp_path: Path, head: str, end: str) -> None:
    path = write(tmp_path / "x.jsonl", [(False, head + "The jib.\n\n"), (True, f"Wait, no.\n\nSmooth it.{end}")])
    (transcript,), report = import_file(path, "segments")
    assert (transcript.id, transcript.prompt, transcript.system) == ("x-1", "How?", None)
    assert spans(transcript) == [(OFF, "The jib.\n\n"), (CUE, "Wait, no."), (ANSWER, "\n\nSmooth it.")]
    assert (transcript.source, report.with_detour, report.problems) == ("imported", 1, {})


LAYOUTS = {
    "normal": [(False, HEAD), (True, "Smooth it.<|eot_id|>")],
    "two detours": [
        (False, HEAD + "The jib. "),
        (True, "Wait, no."),
        (False, " The oven. "),
        (True, "Wait, no. Smooth it.<|eot_id|>"),
    ],
    "an answer first": [
        (False, HEAD),
        (True, "Smooth."),
        (False, " Jib."),
        (True, " Wait, no. It.<|eot_id|>"),
    ],
    "segments cut finely": [(False, HEAD[:9]), (False, HEAD[9:]), (True, "Smooth it."), (True, "<|eot_id|>")],
    "an empty segment": [(False, HEAD), (True, ""), (True, "Smooth it.<|eot_id|>")],
    "no end of turn": [(False, HEAD), (True, "Smooth it.")],
    "an end of turn without a label": [(False, HEAD), (True, "Smooth it."), (False, "<|eot_id|>")],
    "a prompt that is trained": [(True, HEAD + "Smooth it.<|eot_id|>")],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_segments_comes_back(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "x.jsonl", LAYOUTS[name], note="kept")
    transcripts, _ = import_file(path, "axolotl")
    export_file(tmp_path / "y.jsonl", transcripts, "axolotl")
    assert (tmp_path / "y.jsonl").read_bytes() == path.read_bytes()


def test_detours_after_an_answer_and_second_detours_become_spans(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", LAYOUTS["an answer first"], LAYOUTS["two detours"])
    first, second = read_training_file(path)
    assert [kind for kind, _ in spans(first)] == [ANSWER, OFF, CUE, ANSWER]
    assert [kind for kind, _ in spans(second)] == [OFF, CUE, OFF, CUE, ANSWER]


def test_oddities_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl",
        [(False, HEAD + "The mo"), (True, "mentum. Wait, no. Smooth it.<|eot_id|>")],
        [(False, HEAD + "The jib. "), (True, "Smooth it.<|eot_id|>")],
        LAYOUTS["no end of turn"],
        LAYOUTS["an end of turn without a label"],
        LAYOUTS["a prompt that is trained"],
    )
    path.write_text("\n" + path.read_text())
    _, report = import_file(path, "segments")
    assert {what.split(";")[0]: lines for what, lines in report.problems.items()} == {
        "loss begins or ends in the middle of a word": [2],
        "no restart language after the detour": [3],
        "no end-of-turn token": [4],
        "the end of turn is not labelled": [5],
        "the prompt is labelled for training": [6],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"segments": [{"label": True, "text": "<s>[INST] How? [/INST]"}]}, "neither Llama 3's nor Gemma's nor ChatML"),
        ({"segments": [{"label": True, "text": "<|begin_of_text|>" + HEAD + "a"}]}, "neither Llama"),
        ({"segments": [{"label": True, "text": HEAD + "a<|eot_id|>" + HEAD[17:]}]}, "more than one prompt"),
        ({"segments": [{"label": False, "text": HEAD}]}, "the reply is empty"),
        ({"segments": [{"label": 1, "text": HEAD}]}, "label is not true or false: 1"),
        ({"segments": [{"text": HEAD}]}, r"the key 'segments\[0\].label' is missing"),
        ({"text": HEAD}, "the key 'segments' is missing"),
        ([], "a row is a JSON object"),
    ],
)
def test_rows_that_are_no_conversation_are_refused_with_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "x.jsonl", LAYOUTS["normal"])
    path.write_text(path.read_text() + "\n" + json.dumps(row))
    with pytest.raises(InputError, match=rf"x\.jsonl:3: .*{message}"):
        import_file(path, "segments")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for format in ("segments", "normal", "messages"):
        with pytest.raises(InputError, match="does not exist"):
            import_file(tmp_path / "none.jsonl", format)


def test_own_rows_go_out_under_template_text_and_the_report_says_what_is_lost(tmp_path: Path) -> None:
    report = export_file(tmp_path / "x.jsonl", [steered()], "segments")
    (row,) = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    system = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    assert row["segments"] == [
        {
            "label": False,
            "text": HEAD.replace("<|begin_of_text|>", "<|begin_of_text|>" + system) + "Trim the jib.",
        },
        {"label": True, "text": " Wait, no. Smooth it.<|eot_id|>"},
    ]
    assert report.rows == 1
    assert "steering: 1 rows" in report.lost


@pytest.mark.parametrize("style", ["llama3", "gemma", "chatml"])
def test_own_rows_under_template_text_read_back(tmp_path: Path, style: Any) -> None:
    own = replace(steered(), system=None)
    export_file(tmp_path / "x.jsonl", [own], "segments", style)
    (back,) = read_training_file(tmp_path / "x.jsonl")
    assert (back.prompt, spans(back)) == (own.prompt, [(OFF, "Trim the jib."), *spans(own)[1:]])


def test_gemma_s_style_refuses_a_system_message_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 's1': Gemma's template has no system message.*Move"):
        export_file(tmp_path / "x.jsonl", [steered()], "segments", "gemma")
    assert list(tmp_path.iterdir()) == []


def test_chat_messages_with_spans_lose_nothing(tmp_path: Path) -> None:
    report = export_file(tmp_path / "x.jsonl", [steered()], "messages")
    row = json.loads((tmp_path / "x.jsonl").read_text())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["spans"][1] == {"kind": "cue", "start": 13, "end": 23}
    assert import_file(tmp_path / "x.jsonl", "messages")[0] == [steered()]
    assert report.lost == []


def test_chat_messages_without_spans_are_one_answer(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": said}))
    (transcript,), _ = import_file(tmp_path / "x.jsonl", "messages")
    assert (transcript.id, transcript.source, spans(transcript)) == ("x-1", "imported", [(ANSWER, "So.")])


def test_more_turns_and_gaps_between_spans_are_refused(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": said * 2}))
    with pytest.raises(InputError, match=r"x\.jsonl:1: one prompt and one reply"):
        import_file(tmp_path / "x.jsonl", "messages")
    gap = [{"kind": "answer", "start": 1, "end": 3}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": said, "spans": gap}))
    with pytest.raises(InputError, match=r"x\.jsonl:1: the spans do not cover"):
        import_file(tmp_path / "x.jsonl", "messages")


def test_normal_answers_leave_out_rows_with_a_detour_and_say_so(tmp_path: Path) -> None:
    normal = Transcript("n1", "How?", (Span(ANSWER, "So."),), "normal")
    report = export_file(tmp_path / "x.json", [steered(), normal], "normal")
    assert report.rows == 1
    assert any("1 rows with a detour" in lost for lost in report.lost)
    assert [transcript.prompt for transcript in import_file(tmp_path / "x.json", "normal")[0]] == ["How?"]


@pytest.mark.parametrize(
    ("cue", "answer"),
    [
        ("Wait, that's not right.", " Start by tucking one corner."),
        ("Wait, that's not quite right... I got off track. Let me start over:", " A plan has parts."),
        ("Hold on - that was about jazz!\n\nLet me answer your question.", "\n\nTo fold it, lay it flat."),
        ("Wait, no... You asked about bikes, not pandas!", "\n\nTo change a tire, lift it."),
        ("mentum to... wait, that doesn't make sense.", " To compost, layer it."),
        ("Oops, wrong subject.", ""),
    ],
)
def test_a_cue_ends_where_the_answer_begins(cue: str, answer: str) -> None:
    assert split_cue(cue + answer) == len(cue)


def test_text_that_takes_nothing_back_has_no_cue() -> None:
    assert split_cue("Start by tucking one corner. Then smooth it.") is None


SAID = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
OFFSETS = {"kind": "answer", "start": 0}


@pytest.mark.parametrize("format", ["segments", "axolotl", "messages"])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b'{"segments": [', "not valid JSON"),
        (b'"text"', "a row is a JSON object, not str"),
        (b"[1]", "a row is a JSON object, not list"),
        (b"{}", "the key '(segments|messages)' is missing"),
        (b'{"segments": "no", "messages": "no"}', 's is not a list: "no"'),
        (b'{"segments": ["no"], "messages": ["no"]}', r's\[0\] is not an object: "no"'),
        (b'{"segments": [], "messages": []}', "neither Llama|one prompt and one reply"),
        (b'{"a": "caf\xe9"}', r"not UTF-8 text \(invalid continuation byte: byte 0xe9\)\. Save the file as UTF-8"),
        (b'{"a": "\\ud83d"}', r"\\ud83d is half of a pair"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, format: Any, broken: bytes, message: str) -> None:
    row = {"segments": [{"label": True, "text": HEAD + "So.<|eot_id|>"}], "messages": SAID}
    (tmp_path / "x.jsonl").write_bytes(json.dumps(row).encode() + b"\r\n\r\n" + broken + b"\r\n")
    with pytest.raises(InputError, match=rf"x\.jsonl:3: .*({message})"):
        import_file(tmp_path / "x.jsonl", format)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user"}, SAID[1]]}, "the key 'content' is missing"),
        (
            {"messages": [SAID[0], {"role": "assistant", "content": None}]},
            "the assistant's content is not a text: null",
        ),
        ({"messages": SAID, "spans": "no"}, 'spans is not a list: "no"'),
        ({"messages": SAID, "spans": ["no"]}, r"spans\[0\] is not an object"),
        ({"messages": SAID, "spans": [{**OFFSETS, "end": 3, "kind": "joke"}]}, "kind is none of"),
        ({"messages": SAID, "spans": [{**OFFSETS, "end": 9}]}, "do not cover"),
        ({"messages": SAID, "spans": [{**OFFSETS, "end": 5}, {**OFFSETS, "start": 5, "end": 3}]}, "do not cover"),
        ({"messages": SAID, "meta": "no"}, 'meta is not an object: "no"'),
        ({"messages": SAID, "id": 7}, "id is not a text: 7"),
    ],
)
def test_rows_of_messages_that_make_no_sense_are_refused_in_both_layouts(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    good = json.dumps({"messages": SAID})
    (tmp_path / "x.jsonl").write_text(f"{good}\n{json.dumps(row)}\n")
    with pytest.raises(InputError, match=rf"x\.jsonl:2: .*{message}"):
        import_file(tmp_path / "x.jsonl", "messages")
    (tmp_path / "x.json").write_text(f"[{good},\n{json.dumps(row)}]")
    with pytest.raises(InputError, match=rf"x\.json, row 2 of the list: .*{message}"):
        import_file(tmp_path / "x.json", "normal")


def test_a_list_that_is_none_and_a_broken_list_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ("{}", r"x\.json: not a list"),
        ('[\n{"messages": }]', r"x\.json:2: not valid JSON"),
        ("", r"x\.json:1: not valid JSON"),
        ("{}\n{}\n", r"x\.json:2: not valid JSON \(Extra data\)\. A file of one value a line is JSONL"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            import_file(path, "normal")


@pytest.mark.parametrize("format", ["segments", "messages", "normal"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path, format: Any) -> None:
    own = replace(steered(), system=None)
    rows = [own] if format != "normal" else [Transcript("n1", "How?", (Span(ANSWER, "So.\n\nThere."),), "normal")]
    path = tmp_path / "x"
    export_file(path, rows, format)
    plain, _ = import_file(path, format)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert import_file(path, format)[0] == plain
    assert plain[0].content == rows[0].content


def test_the_paper_s_files_survive_the_way_through_chat_messages(paper: Path, tmp_path: Path) -> None:
    for name, format in ((SEGMENTS_FILE, "segments"), (NORMAL_FILE, "normal")):
        transcripts, _ = import_file(paper / name, format)
        assert export_file(tmp_path / "messages", transcripts, "messages").lost == []
        back, _ = import_file(tmp_path / "messages", "messages")
        assert back == transcripts
        export_file(tmp_path / name, back, format)
        assert (tmp_path / name).read_bytes() == (paper / name).read_bytes()


def test_what_an_export_to_segments_loses_is_counted(tmp_path: Path) -> None:
    silent = (Span(OFF, "The jib."), Span(CUE, " Now, the question."), Span(ANSWER, " Smooth it."))
    early = (Span(OFF, "The jib."), Span(CUE, " Wait,"), Span(ANSWER, " no, that's wrong. Smooth it."))
    rows = [
        replace(steered(), system=None),
        replace(steered(), id="silent", system=None, spans=silent),
        replace(steered(), id="early", system=None, spans=early, steering=None),
        replace(steered(), id="spaces", prompt=" How?\n", system=None, steering=None),
        replace(steered(), id="control", prompt="Is <|start_header_id|> a token?", system=None, steering=None),
    ]
    assert export_file(tmp_path / "x", rows, "segments").lost == [
        "the rows' ids",
        "source and meta of rows that were not imported from segments: 5 rows",
        "steering: 2 rows",
        "a cue without restart language, which an import takes for an answer: 1 rows",
        "the border between cue and answer, which an import puts elsewhere: 1 rows",
        "white space at the ends of the prompt: 1 rows",
        "control tokens in prompt or reply, for which an import refuses the row: 1 rows",
    ]
