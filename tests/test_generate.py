"""`esr data generate` in real processes: one or two, killed, interrupted, left alone; the file is always the same."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from esr_train.transcript import read_transcripts
from tests.conftest import ROOT
from tests.small_run import Run, dying, new_run

pytestmark = pytest.mark.slow

ROWS = 40
"""Of each source: several chunks for either of two processes."""
DATA = (
    f"data={{steered: {{rows: {ROWS}, start: [0, 2], max_new_tokens: 24}}, normal: {{rows: {ROWS}}}, "
    "max_detour_score: 90, min_answer_score: 0}"
)
KILLED = """
import os, signal, sys
from data_gen.__main__ import main
from recipes.stages import rows

collect = rows.collect


def dying(name, wanted, make, *rest):
    def once(numbers):
        if numbers[0] > 24 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return make(numbers)

    return collect(name, wanted, once, *rest)


rows.collect = dying
sys.exit(main(sys.argv[1:]))
"""
"""The second of two processes is killed in its second chunk."""


def generation(folder: Path, assets: Path) -> Run:
    """`esr data generate`, as small as two processes with several chunks each allow."""
    run = new_run(folder, assets)
    return Run(run.folder, ["data", "generate", *run.words[1:], DATA])


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """Python with these words, at the root of the repository."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def made(folder: Path) -> dict[str, bytes]:
    """The files that must not depend on how they came about, by name; the hash of where prompts lie is left out.

    Of candidates there may be more behind the last wanted row.
    """
    files = [path for path in folder.glob("data/**/*.json*") if ".candidates." not in path.name]
    assert len(files) == 7
    return {re.sub("-[0-9a-f]{16}", "", path.name): path.read_bytes() for path in [*files, folder / "thresholds.json"]}


@pytest.fixture(scope="module")
def whole(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What one process makes that nobody interrupts."""
    run = generation(tmp_path_factory.mktemp("whole"), assets)
    result = dying(run, 0)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_transcripts(run.folder / "data" / "tuned.jsonl")
    assert (sum(row.corrects for row in rows), len(rows)) == (ROWS, 2 * ROWS)
    return Run(run.folder, run.words, int(result.stdout.rpartition("moments: ")[2]))


def started_twice(words: list[str]) -> list[subprocess.Popen[str]]:
    """Two processes that work together, as `accelerate launch` starts them."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    return [start(words, RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank in range(2)]


def test_two_processes_make_what_one_makes(whole, assets, tmp_path):
    run = generation(tmp_path, assets)
    first, second = started_twice(["-m", "data_gen", *run.words[1:]])
    out, errors = first.communicate()
    assert "2 processes make the rows" in out, errors[-3000:]
    assert second.communicate()[0] == ""
    assert made(run.folder) == made(whole.folder)


@pytest.fixture(scope="module")
def abandoned(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, int, str]:
    """A run of two processes of which the second was killed; the first one's exit code and last words."""
    run = generation(tmp_path_factory.mktemp("abandoned"), assets)
    first, second = started_twice(["-c", KILLED, *run.words[1:]])
    _, said = first.communicate(timeout=500)
    assert second.wait(500) == -signal.SIGKILL
    return run, first.returncode, said


def test_a_process_that_is_left_alone_ends_and_says_why(abandoned):
    run, code, said = abandoned
    assert code == 1
    assert "error: process 0 of 2 stops, because another one has ended" in said
    assert "Traceback" not in said
    assert list(run.folder.glob("data/sources/steered-*.candidates.jsonl"))
    assert not (run.folder / "data" / "tuned.jsonl").exists()


def test_what_two_began_one_that_is_interrupted_ends_in_the_same_file(whole, abandoned):
    run, rng = abandoned[0], Random(whole.moments)
    result = dying(run, rng.randrange(1, whole.moments // 4), signal.SIGINT)
    assert result.returncode == 130
    assert "interrupted; the same command goes on where it stopped" in result.stderr
    assert "Traceback" not in result.stderr
    assert dying(run, 0).returncode == 0
    assert made(run.folder) == made(whole.folder)
