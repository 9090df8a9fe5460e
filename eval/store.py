"""Trials on disk: append-only JSONL, one keyed row a line, safe to kill at any moment."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from esr_train.errors import InputError

Trial = dict[str, Any]
"""One arm on one cell, as it stands in the trial file: a JSON object with a unique string under `key`."""


class TrialStore:
    """The trials of one arm, in the order in which they were finished.

    A batch is on disk before `append` returns. A kill in mid-write leaves at most one torn last line: it is
    ignored when the file is read and cut off by the next `append`, so the trial is simply run again. Sorted
    by key, the content is the same however often the run was interrupted. One writer at a time.

    Args:
        path: the file, usually `trials/<arm>.jsonl`; it need not exist yet.
        writes: whether appended rows go to disk; of several processes with the same rows only one may.

    Raises:
        InputError: for a malformed or doubled row that is not the torn last line, naming `file:line`.
    """

    def __init__(self, path: Path | str, writes: bool = True) -> None:
        self.path, self._writes = Path(path), writes
        self._rows: dict[str, Trial] = {}
        self._intact = 0
        self._load()

    def keys(self) -> set[str]:
        """The keys of the finished trials."""
        return set(self._rows)

    def rows(self) -> list[Trial]:
        """The finished trials, in file order."""
        return list(self._rows.values())

    def touch(self) -> None:
        """Make the file if it is not there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def append(self, rows: Iterable[Trial]) -> None:
        """Write a batch and wait until it is on disk.

        Raises:
            ValueError: for a key that is already there, or that comes twice in the batch; nothing is written.
                A caller that resumes leaves out `keys()`; a doubled trial is a mistake, never an update.
        """
        batch: dict[str, Trial] = {}
        for row in rows:
            key = _key(row)
            if key in self._rows or key in batch:
                raise ValueError(f"{self.path} already has a trial with the key {key!r}")
            batch[key] = row
        if batch and self._writes:
            self._write(batch)
        self._rows.update(batch)

    def _write(self, batch: dict[str, Trial]) -> None:
        data = b"".join(_line(row) for row in batch.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self._intact)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._intact += len(data)

    def _load(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", str(self.path)) from None
        self._intact = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._intact].split(b"\n"), start=1):
            if line.strip():
                self._take(line, f"{self.path}:{number}")

    def _take(self, line: bytes, where: str) -> None:
        fix = "Restore the file, or delete it to run the arm again."
        try:
            row = json.loads(line)
            key = _key(row)
        except ValueError as error:
            raise InputError(f"not a trial ({error})", where, fix) from None
        if key in self._rows:
            raise InputError(f"the key {key!r} was there before", where, fix)
        self._rows[key] = row


def _key(row: Any) -> str:
    key = row.get("key") if isinstance(row, dict) else None
    if not isinstance(key, str) or not key:
        raise ValueError("a trial is a JSON object with a string under 'key'")
    return key


def _line(row: Trial) -> bytes:
    # A lone surrogate is not UTF-8; backslashreplace turns it into the JSON escape that reads back the same.
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_trials(path: Path | str) -> list[Trial]:
    """The trials of an existing file, in file order.

    Raises:
        InputError: if the file is missing or malformed.
    """
    if not Path(path).is_file():
        raise InputError("the trial file does not exist", str(path), "Run `esr eval run` first.")
    return TrialStore(path).rows()
