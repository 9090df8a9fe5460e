"""Which latents may steer: none that is active on a prompt, none that is alike to an earlier one, and a limit."""

import pytest
import torch

from data_gen.latents.latent_choice import ACTIVE, SURPLUS, TWIN, choose, limited, without_twins
from esr_train.errors import InputError
from esr_train.recipe import SplitSection
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


def test_of_twins_the_first_is_kept_and_one_that_is_alike_to_a_dropped_one_alone(monkeypatch):
    turned = [(1.0, 0.0), (0.8, 0.6), (0.28, 0.96)]
    chain = [latent(n, f"free{n}", torch.tensor(each)) for n, each in enumerate(turned)]
    assert [each.latent for each in without_twins(chain, 0.75)] == [0, 2]
    assert [each.latent for each in without_twins(chain[::-1], 0.75)] == [2, 0]
    assert without_twins(chain, 0.9) == chain
    monkeypatch.setattr("data_gen.latents.latent_choice.COMPARED_AT_ONCE", 2)
    assert [each.latent for each in without_twins(chain, 0.75)] == [0, 2]
    assert [each.latent for each in without_twins([*chain, *chain], 0.75)] == [0, 2]
    assert without_twins([]) == []


def test_a_limit_takes_from_every_split_its_share_and_a_larger_one_only_adds():
    dealt = split_latents(apart([f"free{number}" for number in range(60)]), TOPICS, SECTION)
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


def choice(given: list[Direction], active: set[int] = frozenset(), limit: int | None = None):
    return choose(given, active, TOPICS, SECTION, limit)


def test_every_latent_is_chosen_or_left_out_for_a_counted_reason():
    given = apart([f"free{number}" for number in range(30)])
    given += [latent(30 + number, f"other{number}", axis(number) + 0.3 * axis(63)) for number in range(10)]
    found = choice(given, {0, 1, 35}, limit=12)
    assert found.left_out == {ACTIVE: 3, TWIN: 7, SURPLUS: 18}
    chosen = side(found.splits)
    assert len(chosen) == 12
    assert not set(chosen) & {0, 1, 35}
    assert {30, 31} <= set(side(choice(given, {0, 1, 35}).splits))
    assert choice(given[:30]).left_out == {}


def test_when_no_latent_is_left_the_reasons_are_named():
    with pytest.raises(
        InputError, match=r"none of 2 labelled latents may steer \(active on a prompt: 2\)\. Label more"
    ):
        choice(apart(["a", "b"]), {0, 1})
