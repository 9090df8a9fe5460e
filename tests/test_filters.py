"""Rows that are refused for their text alone: detours that are none, answers that repeat them, rows seen before."""

from pathlib import Path

import pytest

from data_gen.collect import collect
from data_gen.filters import ALIKE, Seen, fault, repeated, screened
from data_gen.sources import Outcome
from esr_train.transcript import Span, SpanKind, Transcript
from eval.judging.prose import degenerate, repetition

OFF, CUE, ANSWER = SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER
OWLS = "Owls fly by night and hunt mice. Their wings are quiet, so that no mouse hears them come."
BREAD = "Knead the dough for ten minutes. Let it rise under a cloth, then bake it until the crust is brown."


def row(
    name: str, detour: str = OWLS, answer: str = BREAD, cue: str = " Wait, no.", prompt: str = "Bread?"
) -> Transcript:
    spans = (Span(OFF, detour), Span(CUE, cue), Span(ANSWER, f" {answer}"))
    return Transcript(name, prompt, spans, "steered")


@pytest.mark.parametrize(
    "text",
    [
        "the owl the owl the owl the owl the owl the owl",
        "Owls are owls are owls are owls are owls are owls are owls.",
        "hahahahahahahahahahahahahaha, said the owl to the mouse below it",
        "%% ## >> << || ~~ %% ## owl",
        "夜夜夜夜夜夜夜夜夜夜夜夜",
    ],
)
def test_a_detour_that_goes_in_circles_or_is_no_text_is_degenerate(text):
    assert degenerate(text)
    assert fault(row("a", detour=text)) == "detour degenerate"


@pytest.mark.parametrize(
    "text", [OWLS, "3 + 4 = 7, and 7 * 2 = 14.", "Die Eule fliegt nachts.", "- one\n- two\n- three"]
)
def test_ordinary_text_is_not(text):
    assert not degenerate(text)


def test_repetition_is_the_share_of_word_triples_said_before():
    assert repetition("one two three four") == 0
    # Of the six triples of these eight words the last two came before.
    assert repetition("one two three four one two three four") == pytest.approx(2 / 6)


def test_an_answer_that_says_the_detour_again_is_refused_and_one_that_shares_a_phrase_is_not():
    parrot = f"{OWLS} {BREAD}"
    assert repeated(OWLS, parrot) == 1
    assert fault(row("a", answer=parrot)) == "answer parrots the detour"
    assert fault(row("a", answer=f"Owls fly by night. {BREAD}")) is None


def test_a_candidate_refused_before_keeps_its_reason():
    make = screened(lambda _: [Outcome(None, "detour on-topic"), Outcome(row("a", detour="no " * 20))])
    assert [outcome.reason for outcome in make([0, 1])] == ["detour on-topic", "detour degenerate"]


def test_copies_and_near_copies_are_refused_whatever_their_cue():
    seen = Seen()
    assert seen.again(row("a")) is None
    assert seen.again(row("b", answer=BREAD.upper())) == "duplicate"
    assert seen.again(row("c", cue=" Hold on, that was about owls.")) == "near duplicate"
    assert seen.again(row("e", answer="Buy a loaf at the market on Sunday morning, and slice it thinly.")) is None


@pytest.mark.parametrize(("shared", "reason"), [(18, "near duplicate"), (17, None)])
def test_the_limit_is_that_of_the_exact_similarity(shared, reason):
    # `shared` triples in both texts and one more in either: 18 / 20 is ALIKE, 17 / 19 is less.
    assert (shared / (shared + 2) >= ALIKE) == (reason is not None)
    words = [f"w{number}" for number in range(shared + 2)]
    rows = [Transcript(end, "p", (Span(ANSWER, " ".join([*words, end])),), "normal") for end in ("x", "y")]
    seen = Seen()
    assert [seen.again(each) for each in rows] == [None, reason]


def test_repeats_are_counted_in_the_funnel_and_found_again_after_an_interruption(tmp_path: Path):
    def make(numbers):
        if max(numbers) >= dies:
            raise KeyboardInterrupt
        return [
            Outcome(row(f"r{n}", answer=f"{BREAD} Step {n // 2} of {n // 2} is {'rest ' * (n // 2)}")) for n in numbers
        ]

    dies = 99
    whole = collect("x", 3, make, tmp_path / "whole", 1)
    assert [each.id for each in whole.transcripts] == ["r0", "r2", "r4"]
    assert whole.funnel == {"kept": 3, "duplicate": 2}
    dies = 3
    with pytest.raises(KeyboardInterrupt):
        collect("x", 3, make, tmp_path / "cut", 1)
    dies = 99
    assert collect("x", 3, make, tmp_path / "cut", 1) == whole
