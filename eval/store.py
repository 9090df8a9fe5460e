"""Trials, and how they and other rows lie on disk: append-only JSONL, a keyed row a line, safe to kill at any time."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from esr_train.errors import InputError
from esr_train.steering.engine import Sampling
from esr_train.values import parse_json, typed
from eval.judging.judge import Attempt

Row = TypeVar("Row")


@dataclass(frozen=True)
class UsedStrength:
    """The strength of a trial in both units (see `esr_train.transcript.Strength`); imported trials know `raw` alone."""

    raw: float
    norm: float | None


@dataclass(frozen=True)
class TrialCell:
    """The cell that a trial ran: prompt and its topic, latent and what it stands for, strength, seed.

    An unsteered trial has no latent, label and strength.
    """

    prompt: str
    topic: str
    latent: int | None
    label: str | None
    strength: UsedStrength | None
    seed: int


@dataclass(frozen=True)
class TrialVariant:
    """What the arm changed beside its weights: the words around the prompt, latents set to zero, to a value, or
    multiplied by a factor.

    Without changed latents `ablate` and `clamp` are None, without a factor `amplify`, without a monitor `monitor`: what
    it does.
    """

    prompt: str | None
    ablate: tuple[int, ...] | None = None
    clamp: Mapping[str, float] | None = None
    monitor: str | None = None
    amplify: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One arm on one cell, as it stands in the trial file.

    Args:
        key: unique in the file.
        arm, condition: which arm, and how the cell was run.
        seed: of the run; repeats of one cell differ in it.
        variant: what the arm changed beside its weights; None for nothing.
        engine: the engine's name.
        sampling: how tokens were drawn; None where it is not known (imported trials).
        prefix: characters of the response that were given, not generated.
        finish_reason: `stop`, `length`, or `alarm` where a monitor ended it; None where it is not known.
        tokens, steered_tokens: generated tokens, and tokens (of prompt and reply) that were steered.
        attempts: in order, covering the response; empty where the judge failed.
        cue: whether an explicit restart phrase is in the response.
        restart_token: generated tokens before the second attempt, where they were counted.
        alarms: generated tokens, from 0, at which a monitor sounded.
        restart_logprobs: at sentence ends of the first attempt (characters) the log-probability (nats) of a restart.
        judge, judge_raw: the judge's name, and its answer as it came.
        flags: the judge's yes/no findings (see `eval.judging.judge.Judgement`).
        error: why there is no score.
    """

    key: str
    arm: str
    condition: str
    seed: int
    cell: TrialCell
    variant: TrialVariant | None = None
    engine: str
    sampling: Sampling | None
    prefix: int = 0
    response: str
    finish_reason: str | None
    tokens: int | None
    steered_tokens: int | None
    attempts: tuple[Attempt, ...]
    cue: bool
    restart_token: int | None = None
    alarms: tuple[int, ...] = ()
    restart_logprobs: tuple[tuple[int, float], ...] = ()
    judge: str
    judge_raw: str
    flags: Mapping[str, bool | None]
    error: str | None


def trial_to_json(trial: Trial) -> dict[str, Any]:
    """The trial as a line of a trial file, keys in the order of the class."""
    row = asdict(trial)
    row["sampling"] = row["sampling"] or {}
    if trial.variant:
        row["variant"] = {key: value for key, value in row["variant"].items() if key == "prompt" or value is not None}
    if not trial.alarms:
        del row["alarms"]
    return row


def trial_from_json(row: Any) -> Trial:
    """A line of a trial file.

    Raises:
        ValueError: naming the key, for one that is missing, unknown or of another type, and for NaN and infinity.
    """
    sampling = row.get("sampling") if isinstance(row, dict) else None
    if sampling == {}:
        row = {**row, "sampling": None}
    elif isinstance(sampling, dict):  # Its defaults are for who samples; how a trial was sampled nobody may guess.
        for key in (field.name for field in fields(Sampling) if field.name not in sampling):
            raise ValueError(f"the key 'sampling.{key}' is missing")
    return typed(Trial, row)


