import json
from collections import Counter
from pathlib import Path

import pytest

from esr_train.restarts import attempts, find_cues, sentences

LABELLED = Path(__file__).parent / "data" / "restarts.jsonl"


def texts(response: str, ranges: list[tuple[int, int]]) -> list[str]:
    return [response[start:end] for start, end in ranges]


def rows(part: str = "") -> list[dict]:
    """The labelled responses; `seen` ones were looked at while the patterns were written, `unseen` ones never."""
    found = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    return [row for row in found if part in ("", row["part"])]


def test_the_labelled_responses_hold_restarts_and_their_look_alikes():
    assert len(rows()) >= 200
    assert sum(bool(row["cues"]) for row in rows()) >= 100
    assert sum(not row["cues"] for row in rows()) >= 100
    assert sum(bool(row["cues"]) for row in rows("unseen")) >= 25
    assert sum(not row["cues"] for row in rows("unseen")) >= 25
    assert len({row["response"] for row in rows()}) == len(rows())
    assert all(0 <= start < end <= len(row["response"]) for row in rows() for start, end in row["cues"])


def measured(part: str) -> dict[str, float]:
    """Precision and recall of where restarts begin, and of which responses hold one."""
    begins: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for row in rows(part):
        ours, theirs = ({start for start, _ in found} for found in (find_cues(row["response"]), row["cues"]))
        begins += Counter(hit=len(ours & theirs), found=len(ours), labelled=len(theirs))
        whole += Counter(hit=int(bool(ours and theirs)), found=int(bool(ours)), labelled=int(bool(theirs)))
    names = (("begin", begins), ("response", whole))
    precision = {f"{name} precision": count["hit"] / count["found"] for name, count in names}
    return precision | {f"{name} recall": count["hit"] / count["labelled"] for name, count in names}


def test_precision_and_recall_on_the_responses_the_patterns_were_written_with():
    found = measured("seen")
    assert found["begin precision"] >= 0.97, found
    assert found["begin recall"] >= 0.94, found
    assert found["response precision"] >= 0.99, found
    assert found["response recall"] >= 0.97, found


def test_precision_and_recall_on_responses_they_were_not_written_with():
    """What to expect of new texts. The patterns must not be fitted to these rows: label others instead."""
    found = measured("unseen")
    assert found["begin precision"] >= 0.80, found
    assert found["begin recall"] >= 0.55, found
    assert found["response precision"] >= 0.90, found
    assert found["response recall"] >= 0.60, found


@pytest.mark.parametrize(
    "instruction",
    [
        "wait 20 minutes.",
        "hold on to the rail.",
        "try again with more flour.",
        "wait until it is dry.",
        "wait. Then stir.",
        "your socks are in a sorry state.",
    ],
)
def test_an_instruction_that_uses_the_same_words_is_no_restart(instruction: str):
    for sentence in (instruction, instruction.capitalize()):
        assert find_cues(f"Mix the dough. {sentence} Bake it.") == []


def test_the_second_attempt_begins_at_the_first_word_of_the_restart():
    response = "Bread needs flour. Oops, wrong topic. Raise the mast."
    assert texts(response, attempts(response)) == [
        "Bread needs flour. ",
        "Oops, wrong topic. Raise the mast.",
    ]


def test_cue_sentences_that_follow_each_other_are_one_restart():
    response = "Knead it. Wait, that's not right. I was talking about bread. You asked about sails. Raise the mast."
    assert texts(response, find_cues(response)) == [
        "Wait, that's not right. I was talking about bread. You asked about sails."
    ]
    assert len(attempts(response)) == 2


def test_restarts_with_text_between_them_begin_an_attempt_each():
    response = "Knead it. Scratch that. Feed the goat. Sorry, I drifted off. Raise the mast."
    assert texts(response, attempts(response)) == [
        "Knead it. ",
        "Scratch that. Feed the goat. ",
        "Sorry, I drifted off. Raise the mast.",
    ]


def test_a_restart_with_nothing_before_it_is_not_a_second_attempt():
    response = "Sorry, I got off track. Raise the mast."
    assert len(find_cues(response)) == 1
    assert attempts(response) == [(0, len(response))]


def test_a_weak_opening_counts_only_when_the_restart_goes_on():
    assert find_cues("Add salt. Wait. Then stir.") == []
    response = "Add salt. Wait. Your question was about sails. Raise the mast."
    assert texts(response, find_cues(response)) == ["Wait. Your question was about sails."]


def test_what_the_question_was_is_no_restart_by_itself():
    assert find_cues("Raise the mast. You asked about sails. A sail is a wing.") == []


def test_a_restart_after_a_dash_begins_in_mid_sentence():
    response = "Knead the dough — wait, that's the wrong topic. Raise the mast."
    assert texts(response, find_cues(response)) == ["wait, that's the wrong topic."]


def test_typographic_apostrophes_and_capitals_make_no_difference():
    response = "Knead it. HMM, THAT’S NOT RIGHT. Raise the mast."
    assert texts(response, find_cues(response)) == ["HMM, THAT’S NOT RIGHT."]


@pytest.mark.parametrize("response", ["", "  ", "One.", "One. Oops. Two. Oops, again. Three"])
def test_attempts_cover_the_response(response: str):
    ranges = attempts(response)
    assert "".join(texts(response, ranges)) == response
    assert ranges[0][0] == 0
    assert ranges[-1][1] == len(response)


def test_sentences_end_at_stops_and_at_line_ends():
    text = 'He said "go." Then 3.5 cups!\n\n- one\n- two  '
    assert texts(text, sentences(text)) == ['He said "go."', "Then 3.5 cups!", "- one", "- two"]
