"""Mixtures: exact to the row, as large as the rows allow, seeded, and the same whatever order files came in."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.mixture import each_once, mix, sizes
from esr_train.errors import InputError
from esr_train.transcript import Span, SpanKind, Transcript


def rows(corrections: int, normals: int) -> list[Transcript]:
    turned = (Span(SpanKind.OFF_TOPIC, "a"), Span(SpanKind.CUE, " b"), Span(SpanKind.ANSWER, " c"))
    plain = (Span(SpanKind.ANSWER, "c"),)
    return [
        *(Transcript(f"c{i}", "p", turned, "steered") for i in range(corrections)),
        *(Transcript(f"n{i}", "p", plain, "normal") for i in range(normals)),
    ]


def test_without_a_share_every_row_is_kept():
    given_rows = rows(5, 3)
    assert sorted(row.id for row in mix(given_rows, None, 0).rows) == sorted(row.id for row in given_rows)


@pytest.mark.parametrize(
    ("corrections", "normals", "share", "wanted"),
    [
        (459, 459, 0.5, (459, 459)),
        (459, 459, 0.1, (51, 459)),
        (459, 459, 0.9, (459, 51)),
        (10, 100, 0.5, (10, 10)),
        (10, 100, 0.0, (0, 100)),
        (10, 100, 1.0, (10, 0)),
    ],
)
def test_one_kind_is_kept_whole_and_the_other_thinned_out(corrections, normals, share, wanted):
    assert sizes([1] * corrections, [1] * normals, share) == wanted


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 0.99))
def test_the_share_is_right_to_the_row_and_no_row_is_invented(corrections, normals, share):
    turned, plain = sizes([1] * corrections, [1] * normals, share)
    assert turned == corrections or plain == normals
    assert 0 <= turned <= corrections
    assert 0 <= plain <= normals
    assert abs(turned - share * (turned + plain)) < 1


@given(st.lists(st.integers(1, 50), min_size=1), st.lists(st.integers(1, 50), min_size=1), st.floats(0.01, 0.99))
def test_a_share_of_what_rows_weigh_is_right_to_half_a_row(corrections, normals, share):
    turned, plain = sizes(corrections, normals, share)
    assert turned == len(corrections) or plain == len(normals)
    one, other = sum(corrections[:turned]), sum(normals[:plain])
    whole = sum(normals) * share >= sum(corrections) * (1 - share)
    ideal = one * (1 - share) / share if whole else other * share / (1 - share)
    cut, place = (normals, plain) if whole else (corrections, turned)
    beyond = ideal - sum(cut[:place])
    assert beyond <= (cut[place] / 2 if place < len(cut) else 1e-6 * ideal)
    assert -beyond <= (cut[place - 1] / 2 if place else 0)


def test_rows_can_count_by_what_is_trained_of_them():
    made = rows(10, 10)
    mixed = mix(made, 0.5, 0, lambda row: 3 if row.corrects else 1).rows
    assert Counter(row.corrects for row in mixed) == {True: 3, False: 10}


def test_a_given_size_rounds_down_as_the_paper_does():
    assert [len(mix(rows(90, 90), share, 0, size=100).rows) for share in (0.29, 0.5, 0.9)] == [100, 100, 100]
    made = mix(rows(10, 10), 0.25, 0, size=10)
    assert Counter(row.corrects for row in made.rows) == {True: 2, False: 7}


def test_too_few_self_correction_rows_are_refused_or_repeat_evenly():
    with pytest.raises(InputError, match=r"--rows: 90% of 10 rows are 9 self-correction rows, and there are 4 \(5 too"):
        mix(rows(4, 4), 0.9, 0, size=10)
    made = mix(rows(4, 4), 0.9, 0, size=10, repeat=True)
    assert (made.repeated, made.missing) == (5, 0)
    times = Counter(row.id.split("#")[0] for row in made.rows if row.corrects)
    assert sorted(times.values()) == [2, 2, 2, 3]
    assert len({row.id for row in made.rows}) == 10
    with pytest.raises(InputError, match=r"there are 0 \(9 too few\)\. Name files with more"):
        mix(rows(0, 4), 0.9, 0, size=10, repeat=True)


def test_normal_rows_never_repeat_and_what_is_missing_is_said():
    made = mix(rows(4, 4), 0.1, 0, size=10, repeat=True)
    assert (len(made.rows), made.repeated, made.missing) == (5, 0, 5)


def test_a_row_that_two_files_hold_is_taken_once_and_a_file_s_own_double_stays():
    first = rows(2, 2)
    again = [replace(row, id=f"again-{row.id}-{number}") for row in first[2:] for number in range(2)]
    # Both normal rows of `first` read alike, so it holds that row twice; `again` holds it four times.
    assert [row.id for row in each_once([first, again])] == ["c0", "c1", "n0", "n1", "again-n1-0", "again-n1-1"]


def test_one_id_for_two_rows_is_refused():
    row = rows(0, 1)[0]
    with pytest.raises(InputError, match="the id 'n0' stands for two rows"):
        each_once([[row], [replace(row, prompt="another")]])


def test_the_order_is_drawn_from_the_seed_and_not_from_the_files():
    made = rows(20, 20)
    first = [row.id for row in mix(made, 0.5, 1).rows]
    assert [row.id for row in mix(made[::-1], 0.5, 1).rows] == first
    assert [row.id for row in mix(made, 0.5, 2).rows] != first
    assert first != sorted(first)


def test_rows_without_a_cue_count_as_normal():
    steered_answer = Transcript("x", "p", (Span(SpanKind.ANSWER, "c"),), "steered")
    assert len(mix([steered_answer, *rows(3, 0)], 0.5, 0).rows) == 2


def test_a_share_of_what_is_not_there_is_refused():
    for made, share in ((rows(3, 0), 0.5), (rows(0, 3), 0.5), (rows(0, 3), 1.0), (rows(3, 0), 0.0)):
        with pytest.raises(InputError, match="cannot be mixed"):
            mix(made, share, 0)