class RowStore(Generic[Row]):
    """Rows under unique keys, in the order in which they were finished: what a loop needs to be resumable.

    A batch is on disk before `append` returns. A kill in mid-write leaves at most one torn last line: it is
    ignored when the file is read and cut off by the next `append`, so its row is simply made again. Sorted
    by key, the content is the same however often the run was interrupted. One writer at a time.

    Args:
        path: the file; it need not exist yet.
        read: a line's JSON object, its `key` included, as a row; what it refuses is a `ValueError`.
        written: a row as a JSON object; `key` is put before it.
        writes: whether appended rows go to disk; of several processes with the same rows only one may.

    Raises:
        InputError: for a malformed or doubled row that is not the torn last line, naming `file:line`.
    """

    def __init__(
        self,
        path: Path | str,
        read: Callable[[Any], Row],
        written: Callable[[Row], dict[str, Any]],
        writes: bool = True,
    ) -> None:
        self.path, self._read, self._written, self._writes = Path(path), read, written, writes
        self._rows: dict[str, Row] = {}
        self._intact = 0
        self._load()

    def keys(self) -> set[str]:
        """The keys of the finished rows."""
        return set(self._rows)

    def rows(self) -> list[Row]:
        """The finished rows, in file order."""
        return list(self._rows.values())

    def by_key(self) -> dict[str, Row]:
        """The finished rows under their keys, in file order."""
        return dict(self._rows)

    def touch(self) -> None:
        """Make the file if it is not there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def append(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Write keys with their rows and wait until they are on disk.

        Raises:
            ValueError: for a key that is already there, or that comes twice in the batch; nothing is written.
                A caller that resumes leaves out `keys()`; a doubled row is a mistake, never an update.
        """
        batch: dict[str, Row] = {}
        for key, row in rows:
            if key in self._rows or key in batch:
                raise ValueError(f"{self.path} already has a row with the key {key!r}")
            batch[key] = row
        if batch and self._writes:
            self._write(b"".join(_line({"key": key, **self._written(row)}) for key, row in batch.items()))
        self._rows.update(batch)

    def drop(self, unwanted: Callable[[Row], bool]) -> None:
        """Take rows out of the file for good."""
        kept = {key: row for key, row in self._rows.items() if not unwanted(row)}
        if len(kept) == len(self._rows):
            return
        aside = self.path.with_name(f".{self.path.name}.partial")
        aside.write_bytes(b"".join(_line({"key": key, **self._written(row)}) for key, row in kept.items()))
        os.replace(aside, self.path)
        self.reload()

    def reload(self) -> None:
        """Read the file again: another process has written it."""
        self._rows.clear()
        self._load()

    def _write(self, data: bytes) -> None:
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
        fix = "Restore the file, or delete it: its rows are then made again."
        try:
            value = parse_json(line.decode(), whole_pairs=False)
            key = value.get("key") if isinstance(value, dict) else None
            if not isinstance(key, str) or not key:
                raise ValueError("a row is a JSON object with a text under 'key'")
            row = self._read(value)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a row of this file ({error})", where, fix) from None
        if key in self._rows:
            raise InputError(f"the key {key!r} was there before", where, fix)
        self._rows[key] = row


def _line(row: dict[str, Any]) -> bytes:
    # A lone surrogate is not UTF-8; backslashreplace turns it into the JSON escape that reads back the same.
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


class TrialStore(RowStore[Trial]):
    """The trials of one arm, usually in `trials/<arm>.jsonl`."""

    def __init__(self, path: Path | str, writes: bool = True) -> None:
        super().__init__(path, trial_from_json, trial_to_json, writes)

    def add(self, trials: Iterable[Trial]) -> None:
        """Write trials and wait until they are on disk (see `append`)."""
        self.append((trial.key, trial) for trial in trials)


def read_trials(path: Path | str) -> list[Trial]:
    """The trials of an existing file, in file order.

    Raises:
        InputError: if the file is missing or malformed.
    """
    if not Path(path).is_file():
        raise InputError("the trial file does not exist", str(path), "Run `esr eval run` first.")
    return TrialStore(path).rows()
