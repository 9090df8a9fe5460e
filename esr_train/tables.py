"""Rows of a user's own file, whatever its kind: text, JSONL, CSV, or anything `datasets` can load."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from esr_train.errors import InputError
from esr_train.files import json_lines, read_lines, read_text

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
    if kind in (".txt", ".jsonl"):
        read = read_lines if kind == ".txt" else json_lines
        rows: Iterator[tuple[str, Any]] = ((f"{path}:{number}", values) for number, values in read(path))
    else:
        rows = read_csv(path) if kind == ".csv" else _dataset(str(path), split)
    for where, values in rows:
        row = {column: values} if isinstance(values, str) else values
        if not isinstance(row, Mapping):
            raise InputError(f"a row is a JSON object or a string, not {type(row).__name__}", where)
        if row.get(column) is None:
            has = ", ".join(map(repr, row)) or "none"
            raise InputError(f"the row has no {column!r} (it has {has})", where, "Name the column, or add it.")
        yield where, row


def read_csv(path: Path | str) -> Iterator[Row]:
    """The rows of a CSV file with a header, in order.

    Raises:
        InputError: naming `file:line`, for broken CSV, a column that comes twice, or a row of another length.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        twice = next((name for name in columns if list(columns).count(name) > 1), None)
        if twice is not None:
            raise InputError(f"the column {twice!r} comes twice", f"{path}:1", "Rename or remove one.")
        for values in reader:
            if None in values or None in values.values():
                more = "more" if None in values else "fewer"
                what = f"the row has {more} fields than the header"
                raise InputError(what, f"{path}:{reader.line_num}", "Put text with commas in quotes.")
            yield f"{path}:{reader.line_num}", values
    except csv.Error as error:
        raise InputError(f"not valid CSV ({error})", f"{path}:{reader.reader.line_num}") from error


def _dataset(path: str, split: str) -> Iterator[Row]:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    folder = Path(path)
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded: Any = load_from_disk(path)
            loaded = loaded[split] if isinstance(loaded, DatasetDict) else loaded
        else:
            loaded = load_dataset(path, split=split)
    except Exception as error:  # `datasets` raises whatever its many loaders raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"neither a {', '.join(KINDS)} file nor a data set that can be loaded ({type(error).__name__}: {reason})",
            path,
            f"Check the path and the split ({split}).",
        ) from error
    assert isinstance(loaded, Dataset)
    for number, values in enumerate(loaded):
        yield f"{path}:row {number}", values
