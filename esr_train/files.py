"""Files written aside and renamed, so that a killed run leaves nothing half-written behind."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from esr_train.errors import InputError, RunError

Row = TypeVar("Row")


_held: dict[Path, int] = {}
"""Lock file -> its descriptor, open as long as this process lives: closing one gives up the lock."""


def hold(path: Path | str) -> None:
    """Take a lock file until this process ends, however it ends; taking it twice does no harm.

    Raises:
        RunError: if another process holds it.
    """
    path = Path(path).resolve()
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        raise RunError(
            f"{path.parent}: process {holder or 'unknown'} is at work here. Wait until it is done or end it; two would "
            "write the same files."
        ) from None
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
    file = _opened(path, aside)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _opened(path: Path, aside: Path) -> IO[str]:
    try:
        if path.is_dir():
            raise InputError("this is a folder, not a file", str(path), "Name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        return aside.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", str(path), "Name another place.") from None


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a missing or malformed one is an `InputError` naming file and line."""
    text = read_text(path)
    try:
        return _parsed(text)
    except json.JSONDecodeError as error:
        fix = "A file of one value a line is JSONL, which is another format." if error.msg == "Extra data" else None
        raise InputError(f"not valid JSON ({error.msg})", f"{path}:{error.lineno}", fix) from error
    except ValueError as error:
        raise InputError(str(error), str(path)) from error


def read_text(path: Path | str) -> str:
    """Read a UTF-8 text file, with a byte order mark or without; an unreadable one is an `InputError`."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError("the file does not exist", str(path), "Check the path.") from None
    except IsADirectoryError:
        raise InputError("this is a folder, not a file", str(path), "Name a file.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 text ({error.reason}: byte 0x{error.object[error.start]:02x})"
        raise InputError(what, f"{path}:{line}", "Save the file as UTF-8.") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", str(path)) from None


def read_jsonl(path: Path | str, parse: Callable[[Any], Row]) -> list[Row]:
    """Read one JSON value a line and `parse` each; blank lines are skipped.

    Raises:
        InputError: naming `file:line`, for malformed JSON and for whatever `parse` refuses
            (`ValueError`, `KeyError`, `TypeError`).
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            rows.append(parse(_parsed(line)))
        except json.JSONDecodeError as error:
            raise InputError(f"not valid JSON ({error.msg} at column {error.colno})", where) from error
        except KeyError as error:
            raise InputError(f"the key {error} is missing", where) from error
        except (ValueError, TypeError) as error:
            raise InputError(str(error).rstrip("."), where) from error
    return rows


def _parsed(text: str) -> Any:
    """The JSON value in a text; a ValueError for one that cannot be written as UTF-8 again."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise ValueError(f"{half} is half of a pair of surrogates and no character") from None
    return value


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> int:
    """Write one JSON value a line, whole or not at all; returns the number of rows."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
