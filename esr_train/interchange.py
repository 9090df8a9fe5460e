"""Transcripts from other projects' files, and back.

Formats:
    segments: JSONL of {"segments": [{"label": bool, "text": str}, …]}, template text included; what carries
        loss is labelled true. The paper's file, and axolotl's `input_output`.
    normal: a JSON list of {"messages": […], "metadata": {…}}; the paper's normal answers.
    messages: JSONL of {"messages": […], "spans": [{"kind", "start", "end"}], …}; ranges are characters of the
        assistant's message. Rows without `spans` are one answer.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from esr_train.errors import InputError
from esr_train.files import read_json, read_jsonl, read_text, replacing, write_jsonl
from esr_train.segments import Style, from_segments, to_segments
from esr_train.transcript import SpanKind, Transcript, from_json, to_json

Format = Literal["segments", "axolotl", "normal", "messages"]


@dataclass
class ImportReport:
    """What an import found.

    Args:
        rows: transcripts read.
        with_detour: rows with an off-topic span.
        normal: rows without one.
        cut_mid_word: lines of rows whose loss begins or ends in the middle of a word.
        problems: one sentence for each further oddity, with its line.
    """

    rows: int = 0
    with_detour: int = 0
    normal: int = 0
    cut_mid_word: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class ExportReport:
    """What an export wrote.

    Args:
        rows: rows written.
        lost: one sentence for each thing that the format cannot hold.
    """

    rows: int = 0
    lost: list[str] = field(default_factory=list)


def import_file(path: Path | str, format: Format) -> tuple[list[Transcript], ImportReport]:
    """Read a file of another format as transcripts.

    Raises:
        InputError: naming file and line, for a row that cannot become a transcript.
    """
    report = ImportReport()
    name = Path(path).stem
    if format == "normal":
        transcripts = _read_normal(path, name)
    elif format == "messages":
        numbers = _line_numbers(path)
        transcripts = read_jsonl(path, lambda row: _from_messages(row, f"{name}-{next(numbers)}"))
    elif format in get_args(Format):
        numbers = _line_numbers(path)
        transcripts = read_jsonl(path, lambda row: from_segments(row, name, next(numbers), report))
    else:
        raise InputError(f"{format!r} is not a format", fix=f"Formats: {', '.join(get_args(Format))}.")
    report.rows = len(transcripts)
    report.with_detour = sum(_has_detour(transcript) for transcript in transcripts)
    report.normal = report.rows - report.with_detour
    return transcripts, report


def read_segments(path: Path | str) -> list[Transcript]:
    """Read a segments file; see `import_file`, which also reports what is odd in it."""
    return import_file(path, "segments")[0]


def export_file(
    path: Path | str, transcripts: Sequence[Transcript], format: Format, style: Style = "llama3"
) -> ExportReport:
    """Write transcripts in another format, whole or not at all.

    Args:
        path: the file.
        transcripts: rows; imported ones come back as they were.
        format: see the module.
        style: segments only: the template text around rows that were not imported from segments.

    Raises:
        InputError: for a row that the style cannot hold.
    """
    if format == "normal":
        return _write_normal(path, transcripts)
    if format == "messages":
        return ExportReport(write_jsonl(path, map(_to_messages, transcripts)))
    if format not in get_args(Format):
        raise InputError(f"{format!r} is not a format", fix=f"Formats: {', '.join(get_args(Format))}.")
    rows = [to_segments(transcript, style) for transcript in transcripts]
    with replacing(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return ExportReport(len(rows), _lost_in_segments(transcripts, rows))


def _lost_in_segments(transcripts: Sequence[Transcript], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What an import of the rows would not bring back, found by importing them."""
    native = [transcript for transcript in transcripts if "segments" not in transcript.meta]
    lost = Counter(_lost_in_row(*pair) for pair in zip(transcripts, rows, strict=True))
    kinds = {
        "source and meta of rows that were not imported from segments": len(native),
        "steering": sum(transcript.steering is not None for transcript in transcripts),
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
    if transcript.spans != back.spans:
        return "the border between cue and answer, which an import puts elsewhere"
    return None if transcript.prompt == back.prompt else "white space at the ends of the prompt"


def _read_normal(path: Path | str, name: str) -> list[Transcript]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError("not a list of {messages, metadata}", str(path))
    transcripts = []
    for number, row in enumerate(rows, start=1):
        try:
            transcripts.append(_from_messages(row, f"{name}-{number}"))
        except (KeyError, TypeError, ValueError) as error:
            what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise InputError(what, f"{path}, row {number} of the list") from error
    return transcripts


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
    if len(kept) < len(transcripts):
        lost.append(f"{len(transcripts) - len(kept)} rows with a detour, which the format has no place for")
    return ExportReport(len(rows), lost)


def _to_messages(transcript: Transcript) -> dict[str, Any]:
    row = to_json(transcript)
    system = [] if transcript.system is None else [{"role": "system", "content": transcript.system}]
    spans, position = [], 0
    for span in transcript.spans:
        spans.append({"kind": str(span.kind), "start": position, "end": position + len(span.text)})
        position += len(span.text)
    user = {"role": "user", "content": transcript.prompt}
    assistant = {"role": "assistant", "content": transcript.content}
    kept = {key: row[key] for key in ("id", "steering", "source", "meta")}
    return {"messages": [*system, user, assistant], "spans": spans, **kept}


def _from_messages(row: Any, name: str) -> Transcript:
    if not isinstance(row, dict):
        raise TypeError(f"a row is a JSON object, not {type(row).__name__}")
    said = [_message(message) for message in _list(row, "messages")]
    roles = [role for role, _ in said]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"one prompt and one reply are needed, after at most one system message; roles: {roles}")
    reply = said[-1][1]
    ranges: list[Any] = _list(row, "spans") if row.get("spans") else [{"kind": "answer", "start": 0, "end": len(reply)}]
    if not all(isinstance(span, dict) for span in ranges):
        raise TypeError("a span is a JSON object with `kind`, `start` and `end`")
    borders = [0, *(span["end"] for span in ranges)]
    if [span["start"] for span in ranges] != borders[:-1] or borders[-1] != len(reply) or borders != sorted(borders):
        raise ValueError("the spans do not cover the reply from end to end")
    meta = row.get("meta") or {}
    if not isinstance(meta, dict):
        raise TypeError(f"meta must be a JSON object, not {type(meta).__name__}")
    meta = dict(meta)
    if "metadata" in row:
        meta["metadata"] = row["metadata"]
    return from_json(
        {
            "id": row.get("id", name),
            "prompt": said[-2][1],
            "system": said[0][1] if len(said) == 3 else None,
            "spans": [{"kind": span["kind"], "text": reply[span["start"] : span["end"]]} for span in ranges],
            "steering": row.get("steering"),
            "source": row.get("source", "imported"),
            "meta": meta,
        }
    )


def _list(row: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise TypeError(f"`{key}` must be a list, not {type(row[key]).__name__}")
    return list(row[key])


def _message(value: Any) -> tuple[str, str]:
    if not isinstance(value, dict):
        raise TypeError(f"a message is a JSON object with `role` and `content`, not {type(value).__name__}")
    role, content = value["role"], value["content"]
    if not isinstance(content, str):
        raise TypeError(f"the content of the {role} must be text, not {type(content).__name__}")
    return role, content


def _has_detour(transcript: Transcript) -> bool:
    return any(span.kind is SpanKind.OFF_TOPIC for span in transcript.spans)


def _line_numbers(path: Path | str) -> Iterator[int]:
    """The numbers of the lines that are not blank, as `read_jsonl` parses them."""
    return (n for n, line in enumerate(read_text(path).split("\n"), start=1) if line.strip())
