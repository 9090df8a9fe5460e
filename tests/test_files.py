import os
import subprocess
import sys
from pathlib import Path

import pytest

from esr_train.errors import InputError, RunError
from esr_train.files import hold, replacing

HOLDER = "import sys; from esr_train.files import hold; hold(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_held_by_another_process_is_refused_with_its_number(holder, tmp_path):
    with pytest.raises(RunError, match=f"run: process {holder.pid} is at work here"):
        hold(tmp_path / "run" / ".lock")


def test_a_killed_process_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()

    hold(tmp_path / "run" / ".lock")

    assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"


def test_the_same_process_may_hold_a_folder_twice(tmp_path):
    hold(tmp_path / ".lock")
    hold(tmp_path / ".lock")


@pytest.mark.parametrize("place", ["file/page.html", "", "long" * 90])
def test_a_place_where_nothing_can_be_written_is_bad_input(tmp_path, place):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(InputError, match=r"cannot be written|this is a folder"), replacing(tmp_path / place):
        pytest.fail("nothing was to be opened")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_what_a_broken_block_wrote_is_gone(tmp_path):
    (tmp_path / "kept").write_text("before")

    def write():
        with replacing(tmp_path / "kept") as file:
            file.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept", "before")]
