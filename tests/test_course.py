"""The course of an episode: regions in tokens, what stands against what, latents that rise before a restart."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import wilcoxon

from esr_train.steering.engine import Request
from esr_train.steering.token_reading import with_reply
from eval.course import (
    Course,
    aligned,
    contrasts,
    matched,
    read_token_sums,
    region_means,
    signed_rank,
    write_token_sums,
)
from eval.report.course_figures import course_figures, course_table, episodes_page
from recipes.noticing.latent_course import rising_latents, spot_of, token_texts
from tests.test_monitor import Words
from tests.trial_maker import made

RNG = np.random.default_rng(0)


def course(cluster: int, values: list[float], at: int, **regions: tuple[int, int]) -> Course:
    tokens = tuple(f" t{number}" for number in range(len(values)))
    return Course(f"k{cluster}", cluster, np.array(values, float), at, regions, tokens)


THREE = [
    course(1, [0, 0, 4, 4, 1, 0], 4, before=(0, 2), detour=(2, 4), cue=(4, 5), answer=(5, 6)),
    course(2, [6, 2, 0, 0], 2, detour=(0, 2), cue=(2, 3), answer=(3, 4)),
    course(3, [2, 2, 1, 1], 2, detour=(0, 2), cue=(2, 4)),
]


def test_regions_are_means_over_their_tokens_in_the_replies_that_have_them():
    means = region_means(THREE)
    assert {name: (each.value, each.n) for name, each in means.items()} == {
        "before": (0, 1), "detour": (10 / 3, 3), "cue": (2 / 3, 3), "answer": (0, 2),
    }  # fmt: skip


def test_regions_are_compared_within_replies():
    by_name = {(each.first, each.second): each for each in contrasts(THREE)}
    assert ("before", "detour") not in by_name, "one reply alone has both"
    cue = by_name["detour", "cue"]
    assert (cue.difference.value, cue.difference.n, cue.effect) == (pytest.approx(-8 / 3), 3, -1)
    assert by_name["detour", "answer"].difference.n == 2


def test_the_signed_rank_test_is_scipys_and_the_effect_its_share_of_ranks():
    differences = np.array([1.0, -2.0, 3.0, 4.0, 0.0])
    p, effect = signed_rank(differences)
    assert p == wilcoxon([1.0, -2.0, 3.0, 4.0]).pvalue
    assert effect == pytest.approx((1 - 2 + 3 + 4) / 10)
    assert signed_rank(np.zeros(3)) == (None, None)


def test_replies_are_aligned_at_the_restart():
    points = dict(aligned(THREE))
    assert points[0].value == pytest.approx((1 + 0 + 1) / 3)
    assert points[-1].value == pytest.approx((4 + 2 + 2) / 3)
    assert (min(points), points[-2].n) == (-2, 3)


def test_a_restart_is_held_against_another_reply_that_reaches_its_token_each_used_once():
    assert matched([5, 30, 12], [10, 40, 13]) == [(1, 1), (2, 2), (0, 0)]
    assert matched([5, 30, 12], [10, 20]) == [(2, 1), (0, 0)]
    assert matched([9], [9]) == []


def test_regions_are_read_off_the_text():
    text = "Fold the sheet. Knead the dough. Wait, that's not right. Fold it twice."
    trial = made(response=text, attempts=[{"start": 0, "end": len(text), "score": 0}])
    dough = text.index("Knead")
    spot = spot_of(Words(), trial, (dough, dough + 16))
    assert spot.regions == {"before": (0, 3), "detour": (3, 6), "cue": (6, 10), "answer": (10, 13)}
    assert spot.at == 6
    assert spot_of(Words(), trial, None).regions["before"] == (0, 6), "no sentence is off topic"


def test_a_latent_that_rises_before_restarts_is_found_among_many_and_others_by_their_labels():
    others, restarts = (RNG.normal(size=(40, 300)).astype(np.float32) for _ in range(2))
    restarts[:, 7] += 3
    labels = {9: "apologies and corrections", 11: "weight of stones"}
    experiment = SimpleNamespace(resources=SimpleNamespace(read_labels=lambda: labels))
    found = rising_latents(experiment, others, restarts)  # type: ignore[arg-type]
    assert [(each.latent, each.by_label) for each in found] == [(7, False), (9, True)]
    assert found[0].rise - found[0].other == pytest.approx(3, abs=0.7)
    assert rising_latents(experiment, others[:1], restarts) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["Fold the sheet.\n\nTuck it in.", "Fold 🧺🧺 it — naïvely.", "Fold", "  Fold it. "])
def test_a_text_is_divided_at_its_tokens_and_nothing_is_lost(family, text):
    request = Request("a", "How do I fold a sheet?")
    whole, tail = with_reply(family.tokenizer, request, text)
    pieces = token_texts(family.tokenizer, whole.ids[-tail:], text)
    assert "".join(pieces) == text
    assert len(pieces) == tail
    if len(text.split()) > 2:
        assert sum(map(bool, pieces)) > len(text.split())


def test_token_sums_are_read_as_they_were_written(tmp_path):
    assert read_token_sums(tmp_path / "tokens.jsonl") == {}
    write_token_sums(tmp_path / "tokens.jsonl", THREE)
    found = read_token_sums(tmp_path / "tokens.jsonl")
    assert {key: (each.tokens, each.sums) for key, each in found.items()} == {
        each.key: (each.tokens, tuple(each.values)) for each in THREE
    }


def test_figures_and_page_show_the_texts_and_escape_them():
    means = region_means(THREE)
    figures = course_figures(THREE, THREE[:2], means)
    assert [each.name for each in figures] == ["episode", "overlay", "regions"]
    assert all(each.svg.lstrip().startswith("<?xml") and len(each.table) > 3 for each in figures)
    lines = course_table(means, contrasts(THREE), [], (3, 2))
    assert lines[0].startswith("3 replies with a restart, 2 without one")
    hostile = Course("k", 1, np.array([1.0, 0.5]), 1, {}, ("<script>", "b"))
    page = episodes_page("a & b", [hostile])
    assert "<script>" not in page
    assert "a &amp; b" in page
    assert page.count("│") == 1
