"""Which stages of a run are done: a fingerprint of everything that went into each."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from esr_train.files import read_json, write_json


class Stages:
    """The finished stages of one run directory, by fingerprint.

    A stage whose inputs did not change is skipped; one whose inputs changed is done again from the start, and so
    is all that builds on it, because its fingerprint is part of theirs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = directory / "stages.json"
        self._done: dict[str, Any] = read_json(self._file) if self._file.is_file() else {}

    def do(self, name: str, inputs: Any, outputs: Sequence[str], work: Callable[[], None]) -> str:
        """Do a stage unless it is done; returns its fingerprint.

        Args:
            name: of the stage, such as `train/tuned`.
            inputs: JSON values that decide what comes out, fingerprints of earlier stages among them.
            outputs: files and folders the stage makes, relative to the run directory.
            work: does it; must be able to go on from whatever an interrupted call left in `outputs`.
        """
        fingerprint = digest(inputs)
        before = self._done.get(name, {})
        if before.get("fingerprint") != fingerprint:
            if before:
                print(f"{name}: inputs changed, done again", flush=True)
                self._remove(outputs)
            self._note(name, fingerprint, done=False)
        elif before["done"] and all((self.directory / output).exists() for output in outputs):
            return fingerprint
        work()
        self._note(name, fingerprint, done=True)
        return fingerprint

    def _note(self, name: str, fingerprint: str, done: bool) -> None:
        self._done[name] = {"fingerprint": fingerprint, "done": done}
        write_json(self._file, self._done)

    def _remove(self, outputs: Sequence[str]) -> None:
        for output in outputs:
            path = self.directory / output
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
