"""Latents are dealt to splits by family: one label, or decoder rows that are alike, never lie on both sides."""

import pytest
import torch

from data_gen.latents import deal_latents, families
from esr_train.sections.world import SplitSection
from esr_train.steering.sae import Direction
from esr_train.transcript import SaeRef
from eval.cells import split_latents, split_topics

SECTION = SplitSection(validation=0.1, test=0.3, seed=0)
TOPICS = split_topics([f"topic{number}" for number in range(20)], SECTION)


def latent(number: int, label: str | None, unit: torch.Tensor) -> Direction:
    return Direction(SaeRef("r", "i"), 1, number, label, unit / unit.norm(), 1.0, 2.0)


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
