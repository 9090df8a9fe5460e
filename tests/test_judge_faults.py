"""A judge that fails in every way, and a run that is killed at any moment, end in the same metrics.json."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from eval.metrics import Gap, silent_recovery_rate
from eval.store import trial_from_json
from tests.judged_run import CELLS, LEXICAL, evaluate, evaluate_dying
from tests.llm_stub import FAULTS, KEY, Faults, LlmStub, Messages
from tests.oracle import Oracle

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["inspect_ai.model", "tests.judged_run"])
FAULTY = Faults(share=0.3)


def trials(folder: Path) -> list[dict[str, Any]]:
    """Every trial, by its key, without the words in which the judge put it."""
    lines = [line for file in sorted((folder / "trials").iterdir()) for line in file.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    return sorted(({**row, "judge_raw": ""} for row in rows), key=lambda row: row["key"])


def metrics(folder: Path) -> str:
    return (folder / "metrics.json").read_text()


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, LlmStub], None]:
    def run(folder: Path, stub: LlmStub) -> None:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        evaluate(folder)

    return run


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation in which nothing went wrong."""
    folder = tmp_path_factory.mktemp("sound")
    with LlmStub(Oracle(LEXICAL)) as stub, pytest.MonkeyPatch.context() as patch:
        for name, value in stub.environment().items():
            patch.setenv(name, value)
        evaluate(folder)
    return folder


def test_the_sound_run_has_what_the_others_are_compared_on(sound: Path):
    rows = trials(sound)
    assert len(rows) == 2 * 2 * len(CELLS)
    assert {len(row["attempts"]) for row in rows} == {1, 2, 3}
    assert not any(row["error"] for row in rows)
    assert {silent_recovery_rate(trial_from_json(row)) for row in rows} == {0.0, 1.0}
    found = json.loads(metrics(sound))["arms"]["base"]["steered"]
    assert 0 < found["multi_attempt_rate"]["value"] < 1
    assert found["multi_attempt_rate"]["unscored"] == 0


def test_thirty_percent_of_injected_faults_change_nothing(sound: Path, judged, tmp_path: Path):
    with LlmStub(Oracle(LEXICAL), FAULTY) as stub:
        judged(tmp_path, stub)
    assert sum(stub.met.values()) / len(stub.requests) > 0.2
    assert len(stub.met) >= len(FAULTS) - 3
    assert metrics(tmp_path) == metrics(sound)
    assert trials(tmp_path) == trials(sound)


def killed_at_random(folder: Path, kills: int, seed: int) -> int:
    """Run with faults, killed that often, half of the times as a request arrives and half as a file is written.

    Returns:
        How many of the kills met a run that was still going on.
    """
    rng, met = Random(seed), 0
    running: Any = None
    left = 0

    def answer(messages: Messages) -> str:
        nonlocal left
        left -= 1
        if left == 0:
            with suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)
        return Oracle(LEXICAL)(messages)

    with LlmStub(answer, FAULTY) as stub:
        for number in range(kills + 1):
            by_request, last = number % 2 == 0, number == kills
            moment = 0 if by_request or last else rng.randint(1, 12)
            left = rng.randint(1, 12) if by_request and not last else 0
            running = PROCESSES.Process(target=evaluate_dying, args=(folder, stub.environment(), moment))
            running.start()
            running.join()
            met += running.exitcode == -signal.SIGKILL
            assert running.exitcode in ((0,) if last else (0, -signal.SIGKILL))
    return met


def test_a_run_killed_at_random_moments_loses_and_doubles_nothing(sound: Path, tmp_path: Path):
    assert killed_at_random(tmp_path, kills=4, seed=1) == 4
    assert trials(tmp_path) == trials(sound)
    assert metrics(tmp_path) == metrics(sound)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_loses_and_doubles_nothing(sound: Path, tmp_path: Path):
    assert killed_at_random(tmp_path, kills=20, seed=2) >= 10
    assert trials(tmp_path) == trials(sound)
    assert metrics(tmp_path) == metrics(sound)


def test_a_judge_that_never_gets_one_response_right_leaves_it_unscored_and_the_rest_as_it_was(
    sound: Path, judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    victim = next(row["response"] for row in trials(sound) if len(row["attempts"]) == 2)

    def answer(messages: Messages) -> str:
        return "I would rather not." if victim in messages[-1]["content"] else Oracle(LEXICAL)(messages)

    with LlmStub(answer) as stub:
        judged(tmp_path, stub)
    unlike = [(now, then) for now, then in zip(trials(tmp_path), trials(sound), strict=True) if now != then]
    assert unlike
    for now, then in unlike:
        assert then["response"] == victim
        assert (now["attempts"], now["flags"]) == ([], {})
        assert now["error"] == "there is no whole JSON object in it"
        assert silent_recovery_rate(trial_from_json(now)) is Gap.UNSCORED
    found = json.loads(metrics(tmp_path))["arms"][unlike[0][0]["arm"]]["steered"]["multi_attempt_rate"]
    assert found["unscored"] > 0
    assert found["n"] + found["unscored"] == len(CELLS)


def test_the_key_is_in_no_file_of_the_run(sound: Path):
    files = [path for path in sound.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not any(KEY in path.read_text() for path in files)
