"""Rows of a user's own file, whatever its kind: text, JSONL, CSV, or anything `datasets` can load."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from esr_train.errors import InputError
from esr_train.files import read_jsonl, read_text

KINDS = (".txt", ".jsonl", ".csv")
Row = tuple[str, Mapping[str, Any]]
"""Where a row stands (`file:line`, or `name:row 7` of a data set), and its values by column."""


def read_rows(path: Path | str, column: str, split: str = "train") -> Iterator[Row]:
    """The rows of a file, in order.

    Args:
        path: a `.txt` file (one value a line), a `.jsonl` file (one object, or one string, a line), a `.csv` file
            (with a header), or else a folder or hub name that `datasets` loads.
        column: the column that every row must have; a text file has this one alone.
        split: of a data set, as `datasets` takes it (`train[:500]`).

    Raises:
        InputError: naming `file:line`, for a malformed row or one without the column; naming the path if it
            cannot be loaded.
    """
    kind = Path(path).suffix.lower()
    if kind == ".txt":
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if line.strip():
                yield f"{path}:{number}", {column: line.strip()}
        return
    read = {".jsonl": _jsonl, ".csv": _csv}.get(kind)
    for where, values in read(path) if read else _dataset(str(path), split):
        row = {column: values} if isinstance(values, str) else values
        if not isinstance(row, Mapping):
            raise InputError(f"a row is a JSON object or a string, not {type(row).__name__}", where)
        if row.get(column) is None:
            has = ", ".join(map(repr, row)) or "none"
            raise InputError(f"the row has no {column!r} (it has {has})", where, "Name the column, or add it.")
        yield where, row


def _jsonl(path: Path | str) -> Iterator[tuple[str, Any]]:
    lines = iter([n for n, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()])
    for values in read_jsonl(path, lambda value: value):
        yield f"{path}:{next(lines)}", values


def _csv(path: Path | str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for values in reader:
            where = f"{path}:{reader.line_num}"
            if None in values:
                raise InputError("the row has more fields than the header", where, "Put text with commas in quotes.")
            yield where, values
    except csv.Error as error:
        raise InputError(f"not valid CSV ({error})", f"{path}:{reader.line_num}") from error


def _dataset(path: str, split: str) -> Iterator[Row]:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    folder = Path(path)
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            found: Any = load_from_disk(path)
            found = found[split] if isinstance(found, DatasetDict) else found
        else:
            found = load_dataset(path, split=split)
    except Exception as error:  # `datasets` raises whatever its many loaders raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"neither a {', '.join(KINDS)} file nor a data set that can be loaded ({type(error).__name__}: {reason})",
            path,
            f"Check the path and the split ({split}).",
        ) from error
    assert isinstance(found, Dataset)
    for number, values in enumerate(found):
        yield f"{path}:row {number}", values
