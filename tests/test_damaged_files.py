"""Of a damaged file every reader gives the right rows or one paragraph: no traceback, and no change without a word.

What is right is read by the independent readers of `benchmarks/hostile.py`, which damages more files than this.
"""

from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.damage import lengthened
from benchmarks.hostile import Format, damaged_file, formats, outcome

FORMATS = formats()
LONG = ("recipe.yaml", "transcripts.jsonl", "segments.jsonl", "messages.jsonl", "labels.csv", "prompts.txt")
"""Formats of which a line of 10 MB is tried here, too."""


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_sound_file_is_read(tmp_path: Path, format: Format) -> None:
    assert outcome(format, format.sound, tmp_path) == "right rows"


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_damaged_file_gives_the_right_rows_or_one_paragraph(format: Format) -> None:
    results = set()

    @settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**64))
    def try_one(seed: int) -> None:
        with TemporaryDirectory() as folder:
            result = outcome(format, damaged_file(format, Random(seed)), Path(folder))
        results.add(result)
        assert result in ("right rows", "refused")

    try_one()
    assert results == {"right rows", "refused"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", LONG)
def test_so_does_one_with_a_line_of_ten_megabytes(tmp_path: Path, name: str, seed: int) -> None:
    data = lengthened(FORMATS[name].sound, Random(seed))
    assert len(data) > 9_000_000
    assert outcome(FORMATS[name], data, tmp_path) in ("right rows", "refused")
