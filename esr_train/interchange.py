"""Transcripts from other projects' files, and back.

Formats:
    segments: JSONL of {"segments": [{"label": bool, "text": str}, …]}, template text included; what carries
        loss is labelled true. The paper's file, and axolotl's `input_output`.
    normal: a JSON list of {"messages": […], "metadata": {…}}; the paper's normal answers.
    messages: JSONL of {"messages": […], "spans": [{"kind", "start", "end"}], …}; ranges are characters of the
        assistant's message. Rows without `spans` are one answer.
    preference: JSONL of {"prompt": […], "chosen": […], "rejected": […]}, messages each, as TRL's DPOTrainer reads it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from esr_train.errors import InputError
from esr_train.files import json_lines, read_json, replacing, write_jsonl
from esr_train.segments import ImportReport, Style, control_tokens, from_segments, to_segments
from esr_train.transcript import SpanKind, Transcript, from_json, to_json
from esr_train.values import errors_at, shown, typed

Format = Literal["segments", "axolotl", "normal", "messages", "preference"]

_ROW_KEYS = ("messages", "spans", "id", "steering", "source", "meta", "metadata")
_TOLD_BY = {"segments": "segments", "chosen": "preference"}
"""Keys that tell a row's format in a file to train on."""
_TRAINED = ("weight", "train", "training", "trainable")
"""Keys by which files of chats say whether a message carries loss."""
_MEANINGFUL = re.compile(r"weight|train|mask|loss|tool|function|reason|think|image|audio|refus", re.IGNORECASE)
"""Keys that change what is said or learned; others are remarks."""


@dataclass(frozen=True)
class Range:
    """A span as characters [start, end) of the reply."""

    kind: SpanKind
    start: int
    end: int


@dataclass
class ExportReport:
    """What an export wrote.

    Args:
        lost: one sentence for each thing that the format cannot hold.
    """

    rows: int = 0
    lost: list[str] = field(default_factory=list)


def import_file(path: Path | str, format: Format) -> tuple[list[Transcript], ImportReport]:
    """Read a file of another format as transcripts.

    Raises:
        InputError: naming file and line, for a row that cannot become a transcript.
    """
    _check_format(format)
    report, transcripts = ImportReport(), []
    parse = _PARSERS[format]
    for where, number, row in _list_rows(path) if format == "normal" else _line_rows(path):
        with errors_at(where):
            transcripts.append(parse(row, f"{Path(path).stem}-{number}", number, report))
    report.rows = len(transcripts)
    report.with_detour = sum(_has_detour(transcript) for transcript in transcripts)
    report.normal = report.rows - report.with_detour
    return transcripts, report


def read_training_file(path: Path | str) -> list[Transcript]:
    """Read a file to train on: rows with `segments` are the paper's, rows with `chosen` TRL's; others transcripts.

    Raises:
        InputError: naming file and line, for a row that is neither.
    """
    transcripts, report = [], ImportReport()
    for where, number, row in _line_rows(path):
        with errors_at(where):
            known = [format for key, format in _TOLD_BY.items() if isinstance(row, dict) and key in row]
            name = f"{Path(path).stem}-{number}"
            transcripts.append(_PARSERS[known[0]](row, name, number, report) if known else from_json(row))
    return transcripts


