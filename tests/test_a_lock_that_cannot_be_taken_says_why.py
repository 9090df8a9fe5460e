"""A run directory that cannot be locked is refused with the true reason: held by another, or no locks there."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from esr_train import files
from esr_train.command import guarded
from esr_train.errors import RunError
from esr_train.files import hold


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_held_means_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    (tmp_path / ".lock").write_text("4711\n")
    refuse(monkeypatch, number)
    with pytest.raises(RunError, match="process 4711 is at work here"):
        hold(tmp_path / ".lock")


@pytest.mark.parametrize(
    "name", ["ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL", "EIO", "EPERM", "ESTALE", "EDEADLK", "EBADF"]
)
def test_anything_else_says_that_there_are_no_locks_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
):
    number = getattr(errno, name)
    refuse(monkeypatch, number)
    assert guarded(lambda: hold(tmp_path / "run" / ".lock"), debug=False) == 1
    said = capsys.readouterr().err
    assert "at work here" not in said
    assert f"{tmp_path}/run/.lock: the file cannot be locked ({errno.errorcode[number]}: {os.strerror(number)})" in said
    assert "on a file system with locks" in said


def test_a_lock_that_could_not_be_taken_can_be_taken_later_and_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        refuse(patched, errno.ENOLCK)
        with pytest.raises(RunError):
            hold(tmp_path / ".lock")
    assert len(os.listdir("/proc/self/fd")) == before
    hold(tmp_path / ".lock")
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_does_not_undo_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def write(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "write", write)
    hold(tmp_path / ".lock")
    monkeypatch.undo()
    hold(tmp_path / ".lock")
