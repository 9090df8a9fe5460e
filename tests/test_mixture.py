"""Mixtures: exact to the row, as large as the rows allow, seeded, and the same whatever order files came in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.mixture import mix, sizes
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
    assert sorted(row.id for row in mix(given_rows, None, 0)) == sorted(row.id for row in given_rows)


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
    assert sizes(corrections, normals, share) == wanted


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 0.99))
def test_the_share_is_right_to_the_row_and_no_row_is_invented(corrections, normals, share):
    turned, plain = sizes(corrections, normals, share)
    assert turned == corrections or plain == normals
    assert 0 <= turned <= corrections
    assert 0 <= plain <= normals
    assert abs(turned - share * (turned + plain)) < 1


def test_the_order_is_drawn_from_the_seed_and_not_from_the_files():
    made = rows(20, 20)
    first = [row.id for row in mix(made, 0.5, 1)]
    assert [row.id for row in mix(made[::-1], 0.5, 1)] == first
    assert [row.id for row in mix(made, 0.5, 2)] != first
    assert first != sorted(first)


def test_contrast_rows_count_as_normal():
    steered_answer = Transcript("x", "p", (Span(SpanKind.ANSWER, "c"),), "steered")
    assert len(mix([steered_answer, *rows(3, 0)], 0.5, 0)) == 2


def test_a_share_of_what_is_not_there_is_refused():
    for made, share in ((rows(3, 0), 0.5), (rows(0, 3), 0.5), (rows(0, 3), 1.0), (rows(3, 0), 0.0)):
        with pytest.raises(InputError, match="cannot be mixed"):
            mix(made, share, 0)