def export_file(
    path: Path | str, transcripts: Sequence[Transcript], format: Format, style: Style = "llama3"
) -> ExportReport:
    """Write transcripts in another format, whole or not at all.

    Args:
        transcripts: rows; imported ones come back as they were.
        format: see the module.
        style: segments only: the template text around rows that were not imported from segments.

    Raises:
        InputError: for a row that the style cannot hold.
    """
    _check_format(format)
    if format == "normal":
        return _write_normal(path, transcripts)
    if format == "messages":
        return ExportReport(write_jsonl(path, map(_to_messages, transcripts)), _lost_rejected(transcripts))
    if format == "preference":
        return _write_preferences(path, transcripts)
    rows = [to_segments(transcript, style) for transcript in transcripts]
    with replacing(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return ExportReport(len(rows), _lost_in_segments(transcripts, rows))


def _check_format(format: str) -> None:
    if format not in get_args(Format):
        raise InputError(f"{format!r} is not a format", fix=f"Formats: {', '.join(get_args(Format))}.")


def _line_rows(path: Path | str) -> Iterator[tuple[str, int, Any]]:
    return ((f"{path}:{number}", number, row) for number, row in json_lines(path))


def _list_rows(path: Path | str) -> Iterator[tuple[str, int, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError("not a list of {messages, metadata}", str(path))
    return ((f"{path}, row {number} of the list", number, row) for number, row in enumerate(rows, start=1))


def _lost_in_segments(transcripts: Sequence[Transcript], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What an import of the rows would not bring back, found by importing them."""
    native = [transcript for transcript in transcripts if "segments" not in transcript.meta]
    lost = Counter(_lost_in_row(*pair) for pair in zip(transcripts, rows, strict=True))
    kinds = {
        "source and meta of rows that were not imported from segments": len(native),
        "steering": sum(transcript.steering is not None for transcript in transcripts),
        "the rejected reply": sum(transcript.rejected is not None for transcript in transcripts),
        **{what: count for what, count in lost.items() if what},
    }
    return ["the rows' ids", *(f"{what}: {count} rows" for what, count in kinds.items() if count)]


def _lost_in_row(transcript: Transcript, row: dict[str, Any]) -> str | None:
    """The worst that an import of the row does to its spans, found by importing it."""
    try:
        back = from_segments(row, "", 0, ImportReport())
    except ValueError:
        return "control tokens in prompt or reply, for which an import refuses the row"
    if transcript.corrects and not back.corrects:
        return "a cue without restart language, which an import takes for an answer"
    if transcript.content != back.content:
        return "control tokens or white space at the end of the reply"
    if transcript.spans != back.spans:
        return "the border between cue and answer, which an import puts elsewhere"
    return None if transcript.prompt == back.prompt else "white space at the ends of the prompt"


def _write_normal(path: Path | str, transcripts: Sequence[Transcript]) -> ExportReport:
    kept = [transcript for transcript in transcripts if not _has_detour(transcript)]
    rows = []
    for transcript in kept:
        row = _to_messages(transcript)
        rows.append({"messages": row["messages"], "metadata": row["meta"].get("metadata", {})})
    with replacing(path) as file:
        file.write(json.dumps(rows, indent=4))
    lost = ["the rows' ids and sources, and whatever of their meta is not in `metadata`"]
    if steered := sum(transcript.steering is not None for transcript in kept):
        lost.append(f"the steering of {steered} rows")
    lost += _lost_rejected(kept)
    if len(kept) < len(transcripts):
        lost.append(f"{len(transcripts) - len(kept)} rows with a detour, which the format has no place for")
    return ExportReport(len(rows), lost)


def _lost_rejected(transcripts: Sequence[Transcript]) -> list[str]:
    count = sum(transcript.rejected is not None for transcript in transcripts)
    return [f"the rejected reply of {count} rows"] if count else []


def _write_preferences(path: Path | str, transcripts: Sequence[Transcript]) -> ExportReport:
    """Both replies whole: what they have in common cancels in DPO's difference of log-probabilities."""
    kept = [transcript for transcript in transcripts if transcript.rejected is not None]
    rows = write_jsonl(path, map(_to_preference, kept))
    lost = ["the rows' ids, sources, spans and meta"]
    if steered := sum(transcript.steering is not None for transcript in kept):
        lost.append(f"the steering of {steered} rows, without which TRL trains on them")
    if others := len(transcripts) - len(kept):
        lost.append(f"{others} rows without a rejected reply")
    return ExportReport(rows, lost)


def _to_preference(transcript: Transcript) -> dict[str, Any]:
    rejected = "".join(span.text for span in transcript.rejected or ())
    return {
        "prompt": [*_system(transcript), {"role": "user", "content": transcript.prompt}],
        "chosen": [{"role": "assistant", "content": transcript.content}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _from_preference(row: Any, name: str, line: int, report: ImportReport) -> Transcript:
    """A row of texts or of messages; the prompt may stand at the beginning of both replies' messages instead."""
    if not isinstance(row, dict):
        raise TypeError(f"a row is a JSON object, not {type(row).__name__}")
    _check_others(row, ("prompt", "chosen", "rejected"), "a row", line, report)
    prompt = _as_messages(row.get("prompt", []), "user")
    replies = [_as_messages(row[side], "assistant") for side in ("chosen", "rejected")]
    if "prompt" not in row:
        (*prompt, chosen), (*other, rejected) = replies
        if prompt != other:
            raise ValueError("chosen and rejected answer different prompts")
        replies = [[chosen], [rejected]]
    if any(len(reply) != 1 for reply in replies):
        raise ValueError("a reply is one message of the assistant")
    (chosen,), (rejected,) = replies
    transcript = _from_messages({"messages": [*prompt, chosen]}, name, line, report)
    worse = _from_messages({"messages": [*prompt, rejected]}, name, line, report)
    return from_json({**to_json(transcript), "rejected": to_json(worse)["spans"]})


def _as_messages(value: Any, role: str) -> list[dict[str, Any]]:
    return (
        [{"role": role, "content": value}]
        if isinstance(value, str)
        else [*typed(tuple[dict[str, Any], ...], value, role)]
    )


def _system(transcript: Transcript) -> list[dict[str, str]]:
    return [] if transcript.system is None else [{"role": "system", "content": transcript.system}]


def _to_messages(transcript: Transcript) -> dict[str, Any]:
    row = to_json(transcript)
    spans, position = [], 0
    for span in transcript.spans:
        spans.append({"kind": str(span.kind), "start": position, "end": position + len(span.text)})
        position += len(span.text)
    user = {"role": "user", "content": transcript.prompt}
    assistant = {"role": "assistant", "content": transcript.content}
    kept = {key: row[key] for key in ("id", "steering", "source", "meta")}
    return {"messages": [*_system(transcript), user, assistant], "spans": spans, **kept}


def _from_messages(row: Any, name: str, line: int, report: ImportReport) -> Transcript:
    if not isinstance(row, dict):
        raise TypeError(f"a row is a JSON object, not {type(row).__name__}")
    messages = typed(tuple[dict[str, Any], ...], row["messages"], "messages")
    roles = [message["role"] for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"one prompt and one reply are needed, after at most one system message; roles: {roles}")
    texts = [_content(message, line, report) for message in messages]
    _check_others(row, _ROW_KEYS, "a row", line, report)
    meta = {} if row.get("meta") is None else dict(typed(dict, row["meta"], "meta"))
    if "metadata" in row:
        meta["metadata"] = row["metadata"]
    return from_json(
        {
            "id": name if row.get("id") is None else row["id"],
            "prompt": texts[-2],
            "system": texts[0] if len(texts) == 3 else None,
            "spans": _cut_reply(row, texts[-1]),
            "steering": row.get("steering"),
            "source": row.get("source", "imported"),
            "meta": meta,
        }
    )


def _content(message: dict[str, Any], line: int, report: ImportReport) -> str:
    role, content = message["role"], typed(str, message["content"], f"the {message['role']}'s content")
    if control_tokens(content):
        report.note(line, "control tokens in a message; they are taken for text, and trained as text")
    for key in _TRAINED:
        if message.get(key) is not None and message[key] != (role == "assistant"):
            raise ValueError(
                f"{key} of the {role} is {shown(message[key])}: all of a reply is trained and nothing else; mark what "
                "is not to be trained as an off_topic span"
            )
    _check_others(message, ("role", "content", *_TRAINED), f"the {role}'s message", line, report)
    return content


def _check_others(row: dict[str, Any], keys: Sequence[str], what: str, line: int, report: ImportReport) -> None:
    """Refuse keys that a transcript cannot honour; note those that are only remarks."""
    for key in (key for key in row if key not in keys):
        if _MEANINGFUL.search(key) and row[key] not in (None, [], {}, ""):
            raise ValueError(f"{what} has {key!r}, which a transcript cannot hold: remove the key, or the row")
        if not _MEANINGFUL.search(key):
            report.note(line, f"{key!r} of {what} is left out")


def _cut_reply(row: dict[str, Any], reply: str) -> list[dict[str, Any]]:
    if row.get("spans") is None:
        return [{"kind": "answer", "text": reply}]
    spans = typed(tuple[Range, ...], row["spans"], "spans")
    borders = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != borders[:-1] or borders[-1] != len(reply) or borders != sorted(borders):
        raise ValueError("the spans do not cover the reply from end to end")
    return [{"kind": span.kind, "text": reply[span.start : span.end]} for span in spans]


def _has_detour(transcript: Transcript) -> bool:
    return any(span.kind is SpanKind.OFF_TOPIC for span in transcript.spans)


_PARSERS = {
    "segments": from_segments,
    "axolotl": from_segments,
    "normal": _from_messages,
    "messages": _from_messages,
    "preference": _from_preference,
}
