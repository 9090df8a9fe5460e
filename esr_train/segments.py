"""Rows of segments: a conversation as template text, and which stretches of it carry loss."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal

from esr_train.errors import InputError
from esr_train.restarts import split_cue
from esr_train.transcript import Span, SpanKind, Transcript

if TYPE_CHECKING:
    from esr_train.interchange import ImportReport

Style = Literal["llama3", "gemma"]
Piece = tuple[bool, str]
"""A stretch of text, and whether it carries loss."""

_HEADERS = (
    re.compile(
        r"(?:<\|begin_of_text\|>)?"
        r"(?:<\|start_header_id\|>system<\|end_header_id\|>\n\n(?P<system>.*?)<\|eot_id\|>)?"
        r"<\|start_header_id\|>user<\|end_header_id\|>\n\n(?P<prompt>.*?)<\|eot_id\|>"
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        re.DOTALL,
    ),
    re.compile(r"(?:<bos>)?<start_of_turn>user\n(?P<prompt>.*?)<end_of_turn>\n<start_of_turn>model\n", re.DOTALL),
)
_TURN = re.compile(r"<\|start_header_id\|>|<start_of_turn>")
_END = re.compile(r"(?:<\|eot_id\|>|<end_of_turn>\n?)?\Z")


def to_segments(transcript: Transcript, style: Style = "llama3") -> dict[str, Any]:
    """The transcript as a row of paper segments; one that was imported from segments comes back as it was.

    Raises:
        InputError: if the transcript has a system message and the style has none.
    """
    kept = transcript.meta.get("segments") or {}
    header, end = kept.get("header"), kept.get("end")
    if header is None or end is None:
        header, end = _template(transcript, style)
    pieces = _reply_pieces(transcript)
    if kept.get("layout"):
        pieces = _cut("".join([header, transcript.content, end]), kept["layout"])
    else:
        pieces = _join(header, pieces, end)
    return {**kept.get("keys", {}), "segments": [{"label": label, "text": text} for label, text in pieces]}


def from_segments(row: Any, name: str, line: int, report: "ImportReport") -> Transcript:
    """A transcript from a row of segments; template text becomes prompt and system.

    Args:
        row: the JSON value.
        name: begins the transcript's id, its line ends it.
        line: the row's line number.
        report: is told what is odd about the row.

    Raises:
        ValueError, KeyError, TypeError: for a row that is no conversation of one prompt and one reply.
    """
    pieces = _read_pieces(row)
    text = "".join(piece for _, piece in pieces)
    header = next((match for pattern in _HEADERS if (match := pattern.match(text))), None)
    if header is None:
        raise ValueError("the template text is neither Llama 3's nor Gemma's, or the first turn is not a user's")
    end = _END.search(text, header.end())
    assert end is not None
    reply = _between(pieces, header.end(), end.start())
    if _TURN.search(header["prompt"]) or any(_TURN.search(piece) for _, piece in reply):
        raise ValueError("the conversation has more than one prompt and one reply")
    if not any(piece.strip() for _, piece in reply):
        raise ValueError("the reply is empty")
    kept = _kept(row, pieces, header.group(), reply, end.group())
    _report_oddities(line, pieces, header.end(), reply, end.group(), report)
    return Transcript(
        id=f"{name}-{line}",
        prompt=header["prompt"],
        system=(header.groupdict().get("system") or "").strip() or None,
        spans=tuple(_spans(reply, line, report)),
        source="imported",
        meta={"segments": kept},
    )


def _read_pieces(row: Any) -> list[Piece]:
    if not isinstance(row, dict):
        raise TypeError(f"a row is a JSON object, not {type(row).__name__}")
    segments = row["segments"]
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise TypeError("`segments` is a list of objects with `label` and `text`")
    pieces = [(segment["label"], segment["text"]) for segment in segments]
    if not all(isinstance(label, bool) and isinstance(text, str) for label, text in pieces):
        raise TypeError("a segment is an object with a true or false `label` and a `text`")
    return pieces


def _between(pieces: Sequence[Piece], start: int, end: int) -> list[Piece]:
    """The part of `pieces` at characters [start, end); neighbours of one label joined."""
    found, position = [], 0
    for label, text in pieces:
        found.append((label, text[max(start - position, 0) : max(end - position, 0)]))
        position += len(text)
    return _merged(found)


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    full = (piece for piece in pieces if piece[1])
    groups = groupby(full, key=lambda piece: piece[0])
    return [(label, "".join(text for _, text in group)) for label, group in groups]


def _spans(reply: Sequence[Piece], line: int, report: "ImportReport") -> Iterator[Span]:
    for i, (trained, text) in enumerate(reply):
        if not trained:
            yield Span(SpanKind.OFF_TOPIC, text)
            continue
        cut = split_cue(text) if i else 0
        if cut is None:
            report.problems.append(f"line {line}: no restart language after the detour")
            cut = 0
        parts = ((SpanKind.CUE, text[:cut]), (SpanKind.ANSWER, text[cut:]))
        yield from (Span(kind, part) for kind, part in parts if part)


def _kept(row: dict[str, Any], pieces: list[Piece], header: str, reply: list[Piece], end: str) -> dict[str, Any]:
    """What a transcript has no place for and an export needs."""
    kept: dict[str, Any] = {"header": header, "end": end}
    if _join(header, reply, end) != pieces:
        kept["layout"] = [[label, len(text)] for label, text in pieces]
    others = {key: value for key, value in row.items() if key != "segments"}
    return {**kept, "keys": others} if others else kept


def _report_oddities(
    line: int, pieces: list[Piece], start: int, reply: list[Piece], end: str, report: "ImportReport"
) -> None:
    if any(before[-1].isalnum() and after[0].isalnum() for (_, before), (_, after) in pairwise(reply)):
        report.cut_mid_word.append(line)
    if any(label for label, _ in _between(pieces, 0, start)):
        report.problems.append(f"line {line}: the prompt is labelled for training; transcripts never train it")
    if not end:
        report.problems.append(f"line {line}: no end-of-turn token; training adds one")
    elif not pieces[-1][0]:
        report.problems.append(f"line {line}: the end of turn is not labelled; training labels it")


def _reply_pieces(transcript: Transcript) -> list[Piece]:
    return _merged((span.kind is not SpanKind.OFF_TOPIC, span.text) for span in transcript.spans)


def _join(header: str, reply: Sequence[Piece], end: str) -> list[Piece]:
    """The paper's layout: a detour at the start shares the header's segment, the end is always trained."""
    pieces = _merged([(False, header), *reply, (True, end)])
    return pieces if pieces[0][0] is False else [(False, ""), *pieces]


def _cut(text: str, layout: Sequence[Sequence[Any]]) -> list[Piece]:
    pieces, position = [], 0
    for label, length in layout:
        pieces.append((bool(label), text[position : position + length]))
        position += length
    return pieces


def _template(transcript: Transcript, style: Style) -> tuple[str, str]:
    prompt, system = transcript.prompt.strip(), transcript.system
    if style == "gemma":
        if system is not None:
            raise InputError(
                "Gemma's template has no system message",
                f"row {transcript.id!r}",
                "Move the system text into the prompt and set `system` to null.",
            )
        return f"<bos><start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"
    turns = [("system", system.strip())] if system is not None else []
    text = "".join(_llama_head(role) + said + "<|eot_id|>" for role, said in [*turns, ("user", prompt)])
    return f"<|begin_of_text|>{text}{_llama_head('assistant')}", "<|eot_id|>"


def _llama_head(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"
