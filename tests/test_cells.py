from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from esr_train.errors import InputError
from esr_train.recipe import SplitSection
from eval.cells import (
    Prompt,
    Side,
    check_disjoint,
    fingerprint,
    make_cells,
    make_pools,
    read_prompts,
    split_latents,
    split_topics,
    unsteered,
)

TOPICS = [f"topic{number}" for number in range(20)]
PROMPTS = [Prompt(f"How do I do {topic}, way {way}?", topic) for topic in TOPICS for way in range(5)]
SECTION = SplitSection(validation=0.1, test=0.3, seed=4)


@dataclass(frozen=True)
class Latent:
    latent: int
    label: str | None


LATENTS = [Latent(100 + number, topic) for number, topic in enumerate(TOPICS)]


def test_topics_are_dealt_in_exact_proportions():
    assert Counter(split_topics(TOPICS, SECTION).values()) == {"train": 12, "validation": 2, "test": 6}


def test_topics_are_dealt_by_the_seed_and_not_by_their_order():
    assert split_topics(TOPICS[::-1], SECTION) == split_topics(TOPICS, SECTION)
    assert split_topics(TOPICS, SECTION.model_copy(update={"seed": 5})) != split_topics(TOPICS, SECTION)


def test_a_split_with_a_share_gets_a_topic_and_training_must_keep_one():
    assert Counter(split_topics(TOPICS[:4], SECTION).values()) == {"train": 2, "validation": 1, "test": 1}
    with pytest.raises(InputError, match="none is left for training"):
        split_topics(TOPICS[:2], SECTION)


def test_evaluation_prompts_are_of_held_out_topics_and_in_no_other_pool():
    pools = make_pools(PROMPTS, SECTION)
    for split in ("train", "validation", "test"):
        pool = getattr(pools, split)
        assert {pools.topics[prompt.topic] for prompt in pool} == {split}
    assert len(pools.test) == 6 * 3
    assert len(pools.validation) == 2 * 3
    assert not {*pools.test, *pools.validation} & {*pools.normal, *pools.train}


def test_normal_prompts_cover_all_topics():
    assert {prompt.topic for prompt in make_pools(PROMPTS, SECTION).normal} == set(TOPICS)


def test_every_prompt_is_in_some_pool():
    pools = make_pools(PROMPTS, SECTION)
    assert {*pools.train, *pools.validation, *pools.test, *pools.normal} == set(PROMPTS)


def test_latents_go_where_their_topic_is():
    topics = split_topics(TOPICS, SECTION)
    dealt = split_latents(LATENTS, topics, SECTION)
    assert sum(map(len, dealt.values())) == len(LATENTS)
    assert all(topics[latent.label] == split for split, group in dealt.items() for latent in group)


