"""Cues turn back in several registers, evenly drawn; all but the silent ones are found as restarts."""

from collections import Counter
from random import Random

import pytest

from data_gen.description import cue_openings, entropy
from data_gen.sources import LABEL, Cues, read_cues, stem
from esr_train.errors import InputError
from esr_train.restarts import attempts, find_cues, split_cue
from esr_train.transcript import Span, SpanKind, Transcript

SILENT = "silent"
"""The register of cues that say nothing of a mistake: they lead into the answer."""
REGISTERS = {"plain", "apologetic", "brief", "explicit", SILENT}
SHIPPED = read_cues()
LABELS = ["owls", "the Silk Road", "references to ships, sailing and the sea"]
DETOURS = ["The mast holds the sail. Trim the jib.", "The mast holds the sail and then the"]
ANSWER = " Start by folding the corners into each other. Then smooth it."


def shipped(silent: bool) -> list[str]:
    found = {name: cues for name, cues in SHIPPED.registers.items() if (name == SILENT) == silent}
    return [cue for cues in found.values() for cue in cues]


def placed(cue: str, detour: str) -> tuple[str, str]:
    """The cue with its gap, as a row has it behind this detour, and the whole reply."""
    gap = " " if detour.endswith(".") else "\n\n"
    return gap + cue, detour + gap + cue + ANSWER


def test_there_are_forty_phrasings_over_five_registers():
    assert set(SHIPPED.registers) == REGISTERS
    assert min(map(len, SHIPPED.registers.values())) >= 6
    assert len(shipped(False)) >= 40
    assert all(LABEL in cue for cue in SHIPPED.registers["explicit"])
    assert not any(LABEL in cue for name in REGISTERS - {"explicit"} for cue in SHIPPED.registers[name])


@pytest.mark.parametrize("cue", shipped(False))
def test_every_cue_that_is_not_silent_is_one_restart_by_both_patterns(cue):
    for label in LABELS:
        for detour in DETOURS:
            behind, reply = placed(cue.replace(LABEL, label), detour)
            start = len(detour) + len(behind) - len(behind.lstrip())
            assert find_cues(reply) == [(start, len(detour) + len(behind))]
            assert len(attempts(reply)) == 2
            assert split_cue(behind + ANSWER) == len(behind)


@pytest.mark.parametrize("cue", shipped(True))
def test_a_silent_return_is_no_restart(cue):
    for detour in DETOURS:
        behind, reply = placed(cue, detour)
        assert len(attempts(reply)) == 1
        assert split_cue(behind + ANSWER) is None


def test_registers_are_drawn_evenly_whatever_their_size():
    cues = Cues({"a": ("a1",), "b": tuple(f"b{n}" for n in range(20)), "c": ("c1", "c2")})
    drawn = Counter(cues.draw(Random(seed), None)[0] for seed in range(3000))
    assert all(abs(count - 1000) < 130 for count in drawn.values())
    assert len(drawn) == 3


def test_the_label_stands_where_the_cue_names_it_and_a_label_of_nobody_s_is_not_named():
    cues = Cues({"plain": ("Wait.",), "explicit": ("Enough about {label}.",)})
    assert {cues.draw(Random(seed), "owls") for seed in range(30)} == {"Wait.", "Enough about owls."}
    assert {cues.draw(Random(seed), None) for seed in range(30)} == {"Wait."}
    with pytest.raises(InputError, match="every cue names the topic"):
        Cues({"explicit": ("Enough about {label}.",)}).draw(Random(0), None)


def test_the_shipped_cues_are_diverse_when_drawn():
    rows = [row(SHIPPED.draw(Random(seed), "owls")) for seed in range(2000)]
    openings = cue_openings(rows)
    assert entropy(openings) >= 4
    assert len(openings) >= 40


def row(cue: str) -> Transcript:
    spans = (Span(SpanKind.OFF_TOPIC, "Trim."), Span(SpanKind.CUE, f" {cue}"), Span(SpanKind.ANSWER, " Knead."))
    return Transcript(cue, "p", spans, "steered")


def test_a_stem_is_the_first_word_or_two():
    assert {stem(Random(seed), "Wait, that's not right.") for seed in range(20)} == {"Wait,", "Wait, that's"}
    assert stem(Random(0), "Oops.") == "Oops."


def test_a_file_without_headings_is_one_register(tmp_path):
    path = tmp_path / "cues.txt"
    path.write_text("Wait.\n\nSorry.\n")
    assert list(read_cues(str(path)).registers.values()) == [("Wait.", "Sorry.")]
    path.write_text("[one]\nWait.\n[two words]\nSorry.\n")
    assert read_cues(str(path)).registers == {"one": ("Wait.",), "two words": ("Sorry.",)}


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c"])
def test_a_cue_ends_with_its_line_and_nowhere_else(tmp_path, separator):
    path = tmp_path / "cues.txt"
    path.write_text(f"Wait,{separator}no.\nSorry.\n", encoding="utf-8")
    assert read_cues(str(path)).registers == {"cues": (f"Wait,{separator}no.", "Sorry.")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no cue in the file"),
        ("[plain]\n\n", "there is no cue in the file"),
        ("Wait.\n[x]\nwait.\n", r"cues\.txt:3: the cue 'wait\.' comes twice\. It was at line 1"),
        ("Wait, {topic}.\n", r"cues\.txt:1: the only word in braces"),
    ],
)
def test_a_bad_cue_file_is_refused(tmp_path, text, message):
    path = tmp_path / "cues.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_cues(str(path))
