"""What an SAE's latents stand for: label files, as Neuronpedia, the paper and other people write them."""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from esr_train.errors import InputError
from esr_train.files import read_json, read_text
from esr_train.models import local_path

BATCHES = (".jsonl", ".jsonl.gz")
Row = tuple[str, Any]
"""Where a row stands (`file:line`), and its values."""


def read_labels(path: Path | str) -> dict[int, str]:
    """Labels of latents, by index, in the order of the file; a latent's first label is the one that counts.

    Forms: a folder of Neuronpedia's batches, or one of them as jsonl or jsonl.gz
    (`{"index": "12", "description": "..."}`); csv with columns `index_in_sae` and `label`; json `{"12": "label"}` or
    a list.

    Raises:
        InputError: naming file and line.
    """
    path = local_path(str(path)) or Path(path)
    if path.is_dir() or path.name.endswith(BATCHES):
        rows = (row for file in label_files(path) for row in _jsonl(file) if not _nameless(row))
        return _labels(path, rows, "index", "description")
    if path.suffix == ".csv":
        return _labels(path, _csv(path), "index_in_sae", "label")
    if path.suffix == ".json":
        return _json_labels(path)
    raise InputError(
        "labels are read from .json, .jsonl, .jsonl.gz or .csv, or from a folder of .jsonl(.gz) batches",
        str(path),
        "Rename or convert it.",
    )


def label_files(path: Path) -> list[Path]:
    """The files of which `read_labels` reads a path: itself, or a folder's batches in the order of their numbers.

    Raises:
        InputError: for a folder without batches.
    """
    if not path.is_dir():
        return [path]
    found = [file for file in path.iterdir() if file.name.endswith(BATCHES) and file.is_file()]
    if not found:
        raise InputError("there is no .jsonl or .jsonl.gz file in the folder", str(path), "Name the folder of batches.")
    return sorted(found, key=lambda file: [int(part) if part.isdigit() else part for part in _parts(file.name)])


def _parts(name: str) -> list[str]:
    # Text and numbers take turns, beginning with text, so that batch-2 comes before batch-10.
    return re.split(r"(\d+)", name)


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else read_text(path)
    except FileNotFoundError:
        raise InputError("the file does not exist", str(path), "Check the path.") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", str(path)) from None
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"not valid JSON ({error.msg})", f"{path}:{number}") from None


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    for row in reader:
        yield f"{path}:{reader.line_num}", row


def _labels(path: Path, rows: Iterable[Row], index: str, label: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for where, row in rows:
        try:
            # Neuronpedia holds several explanations of a latent; the first is the one its page shows.
            found.setdefault(int(row[index]), _text(row[label]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"a label needs {index!r} (a whole number) and {label!r} (a text)", where) from None
    if not found:
        raise InputError("there are no labels", str(path))
    return found


def _nameless(row: Row) -> bool:
    """Whether an export says by null that nobody has explained the latent."""
    return isinstance(row[1], dict) and row[1].get("description", "") is None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value.strip()


def _json_labels(path: Path) -> dict[int, str]:
    value = read_json(path)
    try:
        items = enumerate(value) if isinstance(value, list) else value.items()
        return {int(index): str(label) for index, label in items if label is not None}
    except (AttributeError, ValueError):
        raise InputError(
            "labels are a list or an object from whole numbers to texts",
            f"{path}:1",
            'Such as {"12": "baking"}.',
        ) from None