def test_latents_with_free_labels_are_dealt_label_by_label():
    free = [Latent(number, f"label{number // 2}") for number in range(40)] + [Latent(99, None)]
    dealt = split_latents(free, split_topics(TOPICS, SECTION), SECTION)
    groups = [{latent.label for latent in group} for group in dealt.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 21
    assert all(groups)


def test_cells_are_spread_evenly_over_latents_and_prompts():
    pools = make_pools(PROMPTS, SECTION)
    latents = split_latents(LATENTS, pools.topics, SECTION)["test"]
    cells = make_cells(pools.test, latents, 90, seed=1)
    assert set(Counter(cell.latent for cell in cells).values()) == {15}
    assert set(Counter(cell.prompt for cell in cells).values()) == {5}
    assert Counter((cell.prompt, cell.latent) for cell in cells).most_common(1)[0][1] == 1


def test_a_latent_never_steers_a_prompt_of_its_own_topic():
    cells = make_cells(PROMPTS, LATENTS, 300, seed=1)
    assert len(cells) == 300
    assert all(cell.topic != cell.label for cell in cells)


def test_cells_depend_on_the_seed_alone():
    assert make_cells(PROMPTS, LATENTS, 50, seed=1) == make_cells(PROMPTS, LATENTS, 50, seed=1)
    assert make_cells(PROMPTS, LATENTS, 50, seed=1) != make_cells(PROMPTS, LATENTS, 50, seed=2)


def test_keys_tell_cells_apart_and_are_stable():
    cells = make_cells(PROMPTS[:3], LATENTS[10:12], 40, seed=1)
    assert len({cell.key for cell in cells}) == len({cell.seed for cell in cells}) == 40
    cell = cells[0]
    others = [
        replace(cell, prompt="x"),
        replace(cell, latent=1),
        replace(cell, multiple=2.0),
        replace(cell, seed=1),
    ]
    assert len({each.key for each in (cell, *others)}) == 5
    assert replace(cell).key == cell.key


def test_unsteered_cells_keep_prompts_and_seeds():
    cells = make_cells(PROMPTS, LATENTS, 10, seed=1)
    bare = unsteered(cells)
    assert [(cell.prompt, cell.seed) for cell in bare] == [(cell.prompt, cell.seed) for cell in cells]
    assert all(cell.latent is None and cell.label is None for cell in bare)
    assert not {cell.key for cell in bare} & {cell.key for cell in cells}


def test_nothing_to_evaluate_on_is_refused():
    with pytest.raises(InputError, match="no prompt"):
        make_cells([], LATENTS, 1, seed=0)
    with pytest.raises(InputError, match="no latent"):
        make_cells(PROMPTS, [], 1, seed=0)
    with pytest.raises(InputError, match=r"latent 103 \(topic3\) has no evaluation prompt of another topic"):
        make_cells(PROMPTS[15:20], LATENTS[3:4], 1, seed=0)


SIDE = Side(frozenset({"How do I bake?"}), frozenset({7}), frozenset({"Sailing"}))


def test_sides_that_share_nothing_pass():
    check_disjoint(SIDE, Side(frozenset({"How do I sail?"}), frozenset({8}), frozenset({"baking"})))


@pytest.mark.parametrize(
    ("evaluation", "named"),
    [
        (Side(prompts=frozenset({"  how do I -- BAKE"})), "1 prompt .*BAKE"),
        (Side(latents=frozenset({7, 8})), r"1 latent \(7\)"),
        (Side(subjects=frozenset({"sailing "})), "1 off-topic subject"),
    ],
)
def test_an_overlap_is_refused_by_name(evaluation: Side, named: str):
    with pytest.raises(InputError, match=named):
        check_disjoint(SIDE, evaluation)


def test_fingerprints_look_past_case_space_and_punctuation_only():
    same = ["How do I bake?", "how do i\n bake", "HOW do I 'bake'!"]
    assert all(fingerprint(first) == fingerprint(second) for first, second in pairwise(same))
    assert fingerprint("How do I bake?") != fingerprint("How do I brake?")
    assert fingerprint("?") != fingerprint("!")


def test_prompts_are_read(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "How?", "topic": "a"}\n\n{"prompt": "Why?", "topic": "b"}\n')
    assert read_prompts(path) == [Prompt("How?", "a"), Prompt("Why?", "b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "How?", "topic": 3}\n', r"jsonl:1: the topic 3 is no text"),
        ('{"prompt": " ", "topic": "a"}\n', r"jsonl:1: a prompt must be a text"),
        ('{"topic": "a"}\n', r"jsonl:1: the row has no 'prompt' \(it has 'topic'\)"),
        ("[]\n", r"jsonl:1: a row is a JSON object"),
        ("", "no prompt in the file"),
        ('{"prompt": "How?", "topic": "a"}\n{"prompt": "how", "topic": "a"}\n', r"jsonl:2: .* comes twice\. .*jsonl:1"),
    ],
)
def test_a_bad_prompt_file_is_refused_by_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(path)
