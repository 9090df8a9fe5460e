"""The shipped prompts and off-topic subjects: enough, distinct, split, and not the paper's."""

import re
from typing import Any

import pytest

from data_gen.prompted import SUBJECTS, read_subjects, training_subjects
from data_gen.sources import Context
from esr_train.errors import InputError
from esr_train.files import read_jsonl
from esr_train.recipe import SplitSection, load_recipe
from eval.cells import Pools, Split, fingerprint, make_pools, read_prompts
from recipes import FOLDER

HOW_TO = FOLDER.parent / "data_gen" / "prompts" / "how-to.jsonl"
SPLITS = SplitSection()
AREAS = {"everyday", "mathematics", "science", "writing", "technology"}
SMALL_WORDS = re.compile(
    r"(a|an|and|are|as|at|be|by|do|does|explain|for|from|good|how|i|in|is|it|make|me|my|of|on|or|properly|should|so"
    r"|that|the|this|to|two|use|way|what|why|with|write|you|your)"
)


def content(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.casefold()) if not SMALL_WORDS.fullmatch(word)}


def test_there_are_enough_prompts_over_many_areas_of_life():
    rows = read_jsonl(HOW_TO, dict)
    prompts = read_prompts(HOW_TO)
    assert len(prompts) >= 240
    assert {row["area"] for row in rows} > AREAS
    assert len({each.topic for each in prompts}) >= 40
    per_topic = [sum(each.topic == topic for each in prompts) for topic in {each.topic for each in prompts}]
    assert min(per_topic) >= 2


def test_no_two_prompts_are_nearly_the_same():
    prompts = [(each.text, content(each.text)) for each in read_prompts(HOW_TO)]
    near = [(a, b) for i, (a, x) in enumerate(prompts) for b, y in prompts[:i] if len(x & y) / len(x | y) > 0.6]
    assert near == []


def test_the_paper_s_prompts_are_not_among_ours(paper):
    theirs = (paper / "prompts.txt").read_text().splitlines()
    theirs = [line.strip() for line in theirs if line.strip()]
    assert len(theirs) == 38
    ours = read_prompts(HOW_TO)
    assert {fingerprint(each.text) for each in ours} & {fingerprint(each) for each in theirs} == set()
    near = [(o.text, t) for o in ours for t in theirs if len(content(o.text) & content(t)) / len(content(t)) > 0.6]
    assert near == []


def test_there_are_enough_subjects_and_none_is_a_topic_of_the_prompts():
    subjects = read_subjects(None)
    assert len(subjects) >= 80
    topics = {fingerprint(each.topic) for each in read_prompts(HOW_TO)}
    assert {fingerprint(each) for each in subjects} & topics == set()


def test_the_splits_are_the_same_every_time_and_share_nothing():
    prompts = read_prompts(HOW_TO)
    pools, again = make_pools(prompts, SPLITS), make_pools(prompts[::-1], SPLITS)
    texts = [{each.text for each in pool} for pool in (pools.train, pools.validation, pools.test)]
    assert all(texts)
    assert texts == [{each.text for each in pool} for pool in (again.train, again.validation, again.test)]
    assert sum(map(len, texts)) == len(set.union(*texts))
    assert {each.text for each in pools.normal} & (texts[1] | texts[2]) == set()
    other = make_pools(prompts, SplitSection(seed=1))
    assert {each.text for each in other.test} != texts[2]


def test_training_subjects_leave_out_what_is_held_out():
    subjects = ["owls", "Sailing", "bread", "chess openings", "kites", "tea"]
    topics: dict[str, Split] = {"bread": "test", "sewing": "train"}

    def context(held_out: list[str]) -> Context:
        given = Pools(topics, (), (), (), ())
        splits = SplitSection(validation=0, test=0.2)
        nothing: Any = None
        return Context(nothing, nothing, nothing, "all", "m", 0, nothing, given, held_out=held_out, splits=splits)

    chosen = training_subjects(subjects, context(["OWLS!"]))
    assert "bread" not in chosen
    assert "owls" not in chosen
    assert set(chosen) < set(subjects)
    assert training_subjects(subjects[::-1], context(["OWLS!"])) == chosen[::-1]
    with pytest.raises(InputError, match="no subject is left"):
        training_subjects(subjects, context(subjects))


def test_subjects_of_one_s_own_come_in_any_kind_of_file(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("subject\nowls\nkites\n")
    assert read_subjects(str(path)) == ["owls", "kites"]
    path.write_text("subject\nowls\nOwls\n")
    with pytest.raises(InputError, match=r"s\.csv:3: the subject 'Owls' comes twice\. It was at .*s\.csv:2"):
        read_subjects(str(path))


def test_the_large_recipes_take_the_shipped_prompts():
    paths = [path for path in FOLDER.glob("*/*.yaml") if "instruct" in path.parent.name or "-it" in path.parent.name]
    assert len(paths) >= 12
    for path in paths:
        section = load_recipe(path).prompts
        assert section is not None
        assert (FOLDER.parent / section.path) == HOW_TO
    assert SUBJECTS.is_file()
