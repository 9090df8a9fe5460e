"""What an SAE's latents stand for: label files, as Neuronpedia, the paper and other people write them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from esr_train.errors import InputError
from esr_train.files import json_lines, read_csv, read_json
from esr_train.models import local_path
from esr_train.values import errors_at, shown

BATCHES = (".jsonl", ".jsonl.gz")
Row = tuple[str, Any]
"""Where a row stands (`file:line`), and its values: an object with index and label, or a pair of them."""

_INDEX = ("index", "index_in_sae", "feature_index_in_sae", "latent", "feature", "feature_index")
_LABEL = ("description", "label", "explanation", "explanations", "feature_label", "text")
_WHOLE = ("labels", "explanations", "features", "latents")
"""Keys under which an export may hold its labels beside facts about itself."""
_SAE = ("modelId", "layer", "model_id", "sae_id")
"""Keys by which rows of Neuronpedia name the model and SAE that they belong to."""


def read_labels(path: Path | str) -> dict[int, str]:
    """Labels of latents, by index, in the order of the file; a latent's first label is the one that counts.

    Forms: a folder of Neuronpedia's batches, or one of them as jsonl (`{"index": "12", "description": "..."}`); csv
    with columns such as `index_in_sae` and `label`; json: a list of labels, of such rows or of pairs, or an object
    from index to label. Each of them may be packed (`.gz`). A label is a text, or a list or an object that holds one;
    latents without any are left out.

    Raises:
        InputError: naming file and line.
    """
    path = local_path(str(path)) or Path(path)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if path.is_dir() or kind == "jsonl":
        rows: Iterable[Row] = (
            (f"{file}:{number}", row) for file in label_files(path) for number, row in json_lines(file)
        )
    elif kind == "csv":
        rows = read_csv(path)
    elif kind == "json":
        rows = _entries(path, read_json(path))
    else:
        raise InputError(
            "labels are read from .json, .jsonl or .csv (or these packed as .gz), or from a folder of .jsonl batches",
            str(path),
            "Rename or convert it.",
        )
    return _labels(path, rows)


def label_files(path: Path) -> list[Path]:
    """The files of which `read_labels` reads a path: itself, or a folder's batches in the order of their numbers.

    Raises:
        InputError: for a folder without batches.
    """
    if not path.is_dir():
        return [path]
    files = [file for file in path.iterdir() if file.name.endswith(BATCHES) and file.is_file()]
    if not files:
        raise InputError("there is no .jsonl or .jsonl.gz file in the folder", str(path), "Name the folder of batches.")
    # Text and numbers take turns, beginning with text, so that batch-2 comes before batch-10.
    parts = {file: re.split(r"([0-9]+)", file.name) for file in files}
    return sorted(files, key=lambda file: [int(part) if part.isdecimal() else part for part in parts[file]])


def _entries(path: Path, value: Any) -> Iterator[Row]:
    """The rows of a JSON file, whichever its form."""
    if isinstance(value, dict) and (pairs := _columns(value)):
        value = pairs
    if isinstance(value, dict) and (inner := [value[key] for key in _WHOLE if isinstance(value.get(key), list | dict)]):
        value = inner[0]
    if isinstance(value, dict):
        return ((f"{path}: key {shown(index)}", (index, label)) for index, label in value.items())
    if not isinstance(value, list):
        raise InputError("labels are a list, or an object from whole numbers to texts", f"{path}:1")
    places = ((f"{path}, item {number} of the list", row) for number, row in enumerate(value, start=1))
    if any(isinstance(row, list | dict) for row in value):
        return places
    return ((where, (index, row)) for index, (where, row) in enumerate(places))


def _columns(value: dict[str, Any]) -> list[list[Any]]:
    """The pairs of a table by columns, as pandas writes it; none where it is no such table."""
    columns = [next((value[key] for key in keys if key in value), None) for keys in (_INDEX, _LABEL)]
    indices, labels = (dict(enumerate(column)) if isinstance(column, list) else column for column in columns)
    if not isinstance(indices, dict) or not isinstance(labels, dict) or indices.keys() != labels.keys():
        return []
    return [[index, labels[key]] for key, index in indices.items()]


def _labels(path: Path, rows: Iterable[Row]) -> dict[int, str]:
    labels: dict[int, str] = {}
    sae: dict[str, Any] = {}
    for where, row in rows:
        with errors_at(where):
            index, label = _read(row)
        if isinstance(row, dict) and any(sae.setdefault(key, row[key]) != row[key] for key in _SAE if key in row):
            raise InputError("the labels are of more than one model or SAE", where, "Keep those of the recipe's SAE.")
        if label:
            labels.setdefault(index, label)
    if not labels:
        raise InputError("there are no labels", str(path))
    return labels


def _read(row: Any) -> tuple[int, str]:
    if isinstance(row, dict):
        row = [row[next((key for key in names if key in row), names[0])] for names in (_INDEX, _LABEL)]
    if not isinstance(row, list | tuple) or len(row) != 2:
        raise TypeError(f"a label is an object with 'index' and 'description', or a pair of them, not {shown(row)}")
    index, label = row
    if isinstance(index, str) and re.fullmatch(r"[0-9]{1,18}", index.strip()):
        index = int(index)
    if isinstance(index, float) and index.is_integer() and index < 2**53:  # As pandas writes a column that has a gap.
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise TypeError(f"a latent's index is a whole number from 0 on, not {shown(index)}")
    return index, _text(label)


def _text(label: Any) -> str:
    """The first text of a label; empty where nobody has explained the latent."""
    while isinstance(label, list | dict) and label:
        label = label[0] if isinstance(label, list) else label[next((k for k in _LABEL if k in label), _LABEL[0])]
    if label is None or label == []:
        return ""
    if not isinstance(label, str):
        raise TypeError(f"a label is a text, not {shown(label)}")
    return label.strip()
