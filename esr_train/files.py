"""Files: read strictly, whatever their format; written aside and renamed, so that a kill leaves no half of one."""

import csv
import errno
import fcntl
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

import yaml

from esr_train.errors import InputError, RunError, first_line
from esr_train.values import errors_at, parse_json, parse_yaml

Value = TypeVar("Value")
TABLES = (".txt", ".jsonl", ".csv")
Row = tuple[str, Mapping[str, Any]]
"""Where a row stands (`file:line`, or `name:row 7` of a data set), and its values by column."""

LONGEST_YAML = 1_000_000
"""Characters; what is longer takes minutes to read and is no recipe."""

_held: dict[Path, int] = {}
"""Lock file -> its descriptor, open as long as this process lives: closing one gives up the lock."""


def hold(path: Path | str) -> None:
    """Take a lock file until this process ends, however it ends; taking it twice does no harm.

    Raises:
        RunError: if another process holds it, or the file system there cannot lock.
    """
    path = Path(path).resolve()
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise RunError(
                f"{path.parent}: process {holder or 'unknown'} is at work here. Wait until it is done or end it; two "
                "would write the same files."
            ) from None
        raise RunError(
            f"{path}: the file cannot be locked ({errno.errorcode.get(error.errno or 0)}: {error.strerror}). Put the "
            "run directory (`runs` in the recipe) on a file system with locks, such as a local disk, or have this one "
            "mounted with locks."
        ) from None
    with suppress(OSError):  # The number is for the reader of a message; a full disk does not undo the lock.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    _held[path] = descriptor


@contextmanager
def replacing(path: Path | str) -> Iterator[TextIO]:
    """Open a text file for writing that takes `path`'s place only when the block ends without an error.

    Raises:
        InputError: if nothing can be written there.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.is_dir():
            raise InputError("this is a folder, not a file", str(path), "Name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = aside.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", str(path), "Name another place.") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all.

    Raises:
        ValueError: for a number that is not finite, which is no JSON: what is read back would be refused.
    """
    with replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> int:
    """Write one JSON value a line, whole or not at all; returns the number of rows. No NaN, as in `write_json`."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_text(path: Path | str) -> str:
    """Read a UTF-8 text file as it is, line ends included; a byte order mark is dropped, a `.gz` file unpacked.

    Raises:
        InputError: for a file that cannot be read, naming the line of a byte that is not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
        if Path(path).suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError("the file does not exist", str(path), "Check the path.") from None
    except IsADirectoryError:
        raise InputError("this is a folder, not a file", str(path), "Name a file.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 text ({error.reason}: byte 0x{error.object[error.start]:02x})"
        raise InputError(what, f"{path}:{line}", "Save the file as UTF-8.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"not a whole gzip file ({error})", str(path), "Fetch or pack it again.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({getattr(error, 'strerror', None) or error})", str(path)) from None


def read_lines(path: Path | str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number, without white space at its ends.

    Lines end at a line feed and nowhere else: U+2028, U+0085, form feeds and their like are part of a line.
    """
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(number, text) for number, line in lines if (text := line.strip())]


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a missing or malformed one is an `InputError` naming file and line (see `parse_json`)."""
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        fix = "A file of one value a line is JSONL, which is another format." if error.msg == "Extra data" else None
        raise InputError(f"not valid JSON ({error.msg})", f"{path}:{error.lineno}", fix) from error


def read_yaml(path: Path | str) -> Any:
    """Read a YAML file; a missing or malformed one is an `InputError` naming file and line (see `parse_yaml`)."""
    text = read_text(path)
    if len(text) > LONGEST_YAML:
        raise InputError(f"too long for a file of settings ({len(text)} characters)", str(path), "Name a YAML file.")
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(f"not valid YAML ({problem})", where) from error


def json_lines(path: Path | str) -> Iterator[tuple[int, Any]]:
    """The JSON value of each line that is not blank, with the line's number; see `parse_json`."""
    for number, line in read_lines(path):
        try:
            yield number, parse_json(line)
        except json.JSONDecodeError as error:
            what = f"not valid JSON ({error.msg} at column {error.colno})"
            raise InputError(what, f"{path}:{number}") from error


def read_jsonl(path: Path | str, parse: Callable[[Any], Value]) -> list[Value]:
    """Read one JSON value a line and `parse` each; blank lines are skipped.

    Raises:
        InputError: naming `file:line`, for malformed JSON and for whatever `parse` refuses (see `errors_at`).
    """
    rows = []
    for number, value in json_lines(path):
        with errors_at(f"{path}:{number}"):
            rows.append(parse(value))
    return rows


def read_rows(path: Path | str, column: str) -> Iterator[Row]:
    """The rows of a file, in order.

    Args:
        path: a `.txt` file (one value a line), a `.jsonl` file (one object, or one string, a line), a `.csv` file
            (with a header), or else a folder or hub name that `datasets` loads, of which the split `train` is read.
        column: the column that every row must have; a text file has this one alone.

    Raises:
        InputError: naming `file:line`, for a malformed row or one without the column; naming the path if it
            cannot be loaded.
    """
    kind = Path(path).suffix.lower()
    if kind in (".txt", ".jsonl"):
        read = read_lines if kind == ".txt" else json_lines
        rows: Iterator[tuple[str, Any]] = ((f"{path}:{number}", values) for number, values in read(path))
    else:
        rows = read_csv(path) if kind == ".csv" else _dataset(str(path))
    for where, values in rows:
        row = {column: values} if isinstance(values, str) else values
        if not isinstance(row, Mapping):
            raise InputError(f"a row is a JSON object or a string, not {type(row).__name__}", where)
        if row.get(column) is None:
            has = ", ".join(map(repr, row)) or "none"
            raise InputError(f"the row has no {column!r} (it has {has})", where, "Name the column, or add it.")
        yield where, row


def read_csv(path: Path | str) -> Iterator[Row]:
    """The rows of a CSV file with a header, in order.

    Raises:
        InputError: naming `file:line`, for broken CSV, a column that comes twice, or a row of another length.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        twice = next((name for name in columns if list(columns).count(name) > 1), None)
        if twice is not None:
            raise InputError(f"the column {twice!r} comes twice", f"{path}:1", "Rename or remove one.")
        for values in reader:
            if None in values or None in values.values():
                more = "more" if None in values else "fewer"
                what = f"the row has {more} fields than the header"
                raise InputError(what, f"{path}:{reader.line_num}", "Put text with commas in quotes.")
            yield f"{path}:{reader.line_num}", values
    except csv.Error as error:
        raise InputError(f"not valid CSV ({error})", f"{path}:{reader.reader.line_num}") from error


def _dataset(path: str) -> Iterator[Row]:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    folder = Path(path)
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded: Any = load_from_disk(path)
            loaded = loaded["train"] if isinstance(loaded, DatasetDict) else loaded
        else:
            loaded = load_dataset(path, split="train")
    except Exception as error:  # `datasets` raises whatever its many loaders raise
        reason = first_line(error)
        raise InputError(
            f"neither a {', '.join(TABLES)} file nor a data set that can be loaded ({type(error).__name__}: {reason})",
            path,
            "Check the path; its split 'train' is read.",
        ) from error
    assert isinstance(loaded, Dataset)
    for number, values in enumerate(loaded):
        yield f"{path}:row {number}", values
