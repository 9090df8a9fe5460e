"""Which stages of a run are done: a fingerprint of everything that went into each."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from esr_train.files import read_json, write_json
from esr_train.ranks import ALONE, Ranks


class Stages:
    """The finished stages of one run directory, by fingerprint.

    A stage whose inputs did not change is skipped; one whose inputs changed is done again from the start, and so
    is all that builds on it, because its fingerprint is part of theirs. Of several processes the first decides.
    """

    def __init__(self, directory: Path, ranks: Ranks = ALONE) -> None:
        self.directory = directory
        self.ranks = ranks
        self._file = directory / "stages.json"
        self._done: dict[str, Any] = read_json(self._file) if self._file.is_file() else {}

    def do(
        self, name: str, inputs: Any, outputs: Sequence[str], work: Callable[[], None], together: bool = False
    ) -> str:
        """Do a stage unless it is done; returns its fingerprint.

        Args:
            name: of the stage, such as `train/tuned`.
            inputs: JSON values that decide what comes out, fingerprints of earlier stages among them.
            outputs: files and folders the stage makes, relative to the run directory.
            work: does it; must be able to go on from whatever an interrupted call left in `outputs`.
            together: whether all processes do it; else the first one does, and the others wait.
        """
        fingerprint = digest(inputs)
        if self.ranks.by_first(lambda: self._begin(name, fingerprint, outputs)):
            if together:
                work()
            self.ranks.by_first(lambda: self._finish(name, fingerprint, None if together else work))
        return fingerprint

    def _begin(self, name: str, fingerprint: str, outputs: Sequence[str]) -> bool:
        """Whether there is anything to do; what an earlier call made of other inputs is removed."""
        before = self._done.get(name, {})
        if before.get("fingerprint") != fingerprint:
            if before:
                print(f"{name}: inputs changed, done again", flush=True)
                self._remove(outputs)
            self._note(name, fingerprint, done=False)
        elif before["done"] and all((self.directory / output).exists() for output in outputs):
            return False
        return True

    def _finish(self, name: str, fingerprint: str, work: Callable[[], None] | None) -> None:
        if work:
            work()
        self._note(name, fingerprint, done=True)

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
