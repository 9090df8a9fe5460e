"""Labels of latents are read in every shape that people export; another shape is refused by name, never guessed at."""

import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from esr_train.errors import InputError
from esr_train.steering.latent_labels import read_labels

LABELS = {7: "spiders", 12: "baking"}


def write(path: Path, content: Any) -> Path:
    data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content))
    data = data if isinstance(data, bytes) else data.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


ROWS = [{"index": "7", "description": "spiders"}, {"index": "12", "description": "baking"}]
PAIRS = [[7, "spiders"], [12, "baking"]]
SHAPES: dict[str, Any] = {
    "rows": ROWS,
    "rows with whole numbers": [{"index": 7, "description": "spiders"}, {"index": 12, "description": "baking"}],
    "rows as pandas writes them": [{"index": 7.0, "label": "spiders"}, {"index": 12.0, "label": "baking"}],
    "rows of the paper": [
        {"index_in_sae": 7, "label": "spiders", "uuid": "u"},
        {"index_in_sae": 12, "label": "baking", "uuid": "v"},
    ],
    "rows of features": [
        {"feature": 7, "explanation": "spiders", "score": 0.5},
        {"feature": 12, "explanation": "baking", "score": None},
    ],
    "rows of features with explanations": [
        {"modelId": "m", "layer": "3-res", "index": "7", "explanations": [{"description": "spiders", "typeName": "t"}]},
        {"modelId": "m", "layer": "3-res", "index": "12", "explanations": [{"description": "baking"}, {"x": 1}]},
        {"modelId": "m", "layer": "3-res", "index": "13", "explanations": []},
    ],
    "an export with facts about itself": {"modelId": "m", "saeId": "3-res", "explanations": ROWS},
    "labels under a key": {"sae": "s", "labels": {"7": "spiders", "12": "baking"}},
    "a table by columns": {"index": {"0": "7", "1": "12"}, "description": {"0": "spiders", "1": "baking"}},
    "a table by columns of the paper": {"label": ["spiders", "baking"], "index_in_sae": [7, 12], "uuid": ["u", "v"]},
    "pairs": PAIRS,
    "pairs with texts": [["7", "spiders"], ["12", "baking"]],
    "an object": {"7": "spiders", "12": "baking"},
    "an object of rows": {"7": {"description": "spiders"}, "12": {"description": "baking", "score": 1}},
    "an object of rows with other names": {"7": {"label": "spiders"}, "12": {"explanation": "baking"}},
    "an object of lists": {"7": ["spiders"], "12": ["baking", "dough"]},
    "an object of lists of rows": {"7": [{"description": "spiders"}], "12": [{"description": "baking"}]},
    "a list by place": [None] * 7 + ["spiders"] + [None] * 4 + ["baking"],
    "a list by place with empty texts": [""] * 7 + ["spiders"] + [""] * 4 + [" baking "],
    "rows without a label among others": [*ROWS, {"index": 3, "description": None}, {"index": 4, "description": " "}],
    "an object without a label among others": {"7": "spiders", "3": None, "4": [], "5": [None], "12": "baking"},
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_json_of_every_shape(tmp_path: Path, shape: str, packed: str):
    assert read_labels(write(tmp_path / f"l.json{packed}", SHAPES[shape])) == LABELS


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["l.jsonl", "l.jsonl.gz"])
@pytest.mark.parametrize("shape", [name for name, value in SHAPES.items() if name.startswith(("rows", "pairs"))])
def test_so_are_their_rows_one_a_line(tmp_path: Path, shape: str, name: str, mark: str):
    lines = mark + "\r\n".join(json.dumps(row) for row in SHAPES[shape]) + "\r\n\r\n"
    assert read_labels(write(tmp_path / name, lines)) == LABELS


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["l.csv", "l.csv.gz"])
@pytest.mark.parametrize("columns", ["index_in_sae,label", "index,description", "feature,explanation", "latent,label"])
def test_so_are_columns(tmp_path: Path, columns: str, name: str, mark: str):
    assert read_labels(write(tmp_path / name, f'{mark}uuid,{columns}\r\nu,7,spiders\r\nv,12,"baking"\r\n')) == LABELS


def test_the_first_label_of_a_latent_counts_and_the_order_is_the_file_s(tmp_path: Path):
    rows = [[12, "baking"], [7, None], [7, "spiders"], [12, "dough"]]
    assert list(read_labels(write(tmp_path / "l.json", rows)).items()) == [(12, "baking"), (7, "spiders")]


