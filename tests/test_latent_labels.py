"""Label files as other people write them, and what is wrong with them by line."""

import csv
import gzip
import json

import pytest

from esr_train.errors import InputError
from esr_train.steering.latent_labels import read_labels

NEURONPEDIA = [{"index": "12", "description": "baking"}, {"index": "7", "description": "sails"}]


def test_every_form_of_label_file_gives_the_same_labels(tmp_path):
    lines = "\n".join(json.dumps(row) for row in NEURONPEDIA) + "\n"
    (tmp_path / "a.json").write_text('{"12": "baking", "7": "sails"}')
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.csv").write_text("uuid,label,index_in_sae\nx,baking,12\ny,sails,7\n")
    for name in ("a.json", "b.jsonl", "c.jsonl.gz", "d.csv"):
        assert read_labels(tmp_path / name) == {12: "baking", 7: "sails"}, name
    (tmp_path / "e.json").write_text('["baking", null, "sails"]')
    assert read_labels(tmp_path / "e.json") == {0: "baking", 2: "sails"}


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.json", '{"twelve": "x"}', 'a.json: key "twelve"'),
        ("b.jsonl", '{"index": "1", "description": "x"}\n{"index": 2}\n', "b.jsonl:2"),
        ("c.jsonl", '{"index": "1", "description": "x"}\n{oops\n', "c.jsonl:2"),
        ("d.csv", "index_in_sae,label\n1,x\nb,y\n", "d.csv:3"),
        ("e.txt", "x", "e.txt"),
        ("f.jsonl.gz", "not gzip", "f.jsonl.gz"),
        ("g.jsonl", "", "g.jsonl"),
        ("h.jsonl", '{"index": 1, "description": [5]}\n', "h.jsonl:1"),
        ("i.jsonl", "\n[1]\n", "i.jsonl:2"),
        ("j.csv", "number,label\n1,x\n", "j.csv:2"),
    ],
)
def test_a_broken_label_file_is_named_with_its_line(tmp_path, name, text, where):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=where):
        read_labels(tmp_path / name)


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz", "none.csv", "none.json"])
def test_a_missing_label_file_is_bad_input(tmp_path, name):
    with pytest.raises(InputError, match="does not exist"):
        read_labels(tmp_path / name)


def batch(*rows: tuple[int, str | None]) -> str:
    return "".join(json.dumps({"index": str(i), "description": text, "layer": "20-res"}) + "\n" for i, text in rows)


def test_a_folder_of_batches_is_read_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "batch-10.jsonl.gz").write_bytes(gzip.compress(batch((9, "late"), (1, "again")).encode()))
    (tmp_path / "batch-2.jsonl").write_text(batch((5, " sails "), (6, None)))
    (tmp_path / "batch-0.jsonl.gz").write_bytes(gzip.compress(batch((1, "dough")).encode()))
    (tmp_path / "README.md").write_text("no labels")
    assert list(read_labels(tmp_path).items()) == [(1, "dough"), (5, "sails"), (9, "late")]


def test_a_broken_batch_is_named_with_its_line_and_a_folder_without_any_as_such(tmp_path):
    with pytest.raises(InputError, match=r"no \.jsonl or \.jsonl\.gz file in the folder"):
        read_labels(tmp_path)
    (tmp_path / "batch-0.jsonl.gz").write_bytes(gzip.compress(b'{"index": "1", "description": "x"}\n{"index": '))
    with pytest.raises(InputError, match=r"batch-0\.jsonl\.gz:2: not valid JSON"):
        read_labels(tmp_path)


def test_a_truncated_download_is_bad_input(tmp_path):
    whole = gzip.compress(batch(*((i, f"label {i}") for i in range(200))).encode())
    (tmp_path / "batch-0.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"batch-0\.jsonl\.gz: not a whole gzip file"):
        read_labels(tmp_path)


def test_a_csv_label_may_hold_commas_quotes_and_lines(tmp_path):
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["label", "index_in_sae"], ['dough, "risen"\nor not', 4], ["sails", 7]])
    assert read_labels(tmp_path / "a.csv") == {4: 'dough, "risen"\nor not', 7: "sails"}
