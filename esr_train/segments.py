"""Rows of segments: a conversation as template text, and which stretches of it carry loss."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, Literal

from esr_train.errors import InputError
from esr_train.restarts import split_cue
from esr_train.transcript import Span, SpanKind, Transcript
from esr_train.values import typed

Style = Literal["llama3", "gemma", "chatml"]
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
    re.compile(
        r"(?:<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n)?<\|im_start\|>user\n(?P<prompt>.*?)<\|im_end\|>\n"
        r"<\|im_start\|>assistant\n",
        re.DOTALL,
    ),
)
_BEFORE_REPLY: dict[Style, str] = {
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>model\n",
    "chatml": "<|im_start|>assistant\n",
}
_TURNS = ("<|start_header_id|>", "<start_of_turn>", "<|im_start|>")
_DATE_HEADER = re.compile(r"\ACutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n*")
_CONTROL = re.compile(
    r"<\|[A-Za-z][A-Za-z0-9_]{2,}\|>|<｜[^\s<>｜]{3,}｜>|\[/?INST\]|</s>"
    r"|<(?:bos|eos|pad|unk|(?:start|end)_of_(?:turn|image)|unused\d+)>"
)


@dataclass(frozen=True)
class Segment:
    """A stretch of rendered text, and whether it carries loss."""

    label: bool
    text: str


@dataclass
class ImportReport:
    """What an import has read.

    Args:
        with_detour: rows with an off-topic span.
        normal: rows without one.
        problems: each oddity, as half a sentence, with the numbers of the lines (of a list: the rows) that have it.
    """

    rows: int = 0
    with_detour: int = 0
    normal: int = 0
    problems: dict[str, list[int]] = field(default_factory=dict)

    def note(self, line: int, what: str) -> None:
        """Add a line to those that have an oddity."""
        self.problems.setdefault(what, []).append(line)


def control_tokens(text: str, start: int = 0) -> list[re.Match[str]]:
    """Where control tokens of the usual chat templates stand in a text, in order.

    Known are Llama 3's, ChatML's and their kin (`<|name|>`: a word without spaces between bars, so that the operators
    of `f <| x |> g` are none), DeepSeek's, Gemma's and Mistral's by name; `</s>` unless the text has a `<s>`, which
    makes it HTML.
    """
    is_html = "<s>" in text
    return [match for match in _CONTROL.finditer(text, start) if not (is_html and match[0] == "</s>")]


def style_of(before_reply: str) -> Style | None:
    """The style that a chat template is of, by what it writes between a prompt and a reply; None if it is of none."""
    return next((style for style, end in _BEFORE_REPLY.items() if before_reply.endswith(end)), None)


def to_segments(transcript: Transcript, style: Style = "llama3") -> dict[str, Any]:
    """The transcript as a row of paper segments; one imported from segments, and not changed since, as it was.

    Raises:
        InputError: if the transcript has a system message and the style has none.
    """
    kept: Any = transcript.meta.get("segments")
    with suppress(KeyError, TypeError, ValueError):
        back = from_segments(kept, "", 0, ImportReport())
        if _said(back) == _said(transcript):
            return dict(kept)
    header, end = _template(transcript, style)
    pieces = _merged([(False, header), *_reply_pieces(transcript), (True, end)])
    return {"segments": [{"label": label, "text": text} for label, text in pieces]}


def from_segments(row: Any, name: str, line: int, report: ImportReport) -> Transcript:
    """A transcript from a row of segments; template text becomes prompt and system.

    Control tokens and white space at the end of the reply belong to the template; so does Llama's date header.

    Raises:
        ValueError, KeyError, TypeError: for a row that is no conversation of one prompt and one reply, or one with
            control tokens inside a message.
    """
    pieces = _read_pieces(row)
    text = "".join(piece for _, piece in pieces)
    header = next((match for pattern in _HEADERS if (match := pattern.match(text))), None)
    if header is None:
        what = "the template text is neither Llama 3's nor Gemma's nor ChatML"
        raise ValueError(f"{what}, or the first turn is not a user's")
    tokens = control_tokens(text, header.end())
    end = _reply_end(text, header.end(), tokens)
    system = _without_date(header.groupdict().get("system"))
    inside = [match for match in tokens if match.start() < end]
    _refuse_control_tokens([*control_tokens(f"{system} {header['prompt']}"), *inside])
    reply = _between(pieces, header.end(), end)
    if not reply:
        raise ValueError("the reply is empty")
    _report_oddities(line, pieces, (header.end(), end), len(inside) < len(tokens), report)
    return Transcript(
        id=name,
        prompt=header["prompt"],
        system=system,
        spans=tuple(_spans(reply, line, report)),
        source="imported",
        meta={"segments": row},
    )


def _without_date(system: str | None) -> str | None:
    """Segments hold rendered text; the date that Llama's template writes by itself must not be said twice."""
    return _DATE_HEADER.sub("", system or "").strip() or None


