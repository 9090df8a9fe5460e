"""Latents are dealt to splits by family: one label, or decoder rows that are alike, never lie on both sides."""

import pytest
import torch

from data_gen.latent_choice import (
    RELEVANT,
    STRADDLES,
    SURPLUS,
    TWIN,
    alike,
    choose,
    deal_latents,
    families,
    limited,
    without_twins,
)
from esr_train.errors import InputError
from esr_train.recipe import LatentsSection, SplitSection
from esr_train.steering.directions import Direction
from esr_train.transcript import SaeRef
from eval.cells import split_latents, split_topics

SECTION = SplitSection(validation=0.1, test=0.3, seed=0)
TOPICS = split_topics([f"topic{number}" for number in range(20)], SECTION)


def latent(number: int, label: str | None, unit: torch.Tensor) -> Direction:
    return Direction(1, label, unit / unit.norm(), 1.0, 2.0, SaeRef("r", "i"), number)


def axis(place: int) -> torch.Tensor:
    return torch.eye(64)[place]


def apart(labels: list[str | None]) -> list[Direction]:
    return [latent(number, label, axis(number)) for number, label in enumerate(labels)]


def side(dealt: dict[str, list[Direction]]) -> dict[int, str]:
    return {each.latent: split for split, group in dealt.items() for each in group}


@pytest.mark.parametrize("labels", [list(TOPICS) * 2, [f"free{n // 2}" for n in range(40)], [None] * 12])
def test_latents_without_twins_are_dealt_by_label(labels):
    given = apart(labels)
    assert deal_latents(given, TOPICS, SECTION) == split_latents(given, TOPICS, SECTION)


def test_twins_with_free_labels_are_on_one_side_for_every_seed():
    given = apart([f"free{number}" for number in range(30)])
    given += [latent(30 + number, f"other{number}", axis(number) + 0.3 * axis(63)) for number in range(30)]
    for seed in range(5):
        section = SECTION.model_copy(update={"seed": seed})
        dealt = side(deal_latents(given, TOPICS, section))
        assert len(dealt) == 60
        assert set(dealt.values()) == {"train", "validation", "test"}
        assert all(dealt[number] == dealt[30 + number] for number in range(30))


def test_a_chain_of_twins_is_one_family():
    chain = [
        latent(n, f"free{n}", torch.tensor([1.0, 0.0]) * c + torch.tensor([0.0, 1.0]) * s)
        for n, (c, s) in enumerate([(1.0, 0.0), (0.8, 0.6), (0.28, 0.96)])
    ]
    assert families(chain, 0.75) == [[0, 1, 2]]
    assert families(chain, 0.9) == [[0], [1], [2]]


def test_a_twin_of_a_topic_goes_with_it_and_one_of_a_held_out_topic_is_left_out():
    train = next(topic for topic, split in TOPICS.items() if split == "train")
    test = next(topic for topic, split in TOPICS.items() if split == "test")
    near = axis(0) + 0.3 * axis(1)
    given = [latent(0, "free", axis(0)), latent(1, train, near), latent(2, test, near + 0.1 * axis(2))]
    assert side(deal_latents(given, TOPICS, SECTION)) == {0: "train", 1: "train"}


def test_no_latents_are_no_families():
    assert deal_latents([], TOPICS, SECTION) == {"train": [], "validation": [], "test": []}


def test_of_twins_the_first_is_kept_and_one_that_is_alike_to_a_dropped_one_alone(monkeypatch):
    turned = [(1.0, 0.0), (0.8, 0.6), (0.28, 0.96)]
    chain = [latent(n, f"free{n}", torch.tensor(each)) for n, each in enumerate(turned)]
    assert [each.latent for each in without_twins(chain, 0.75)] == [0, 2]
    assert [each.latent for each in without_twins(chain[::-1], 0.75)] == [2, 0]
    assert without_twins(chain, 0.9) == chain
    monkeypatch.setattr("data_gen.latent_choice.COMPARED_AT_ONCE", 2)
    assert sorted(alike(chain, 0.75)) == [(1, 0), (2, 1)]


def test_a_limit_takes_from_every_split_its_share_and_a_larger_one_only_adds():
    dealt = deal_latents(apart([f"free{number}" for number in range(60)]), TOPICS, SECTION)
    sizes = {split: len(group) for split, group in dealt.items()}
    assert sizes == {"train": 36, "validation": 6, "test": 18}
    before: set[int] = set()
    for limit in range(1, 60):
        drawn = limited(dealt, limit, 0)
        now = set(side(drawn))
        assert len(now) == limit
        assert before < now
        if limit >= 3:
            assert all(abs(len(group) - limit * sizes[split] / 60) <= 1 for split, group in drawn.items())
            assert all(drawn.values())
        assert all(side(drawn)[each] == side(dealt)[each] for each in now)
        before = now
    assert limited(dealt, None, 0) == limited(dealt, 60, 0) == dealt
    assert side(limited(dealt, 20, 0)) != side(limited(dealt, 20, 1))


def choice(given: list[Direction], active: set[int] = frozenset(), **section: object):
    return choose(given, active, TOPICS, SECTION, LatentsSection.model_validate(section))


def test_every_latent_is_chosen_or_left_out_for_a_counted_reason():
    given = apart([f"free{number}" for number in range(30)])
    given += [latent(30 + number, f"other{number}", axis(number) + 0.3 * axis(63)) for number in range(10)]
    found = choice(given, {0, 1, 35}, limit=12)
    assert found.left_out == {RELEVANT: 3, TWIN: 7, SURPLUS: 18}
    chosen = side(found.splits)
    assert len(chosen) == 12
    assert not set(chosen) & {0, 1, 35}
    assert {30, 31} <= set(side(choice(given, {0, 1, 35}).splits))
    kept = choice(given, {0, 1, 35}, relevant="keep", twins="keep", limit=None)
    assert kept.left_out == {}
    assert len(side(kept.splits)) == 40


def test_a_label_on_the_wrong_side_of_its_twin_is_counted():
    train = next(topic for topic, split in TOPICS.items() if split == "train")
    test = next(topic for topic, split in TOPICS.items() if split == "test")
    given = [latent(0, train, axis(0)), latent(1, test, axis(0) + 0.3 * axis(1))]
    assert choice(given, twins="keep").left_out == {STRADDLES: 1}


def test_when_no_latent_is_left_the_reasons_are_named():
    with pytest.raises(
        InputError, match=r"none of 2 labelled latents may steer \(active on a prompt: 2\).*relevant=keep"
    ):
        choice(apart(["a", "b"]), {0, 1})
