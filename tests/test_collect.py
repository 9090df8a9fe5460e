"""Candidates are made until enough are kept: the same rows whatever the chunks and however often it was killed."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from data_gen.collect import Collected, collect
from data_gen.sources import Outcome, candidate_rng, cut_sentences, joined
from esr_train.errors import RunError
from esr_train.transcript import Span, SpanKind, Transcript
from tests.threads import as_ranks


class Maker:
    """Keeps every third candidate; counts what it was asked for, and dies when asked beyond `until`."""

    def __init__(self, until: int = 10**9) -> None:
        self.made: list[int] = []
        self.until = until

    def __call__(self, numbers: Sequence[int]) -> list[Outcome]:
        if max(numbers) >= self.until:
            raise KeyboardInterrupt
        self.made += numbers
        return [self._one(number) for number in numbers]

    def _one(self, number: int) -> Outcome:
        if number % 3:
            return Outcome(None, "odd" if number % 2 else "even")
        text = f"{candidate_rng(0, 'x', number).random()}"
        return Outcome(Transcript(f"x{number}", "p", (Span(SpanKind.ANSWER, text),), "normal"))


def run(path: Path, maker: Maker, chunk: int = 4, wanted: int = 6) -> Collected:
    return collect("x", wanted, maker, path, chunk)


def test_the_first_rows_by_number_are_kept_and_the_others_counted_by_reason(tmp_path):
    found = run(tmp_path / "c.jsonl", Maker())
    assert [row.id for row in found.transcripts] == [f"x{number}" for number in (0, 3, 6, 9, 12, 15)]
    assert found.funnel == {"kept": 6, "odd": 5, "even": 5}


def test_the_chunk_does_not_change_the_rows(tmp_path):
    runs = [run(tmp_path / f"{chunk}.jsonl", Maker(), chunk).transcripts for chunk in (1, 4, 50)]
    assert runs[0] == runs[1] == runs[2]


def test_an_interrupted_run_goes_on_and_ends_alike(tmp_path):
    whole = run(tmp_path / "whole.jsonl", Maker())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.jsonl", Maker(until=10))
    (tmp_path / "cut.jsonl").open("a").write('{"key": "0000008", "tran')
    again = Maker()
    assert run(tmp_path / "cut.jsonl", again) == whole
    assert again.made == list(range(8, 16))


def test_a_chunk_that_a_kill_has_torn_is_made_again_whole_and_no_row_comes_twice(tmp_path):
    whole = run(tmp_path / "whole.jsonl", Maker())
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "torn.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:20])
    again = Maker()
    assert run(tmp_path / "torn.jsonl", again) == whole
    assert again.made == list(range(4, 16))
    assert (tmp_path / "torn.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_run_makes_nothing(tmp_path):
    first = run(tmp_path / "c.jsonl", Maker())
    again = Maker()
    assert run(tmp_path / "c.jsonl", again) == first
    assert again.made == []


def test_too_few_rows_are_an_error_with_the_reasons_counted(tmp_path):
    def refuse(numbers: Sequence[int]) -> list[Outcome]:
        return [Outcome(None, "detour on-topic") for _ in numbers]

    with pytest.raises(RunError, match=r"data\.x: only 0 of the 3 rows wanted .*detour on-topic: 64"):
        collect("x", 3, refuse, tmp_path / "c.jsonl", 4)


def test_where_answers_are_too_long_it_says_what_makes_them_longer(tmp_path):
    def refuse(numbers: Sequence[int]) -> list[Outcome]:
        return [Outcome(None, "answer too long") for _ in numbers]

    with pytest.raises(RunError, match=r"answer too long: 64\)\. Raise sampling\.max_new_tokens"):
        collect("x", 3, refuse, tmp_path / "c.jsonl", 4)


def test_a_candidate_draws_from_its_number_its_source_and_the_seed_alone():
    def drawn(seed: int, source: str, number: int) -> float:
        return candidate_rng(seed, source, number).random()

    assert drawn(0, "steered", 7) == drawn(0, "steered", 7)
    others = {drawn(1, "steered", 7), drawn(0, "normal", 7), drawn(0, "steered", 8), drawn(0, "steered", 7)}
    assert len(others) == 4


def test_a_detour_is_cut_after_whole_sentences():
    text = " Trim the jib. Raise the mast! Then sail. "
    assert cut_sentences(text, 2) == "Trim the jib. Raise the mast!"
    assert cut_sentences(text, 9) == text.strip()
    assert cut_sentences("  ", 1) == ""


def test_white_space_between_spans_belongs_to_the_later_one():
    spans = joined((SpanKind.OFF_TOPIC, "Trim."), (SpanKind.CUE, "Wait."), (SpanKind.ANSWER, "Knead."))
    assert [span.text for span in spans] == ["Trim.", " Wait.", " Knead."]


def together(path: Path, count: int, wanted: int = 6) -> tuple[list[Collected], list[Maker]]:
    makers = [Maker() for _ in range(count)]
    return as_ranks(count, lambda ranks: collect("x", wanted, makers[ranks.rank], path, 4, ranks=ranks)), makers


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_share_the_numbers_and_make_the_same_rows(tmp_path, count):
    alone = run(tmp_path / "alone.jsonl", Maker())
    found, makers = together(tmp_path / "together.jsonl", count)
    assert found == [alone] * count
    made = [number for maker in makers for number in maker.made]
    assert len(made) == len(set(made))
    assert all(maker.made for maker in makers)
    first = (tmp_path / "alone.jsonl").read_bytes()
    assert (tmp_path / "together.jsonl").read_bytes().startswith(first)


def test_what_one_process_began_several_end_alike(tmp_path):
    alone = run(tmp_path / "alone.jsonl", Maker())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.jsonl", Maker(until=6))
    found, makers = together(tmp_path / "cut.jsonl", 2)
    assert found == [alone, alone]
    assert min(makers[0].made) == 4


def test_trimmed_answers_are_counted_apart(tmp_path):
    def make(numbers):
        rows = [Transcript(f"x{n}", f"p{n}", (Span(SpanKind.ANSWER, f"Answer {n}."),), "normal") for n in numbers]
        return [Outcome(row, trimmed=number % 2 == 1) for number, row in zip(numbers, rows, strict=True)]

    for _ in range(2):  # The second time from what the first has written down.
        assert collect("normal", 5, make, tmp_path / "c.jsonl", 2).funnel == {"kept": 3, "kept, answer trimmed": 2}


def test_the_funnel_ends_with_the_last_row_that_was_wanted(tmp_path):
    assert run(tmp_path / "c.jsonl", Maker(), chunk=50).funnel == {"kept": 6, "odd": 5, "even": 5}
