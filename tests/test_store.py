"""Rows on disk: what a kill leaves behind, what is refused, what comes back; and trials as rows."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from esr_train.errors import InputError
from esr_train.steering.engine import Sampling
from eval.store import RowStore, Trial, TrialStore, read_trials, trial_to_json
from tests.trial_maker import made

ATTEMPT = {"start": 0, "end": 8, "score": 3}


def trial(number: int, response: str = "Start by folding.") -> Trial:
    return made(key=f"cell-{number}", response=response)


def test_rows_come_back_in_the_order_they_were_appended(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "trials" / "base.jsonl")
    store.add([trial(2), trial(1)])
    store.add([trial(3)])
    again = TrialStore(store.path)
    assert [row.key for row in again.rows()] == ["cell-2", "cell-1", "cell-3"]
    assert again.keys() == {"cell-1", "cell-2", "cell-3"}


def test_a_store_that_does_not_exist_is_empty_and_creates_nothing(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "trials" / "base.jsonl")
    store.add([])
    assert store.rows() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_torn_anywhere_is_run_again(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "base.jsonl"
    TrialStore(path).add([trial(1, "Fold – twice 🧺"), trial(2, "Fold – twice 🧺")])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + kept])
    store = TrialStore(path)
    assert store.keys() == {"cell-1"}
    store.add([trial(2, "Fold – twice 🧺")])
    assert path.read_bytes() == whole


def test_a_line_that_lacks_only_its_newline_is_torn_too(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    TrialStore(path).add([trial(1), trial(2)])
    path.write_bytes(path.read_bytes()[:-1])
    store = TrialStore(path)
    store.add([trial(3)])
    assert [row.key for row in read_trials(path)] == ["cell-1", "cell-3"]


def test_a_malformed_line_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    path.write_text(json.dumps(trial_to_json(trial(1))) + "\n{torn\n" + json.dumps(trial_to_json(trial(2))) + "\n")
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
    path.write_bytes(json.dumps(trial_to_json(trial(1))).encode() + b'\n{"key": "\xff"}\n')
    with pytest.raises(InputError, match=r"base\.jsonl:2"):
        TrialStore(path)


def test_a_key_that_is_there_already_is_refused_and_nothing_of_the_batch_is_written(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "base.jsonl")
    store.add([trial(1)])
    before = store.path.read_bytes()
    for batch in ([trial(2), trial(1)], [trial(3), trial(3)]):
        with pytest.raises(ValueError, match="already has a row"):
            store.add(batch)
    assert store.path.read_bytes() == before
    assert store.keys() == {"cell-1"}


def test_a_doubled_row_in_the_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    path.write_text((json.dumps(trial_to_json(trial(1))) + "\n") * 2)
    with pytest.raises(InputError, match=r"base\.jsonl:2"):
        TrialStore(path)


@pytest.mark.parametrize("text", ["line\nbreak", "\u2028 \u0085 \r", "lone \ud83d surrogate", 'quote " \\u0041'])
def test_any_text_survives(tmp_path: Path, text: str) -> None:
    store = TrialStore(tmp_path / "base.jsonl")
    store.add([trial(1, text), trial(2)])
    assert TrialStore(store.path).rows() == [trial(1, text), trial(2)]


def test_reading_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        read_trials(tmp_path / "nowhere.jsonl")


WRITER = """
import sys
from dataclasses import asdict
from esr_train.steering.engine import Sampling
from eval.store import RowStore
store = RowStore(sys.argv[1], lambda row: row["response"], lambda response: {"response": response})
for number in range(10_000):
    key = f"cell-{number}"
    if key not in store.keys():
        store.append([(key, "x" * 5_000)])
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
    keys = list(RowStore(path, dict, dict).by_key())
    assert keys == [f"cell-{number}" for number in range(len(keys))]
    assert set(reported) <= set(keys)
    assert len(reported) == len(set(reported)) >= 15


def test_a_trial_is_written_as_it_was_read_byte_for_byte(tmp_path: Path) -> None:
    edits = {"prompt": None, "ablate": [3, 17], "clamp": {"5": 2.0}}
    rows = [
        made(
            key="a",
            variant=edits,
            restart_token=4,
            restart_logprobs=[[16, -2.5]],
            attempts=[{"start": 0, "end": 8, "score": 3}],
        ),
        made(key="b", variant={"prompt": "{prompt} Look again."}, flags={"degenerate": None, "hijacked": True}),
        made(key="c", sampling={"temperature": 0, "top_p": 1.0, "max_new_tokens": 5, "repetition_penalty": 1.1}),
    ]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    TrialStore(first).add(rows)
    TrialStore(second).add(read_trials(first))
    assert first.read_bytes() == second.read_bytes()
    assert [json.loads(line).get("variant") for line in first.read_text().splitlines()] == [
        edits, {"prompt": "{prompt} Look again."}, None
    ]  # fmt: skip
    assert json.loads(first.read_text().splitlines()[0])["sampling"] == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"more": 1}, "there is no key 'more'"),
        ({"cell": {"prompt": "a"}}, "the key 'cell.label' is missing"),
        ({"attempts": [{"start": 0, "end": 1, "score": 3, "why": "x"}]}, r"there is no key 'attempts\[0\].why'"),
        ({"attempts": [{"start": 0, "end": 1.5, "score": 3}]}, r"attempts\[0\].end is not a whole number: 1.5"),
        ({"attempts": [{"start": 0, "end": 1, "score": float("nan")}]}, "score: NaN is no finite number"),
        ({"restart_logprobs": [[3, float("-inf")]]}, "restart_logprobs: -Infinity is no finite number"),
        ({"restart_logprobs": [[3]]}, r"restart_logprobs\[0\] is not a list"),
        ({"seed": True}, "seed is not a whole number: true"),
        ({"flags": {"hijacked": 1}}, "flags.hijacked is not true or false: 1"),
        ({"response": None}, "response is not a text: null"),
        ({"cell": []}, "cell is not an object"),
        ({"sampling": {"temperature": 1}}, "the key 'sampling.top_p' is missing"),
        ({"sampling": {**asdict(Sampling()), "top_k": 5}}, "there is no key 'sampling.top_k'"),
    ],
)
def test_a_trial_that_is_not_one_is_an_error_with_its_line_and_key(tmp_path: Path, changes: dict, named: str) -> None:
    path = tmp_path / "base.jsonl"
    sound = trial_to_json(trial(1))
    path.write_text(f"{json.dumps(sound)}\n{json.dumps(sound | {'key': 'b'} | changes)}\n")
    with pytest.raises(InputError, match=rf"base\.jsonl:2: not a row of this file \({named}"):
        read_trials(path)


@pytest.mark.parametrize("doubled", ["arm", "seed"])
def test_a_key_that_comes_twice_in_a_row_is_an_error(tmp_path: Path, doubled: str) -> None:
    line = json.dumps(trial_to_json(trial(1)))
    (tmp_path / "base.jsonl").write_text(line[:-1] + f', "{doubled}": 0}}\n')
    with pytest.raises(InputError, match=rf"base\.jsonl:1.*{doubled}.*twice"):
        read_trials(tmp_path / "base.jsonl")
