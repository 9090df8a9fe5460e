"""Files: read strictly; written aside and renamed, so that a killed run leaves nothing half-written behind."""

import errno
import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml

from esr_train.errors import InputError, RunError
from esr_train.values import errors_at, parse_json, parse_yaml

Row = TypeVar("Row")

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
def replacing(path: Path | str) -> Iterator[IO[str]]:
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
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> int:
    """Write one JSON value a line, whole or not at all; returns the number of rows."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
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
    try:
        return parse_yaml(read_text(path))
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


def read_jsonl(path: Path | str, parse: Callable[[Any], Row]) -> list[Row]:
    """Read one JSON value a line and `parse` each; blank lines are skipped.

    Raises:
        InputError: naming `file:line`, for malformed JSON and for whatever `parse` refuses (see `errors_at`).
    """
    rows = []
    for number, value in json_lines(path):
        with errors_at(f"{path}:{number}"):
            rows.append(parse(value))
    return rows
