"""The trial store: what a kill leaves behind, what is refused, what comes back."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esr_train.errors import InputError
from eval.store import TrialStore, read_trials


def trial(number: int, response: str = "Start by folding.") -> dict:
    return {"key": f"cell-{number}", "arm": "base", "response": response}


def test_rows_come_back_in_the_order_they_were_appended(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "trials" / "base.jsonl")
    store.append([trial(2), trial(1)])
    store.append([trial(3)])
    again = TrialStore(store.path)
    assert [row["key"] for row in again.rows()] == ["cell-2", "cell-1", "cell-3"]
    assert again.keys() == {"cell-1", "cell-2", "cell-3"}


def test_a_store_that_does_not_exist_is_empty_and_creates_nothing(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "trials" / "base.jsonl")
    store.append([])
    assert store.rows() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_torn_anywhere_is_run_again(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "base.jsonl"
    TrialStore(path).append([trial(1, "Fold – twice 🧺"), trial(2, "Fold – twice 🧺")])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + kept])
    store = TrialStore(path)
    assert store.keys() == {"cell-1"}
    store.append([trial(2, "Fold – twice 🧺")])
    assert path.read_bytes() == whole


def test_a_line_that_lacks_only_its_newline_is_torn_too(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    TrialStore(path).append([trial(1), trial(2)])
    path.write_bytes(path.read_bytes()[:-1])
    store = TrialStore(path)
    store.append([trial(3)])
    assert [row["key"] for row in read_trials(path)] == ["cell-1", "cell-3"]


def test_a_malformed_line_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    path.write_text(json.dumps(trial(1)) + "\n{torn\n" + json.dumps(trial(2)) + "\n")
    with pytest.raises(InputError, match=r"base\.jsonl:2"):
        TrialStore(path)


@pytest.mark.parametrize("line", ["[]", "{}", '{"key": 3}', '{"key": ""}', "null"])
def test_a_row_without_a_key_is_an_error_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "base.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"base\.jsonl:1.*key"):
        TrialStore(path)


def test_a_file_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    path.write_bytes(json.dumps(trial(1)).encode() + b'\n{"key": "\xff"}\n')
    with pytest.raises(InputError, match=r"base\.jsonl:2"):
        TrialStore(path)


def test_a_key_that_is_there_already_is_refused_and_nothing_of_the_batch_is_written(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "base.jsonl")
    store.append([trial(1)])
    before = store.path.read_bytes()
    for batch in ([trial(2), trial(1)], [trial(3), trial(3)]):
        with pytest.raises(ValueError, match="already has a trial"):
            store.append(batch)
    assert store.path.read_bytes() == before
    assert store.keys() == {"cell-1"}


def test_a_doubled_row_in_the_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    path.write_text((json.dumps(trial(1)) + "\n") * 2)
    with pytest.raises(InputError, match=r"base\.jsonl:2"):
        TrialStore(path)


@pytest.mark.parametrize("text", ["line\nbreak", "\u2028 \u0085 \r", "lone \ud83d surrogate", 'quote " \\u0041'])
def test_any_text_survives(tmp_path: Path, text: str) -> None:
    store = TrialStore(tmp_path / "base.jsonl")
    store.append([trial(1, text), trial(2)])
    assert TrialStore(store.path).rows() == [trial(1, text), trial(2)]


def test_reading_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        read_trials(tmp_path / "nowhere.jsonl")


WRITER = """
import sys
from eval.store import TrialStore
store = TrialStore(sys.argv[1])
for number in range(10_000):
    key = f"cell-{number}"
    if key not in store.keys():
        store.append([{"key": key, "response": "x" * 5_000}])
        print(key, flush=True)
"""


def test_a_killed_writer_loses_no_trial_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    reported: list[str] = []
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout
        reported += [writer.stdout.readline().strip() for _ in range(5)]
        writer.send_signal(signal.SIGKILL)
        reported += writer.stdout.read().split()
        writer.wait()
    keys = [row["key"] for row in read_trials(path)]
    assert keys == [f"cell-{number}" for number in range(len(keys))]
    assert set(reported) <= set(keys)
    assert len(reported) == len(set(reported)) >= 15