NO_INDEX = ["seven", "7.5", "-7", "", "0x7", "７", "1_0", "7 8", -7, 7.5, True, None, [7], 1e300]
BROKEN: dict[str, tuple[str, Any, str]] = {
    **{f"the index {i!r}": ("l.json", [[7, "spiders"], [i, "x"]], r"item 2 of the list: .*index") for i in NO_INDEX},
    **{
        f"the index {i!r} in a line": ("l.jsonl", f'[7, "x"]\n{json.dumps({"index": i, "description": "x"})}', "l:2: ")
        for i in NO_INDEX
    },
    **{
        f"the label {value!r}": ("l.json", [[7, value]], "item 1 of the list: .*label is a text")
        for value in (5, True, [5], {"description": 5}, [[5]])
    },
    "a label under no known key": ("l.json", {"7": {"name": "x"}}, r"key .7.: the key .description. is missing"),
    "a row without an index": ("l.json", [{"description": "x"}], "item 1 of the list: the key 'index' is missing"),
    "a row without a label": ("l.json", [{"index": 7}], "item 1 of the list: the key 'description' is missing"),
    "texts among rows": ("l.json", [{"index": 7, "description": "x"}, "y"], "item 2 of the list: a label is an object"),
    "three in a row": ("l.json", [[7, "x", "y"]], "item 1 of the list: a label is an object"),
    "a number": ("l.json", 7, "labels are a list, or an object"),
    "a text": ("l.json", '"spiders"', "labels are a list, or an object"),
    "no key that is an index": ("l.json", {"spiders": "7"}, r"key .spiders.: a latent.s index is a whole number"),
    "columns of different lengths": (
        "l.json",
        {"index": [7, 12], "label": ["spiders"]},
        "key .index.: a latent.s index",
    ),
    "a table split in parts": (
        "l.json",
        {"columns": ["rank", "label"], "index": [0], "data": [[1, "x"]]},
        "key .columns.: a latent.s index",
    ),
    "nothing": ("l.json", [], "there are no labels"),
    "nothing but nulls": ("l.jsonl", '[7, null]\n{"index": 3, "description": ""}', "there are no labels"),
    "an index twice in an object": ("l.json", '{"7": "spiders", "7": "owls"}', r'the key "7" comes twice'),
    "two SAEs": (
        "l.jsonl",
        '{"index": 7, "description": "x", "layer": "3-res"}\n{"index": 7, "description": "y", "layer": "9-res"}',
        "l:2: the labels are of more than one model or SAE",
    ),
    "two models": (
        "l.json",
        [{"index": 7, "description": "x", "modelId": "a"}, {"index": 8, "description": "y", "modelId": "b"}],
        "item 2 of the list: the labels are of more than one model or SAE",
    ),
    "deep nesting": ("l.json", "[" * 50_000, "l.json:1: not valid JSON .nested more than"),
    "deep nesting in a line": ("l.jsonl", '[7, "x"]\n' + '{"index":' * 50_000, "l:2: not valid JSON .nested more"),
    "a deep label": ("l.json", {"7": json.loads("[" * 90 + "5" + "]" * 90)}, 'key "7": a label is a text, not 5'),
    "an infinite index": ("l.jsonl", '{"index": Infinity, "description": "x"}', "index: Infinity is no finite number"),
    "no gzip": ("l.jsonl.gz", b"", "l.jsonl.gz: "),
    "a long field": ("l.csv", "index,label\n7," + "x" * 200_000, r"l\.csv:2: not valid CSV .*field limit"),
    "a quote that stays open": ("l.csv", 'index,label\n7,"spiders\n8,owls\n', r"l\.csv:\d: not valid CSV"),
    "more fields than columns": ("l.csv", "index,label\n7,spiders, or so\n", r"l\.csv:2: the row has more fields"),
    "fewer fields than columns": ("l.csv", "index,label\n7\n", r"l\.csv:2: the row has fewer fields"),
    "a column twice": ("l.csv", "index,label,label\n7,x,y\n", r"l\.csv:1: the column 'label' comes twice"),
    "no such column": ("l.csv", "number,label\n7,x\n", r"l\.csv:2: the key 'index' is missing"),
    "other bytes": ("l.csv", b"index,label\n7,caf\xe9\n", r"l\.csv:2: not UTF-8 text"),
    "UTF-16": ("l.csv", "index,label\n7,x\n".encode("utf-16"), r"l\.csv:1: not UTF-8 text"),
    "another kind of file": ("l.tsv", "index\tlabel\n7\tx\n", "labels are read from .json, .jsonl or .csv"),
    "another kind of packing": ("l.jsonl.xz", lzma.compress(b'[7, "x"]'), "labels are read from"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_anything_else_is_refused_by_name(tmp_path: Path, name: str):
    file, content, named = BROKEN[name]
    path = write(tmp_path / file, content)
    if name == "no gzip":
        path.write_bytes(b"index,label\n")
    with pytest.raises(InputError, match=named.replace("l:2", r"l\.jsonl:2")) as caught:
        read_labels(path)
    assert len(str(caught.value)) < 500


DAMAGE: dict[str, Any] = {
    "cut off": lambda data: data[:-9],
    "cut short": lambda data: data[:40],
    "another checksum": lambda data: data[:-8] + b"\0" * 8,
    "other bytes": lambda data: data[:20] + b"\xff" * 20 + data[40:],
    "no head": lambda data: data[3:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["l.jsonl.gz", "l.json.gz", "l.csv.gz"])
def test_a_damaged_gzip_is_refused_by_name(tmp_path: Path, name: str, damage: Any):
    data = gzip.compress("".join(json.dumps([i, f"label {i}"]) + "\n" for i in range(300)).encode())
    (tmp_path / name).write_bytes(damage(data))
    with pytest.raises(InputError, match=rf"{name}: not a whole gzip file"):
        read_labels(tmp_path / name)


def test_a_field_may_be_as_long_as_csv_allows(tmp_path: Path):
    with (tmp_path / "l.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["index", "label"], [7, "x" * 100_000]])
    assert read_labels(tmp_path / "l.csv") == {7: "x" * 100_000}