def _reply_end(text: str, start: int, tokens: Sequence[re.Match[str]]) -> int:
    """Where the run of control tokens and white space at the end of `text` begins."""
    end = len(text)
    for match in reversed(tokens):
        if text[match.end() : end].strip():
            break
        end = match.start()
    return start + len(text[start:end].rstrip())


def _refuse_control_tokens(tokens: Sequence[re.Match[str]]) -> None:
    if any(token[0] in _TURNS for token in tokens):
        raise ValueError("the conversation has more than one prompt and one reply")
    if tokens:
        raise ValueError(f"the control token {tokens[0][0]} stands inside a message, where it would become text")


def _read_pieces(row: Any) -> list[Piece]:
    if not isinstance(row, dict):
        raise TypeError(f"a row is a JSON object, not {type(row).__name__}")
    segments = typed(tuple[Segment, ...], row["segments"], "segments")
    return [(segment.label, segment.text) for segment in segments]


def _between(pieces: Sequence[Piece], start: int, end: int) -> list[Piece]:
    """The part of `pieces` at characters [start, end); neighbours of one label joined."""
    parts, position = [], 0
    for label, text in pieces:
        parts.append((label, text[max(start - position, 0) : max(end - position, 0)]))
        position += len(text)
    return _merged(parts)


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    full = (piece for piece in pieces if piece[1])
    groups = groupby(full, key=lambda piece: piece[0])
    return [(label, "".join(text for _, text in group)) for label, group in groups]


def _spans(reply: Sequence[Piece], line: int, report: ImportReport) -> Iterator[Span]:
    for number, (trained, text) in enumerate(reply):
        if not trained:
            yield Span(SpanKind.OFF_TOPIC, text)
            continue
        cut = split_cue(text) if number else 0
        if cut is None:
            report.note(line, "no restart language after the detour")
            cut = 0
        parts = ((SpanKind.CUE, text[:cut]), (SpanKind.ANSWER, text[cut:]))
        yield from (Span(kind, part) for kind, part in parts if part)


def _report_oddities(
    line: int, pieces: list[Piece], borders: tuple[int, int], has_end: bool, report: ImportReport
) -> None:
    start, end = borders
    after = _between(pieces, end, sum(len(text) for _, text in pieces))
    if any(one[-1].isalnum() and other[0].isalnum() for (_, one), (_, other) in pairwise(_between(pieces, *borders))):
        report.note(line, "loss begins or ends in the middle of a word")
    if any(label for label, _ in _between(pieces, 0, start)):
        report.note(line, "the prompt is labelled for training; transcripts never train it")
    if after and after[0][1][0].isspace():
        report.note(line, "white space at the end of the reply is left out")
    if not has_end:
        report.note(line, "no end-of-turn token; training adds one")
    elif not any(label for label, _ in after):
        report.note(line, "the end of turn is not labelled; training labels it")


def _said(transcript: Transcript) -> tuple[str, str | None, list[Piece]]:
    return transcript.prompt, _without_date(transcript.system), _reply_pieces(transcript)


def _reply_pieces(transcript: Transcript) -> list[Piece]:
    return _merged((span.kind is not SpanKind.OFF_TOPIC, span.text) for span in transcript.spans)


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
    turns = [*([("system", system.strip())] if system is not None else []), ("user", prompt)]
    if style == "chatml":
        text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
        return f"{text}<|im_start|>assistant\n", "<|im_end|>"
    text = "".join(_llama_head(role) + said + "<|eot_id|>" for role, said in turns)
    return f"<|begin_of_text|>{text}{_llama_head('assistant')}", "<|eot_id|>"


def _llama_head(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"
