"""Locks, files that are whole or not there at all, and rows of text, JSONL and CSV files and of data sets."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esr_train.command import guarded
from esr_train.errors import InputError, RunError
from esr_train.files import hold, read_rows, replacing, write_json, write_jsonl
from eval.cells import Prompt, make_pools, read_prompts

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


@pytest.mark.parametrize("write", [write_json, lambda path, value: write_jsonl(path, [value])])
def test_a_number_that_is_not_finite_is_never_written(tmp_path, write):
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(tmp_path / "x.json", {"rate": number})
    assert not list(tmp_path.iterdir())


def test_what_a_broken_block_wrote_is_gone(tmp_path):
    (tmp_path / "kept").write_text("before")

    def write():
        with replacing(tmp_path / "kept") as file:
            file.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept", "before")]


ROWS = [Prompt("How do I bake, quickly?", "bread"), Prompt("Wie näht man?", "sewing")]
SPLITS = {"validation": 0.0, "test": 0.5, "seed": 0}


def csv_file(folder: Path) -> Path:
    path = folder / "p.csv"
    # As a spreadsheet writes it: a byte order mark, quotes and Windows' line ends.
    path.write_bytes('\ufeffprompt,topic\r\n"How do I bake, quickly?",bread\r\nWie näht man?,sewing\r\n'.encode())
    return path


def jsonl_file(folder: Path) -> Path:
    path = folder / "p.jsonl"
    lines = [
        '{"prompt": "How do I bake, quickly?", "topic": "bread"}',
        "",
        '{"prompt": "Wie näht man?", "topic": "sewing"}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def parquet_folder(folder: Path) -> Path:
    from datasets import Dataset

    values = [{"prompt": row.text, "topic": row.topic} for row in ROWS]
    Dataset.from_list(values).to_parquet(str(folder / "set" / "train.parquet"))
    return folder / "set"


def saved_folder(folder: Path) -> Path:
    from datasets import Dataset, DatasetDict

    values = [{"prompt": row.text, "topic": row.topic} for row in ROWS]
    DatasetDict(train=Dataset.from_list(values)).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("make", [csv_file, jsonl_file, parquet_folder, saved_folder])
def test_prompts_of_every_kind_of_file_are_the_same(tmp_path, make):
    (tmp_path / "set").mkdir()
    assert read_prompts(make(tmp_path)) == ROWS


def test_a_text_file_holds_one_prompt_a_line_and_each_is_its_own_topic(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("How do I bake?\n\n  Why?  \n")
    assert read_prompts(path) == [Prompt("How do I bake?", "How do I bake?"), Prompt("Why?", "Why?")]
    from esr_train.recipe import SplitSection

    pools = make_pools(read_prompts(path), SplitSection.model_validate(SPLITS))
    assert (len(pools.train), len(pools.test), len(pools.normal)) == (1, 1, 1)
    assert pools.train == pools.normal


def test_the_column_may_have_another_name(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("question,topic\nHow?,baking\n")
    assert read_prompts(path, "question") == [Prompt("How?", "baking")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "question\nHow?\n", r"p\.csv:2: the row has no 'prompt' \(it has 'question'\)"),
        ("p.csv", "prompt,topic\nHow?,a\nWhat, else, is there?,b\n", r"p\.csv:3: the row has more fields"),
        ("p.csv", 'prompt\n"How?\n', r"p\.csv:\d: not valid CSV"),
        ("p.csv", "prompt,topic\nHow?,a\nhow,b\n", r"p\.csv:3: .* comes twice\. .*p\.csv:2"),
        ("p.jsonl", '{"prompt": "How?"}\n{"prompt"\n', r"p\.jsonl:2: not valid JSON"),
        ("p.jsonl", '\n{"prompt": 3}\n', r"p\.jsonl:2: a prompt must be a text"),
        ("p.jsonl", "3\n", r"p\.jsonl:1: a row is a JSON object or a string"),
        ("p.txt", "How?\nHOW?!\n", r"p\.txt:2: .* comes twice"),
        ("p.txt", "How full is it?\n\uff28\uff4f\uff57 full is it\n", r"p\.txt:2: .* comes twice"),
        ("p.txt", "\n \n", r"p\.txt: there is no prompt"),
        ("p.csv", "", r"p\.csv: there is no prompt"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_prompts(path)


@pytest.mark.parametrize("name", ["none.txt", "none.csv", "none.jsonl"])
def test_a_missing_file_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="does not exist"):
        list(read_rows(tmp_path / name, "prompt"))


@pytest.mark.parametrize("name", ["folder", "nothing here", "some-owner/no-such-set"])
def test_what_cannot_be_loaded_as_a_data_set_is_refused_with_the_reason(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=rf"{name}: neither a \.txt, \.jsonl, \.csv file nor a data set"):
        list(read_rows(name, "prompt"))


def test_a_data_set_without_a_split_for_training_is_refused(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict(test=Dataset.from_list([{"prompt": "How?"}])).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match=r"KeyError: 'train'.* its split 'train' is read"):
        list(read_rows(tmp_path / "saved", "prompt"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence_and_leaves_no_half_of_a_file(tmp_path, monkeypatch, capsys, number):
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    assert guarded(lambda: write_json(tmp_path / "a.json", {}), debug=False) == 1
    assert capsys.readouterr().err.startswith(f"error: {os.strerror(number)}. Check the path and the space")
    assert list(tmp_path.iterdir()) == []
