"""Which stages of a run are done: what went into each, and what made it."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from esr_train.files import read_json, write_json
from esr_train.provenance import differences, digest, git_state, source_hashes, versions
from esr_train.ranks import ALONE, Ranks
from esr_train.steering.engine import Tally
from recipes.run_log import say

FILE = "stages.json"
MOST_DIFFERENCES = 3


@dataclass(frozen=True)
class Stage:
    """What a stage is and what decides its result.

    Args:
        name: such as `train/tuned`.
        inputs: JSON values that decide what comes out, fingerprints of earlier stages among them.
        outputs: files and folders the stage makes, relative to the run directory.
        modules: the modules that make it; those they import count as well.
        collective: whether all processes work on it; else the main process does, and the others wait.
        discard: takes away what was made of other inputs, where that is not simply the outputs.
        is_whole: whether the rows that it makes are all in a file that several stages share.
    """

    name: str
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]
    modules: tuple[str, ...]
    collective: bool = False
    discard: Callable[[], None] | None = None
    is_whole: Callable[[], bool] | None = None


class StageCache:
    """The stages of one run directory, by the fingerprint of what went into them.

    A stage whose inputs did not change is skipped. One whose inputs changed is done anew, and so is all that builds
    on it, because its fingerprint is part of theirs. Each stage keeps a record of what made it (commit, versions,
    hashes of its modules). If that code has changed since, the stage is kept, and `outdated` says so.

    Args:
        ranks: processes at work here; the main one decides.
        redo: names of stages (or their beginnings, such as `train` for `train/tuned`) to do anew.
        tally: counted up by whoever generates; what a stage adds to it is kept in its record.
        on_begin: told the name of a stage that is about to be done.
    """

    def __init__(
        self,
        directory: Path,
        ranks: Ranks = ALONE,
        redo: Sequence[str] = (),
        tally: Tally | None = None,
        on_begin: Callable[[str], None] | None = None,
    ) -> None:
        self.tally, self.on_begin = tally or Tally(), on_begin
        self.directory = directory
        self.ranks = ranks
        self.redo = tuple(redo)
        self._path = directory / FILE
        self._records: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}
        self._outdated: dict[str, list[str]] = {}
        self._begun: set[str] = set()

    def do(self, stage: Stage, work: Callable[[], None]) -> str:
        """Do a stage unless it is done; returns its fingerprint.

        Args:
            work: does it; must be able to go on from whatever an interrupted call left in the outputs.
        """
        fingerprint, is_due = self.ranks.by_first(lambda: self._begin(stage))
        if is_due:
            if self.on_begin and self.ranks.first:
                self.on_begin(stage.name)
            began, before = time.monotonic(), replace(self.tally)
            if stage.collective:
                work()
            self.ranks.by_first(lambda: self._finish(stage, began, before, None if stage.collective else work))
        return str(fingerprint)

    def outdated(self) -> dict[str, list[str]]:
        """The stages that were kept although modules that make them have changed since: name -> modules."""
        return dict(self._outdated)

    def records(self) -> dict[str, Any]:
        """What made each stage that is done: fingerprint, inputs, commit, versions, hashes of modules, time."""
        return {name: record for name, record in self._records.items() if record.get("done")}

    def is_whole(self) -> bool:
        """Whether every stage that was begun here is done."""
        return len(self.records()) == len(self._records)

    def _fingerprint(self, stage: Stage) -> str:
        record = self._records.get(stage.name, {})
        return digest([dict(stage.inputs), record.get("redone", 0)])

    def _is_done(self, stage: Stage, fingerprint: str) -> bool:
        record = self._records.get(stage.name, {})
        is_there = all((self.directory / output).exists() for output in stage.outputs)
        is_there = is_there and (stage.is_whole is None or stage.is_whole())
        return record.get("fingerprint") == fingerprint and bool(record.get("done")) and is_there

    def _has_output(self, stage: Stage) -> bool:
        return any((self.directory / output).exists() for output in stage.outputs)

    def _begin(self, stage: Stage) -> tuple[str, bool]:
        """The stage's fingerprint, and whether there is anything to do; what was made of other inputs is removed."""
        record = self._records.get(stage.name, {})
        wanted = stage.name not in self._begun and any(_fits(name, stage.name) for name in self.redo)
        self._begun.add(stage.name)
        if wanted and record:
            say(f"{stage.name}: done anew, as asked for")
            record = self._records[stage.name] = {**record, "redone": record.get("redone", 0) + 1}
        fingerprint = self._fingerprint(stage)
        if self._is_done(stage, fingerprint):
            self._note_outdated(stage, record)
            return fingerprint, False
        if record.get("fingerprint") != fingerprint:
            if record:
                if not wanted and (record.get("done") or self._has_output(stage)):
                    anew = "done anew" if record.get("done") else "what was begun is dropped"
                    say(f"{stage.name}: {_changes(record, stage)}; {anew}")
                self._discard(stage)
            redone = {"redone": record["redone"]} if record.get("redone") else {}
            begun = {"fingerprint": fingerprint, "done": False, "inputs": stage.inputs, **redone}
            self._records[stage.name] = {**begun, "made": {"modules": source_hashes(stage.modules)}}
            write_json(self._path, self._records)
        else:
            # Interrupted: what is there may come from other code than what is to follow.
            self._note_outdated(stage, record)
        return fingerprint, True

    def _finish(self, stage: Stage, began: float, before: Tally, work: Callable[[], None] | None) -> None:
        if work:
            work()
        record = self._records[stage.name]
        made = {
            **git_state(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 1),
            "generated": self.tally.since(before, self.ranks.count if stage.collective else 1),
            "versions": versions(),
            "modules": source_hashes(stage.modules),
        }
        self._records[stage.name] = {**record, "done": True, "made": made}
        write_json(self._path, self._records)

    def _note_outdated(self, stage: Stage, record: Mapping[str, Any]) -> None:
        before, now = record.get("made", {}).get("modules", {}), source_hashes(stage.modules)
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed:
            self._outdated[stage.name] = changed

    def _discard(self, stage: Stage) -> None:
        if stage.discard:
            stage.discard()
            return
        for output in stage.outputs:
            path = self.directory / output
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _fits(name: str, stage: str) -> bool:
    return stage == name or stage.startswith(f"{name}/")


def _changes(record: Mapping[str, Any], stage: Stage) -> str:
    """In which inputs a stage differs from what it was made of, in words."""
    found = list(differences(record.get("inputs", {}), stage.inputs))
    more = f" and {len(found) - MOST_DIFFERENCES} more" if len(found) > MOST_DIFFERENCES else ""
    return f"changed: {'; '.join(found[:MOST_DIFFERENCES])}{more}" if found else "its inputs changed"
