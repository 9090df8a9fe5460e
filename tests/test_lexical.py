import json
from pathlib import Path

import pytest

from esr_train.errors import InputError
from eval.judging.judge import JudgeItem, Judgement
from eval.judging.lexical import LexicalJudge

VOCABULARY = {"sailing": ["mast", "jib", "gale", "rowing boat"], "baking": ["dough", "oven", "berry", "loaf"]}
WORDS = ["how do i", "the raise trim a before", "and near is with", "then for it knead"]
PROMPT = "How do I raise the mast?"


def judged(response: str, prompt: str = PROMPT, label: str | None = "baking", words: bool = False) -> Judgement:
    judge = LexicalJudge({**VOCABULARY, "_words": WORDS} if words else VOCABULARY)
    return judge.judge([JudgeItem(prompt, response, label)])[0]


def scores(response: str, **given: object) -> list[float | None]:
    return [attempt.score for attempt in judged(response, **given).attempts]


def test_a_score_is_the_mean_over_sentences_of_the_on_topic_share():
    assert scores("Raise the mast. Put the jib near the oven.") == [75.0]


def test_a_sentence_without_topic_words_is_left_out():
    assert scores("This is simple. Raise the mast.") == [100.0]
    assert scores("This is simple.") == [0.0]


def test_plurals_topic_names_and_terms_of_several_words_count():
    assert scores("Masts and jibs.") == [100.0]
    assert scores("Berries and loafs for baking.") == [0.0]
    assert scores("Sailing with a rowing-boat.") == [100.0]
    assert scores("Sailing with a boat. The oven.") == [50.0]


def test_the_prompts_topic_is_the_one_it_names_most():
    assert scores("Raise the mast.", prompt="Does dough suit sailing with mast and jib?") == [100.0]
    assert scores("Raise the mast.", prompt="Is the oven or the dough near the mast?") == [0.0]


def test_a_prompt_without_a_topic_is_unscored_not_zero():
    judgement = judged("Raise the mast.", prompt="How are you?")
    assert judgement.error
    assert judgement.attempts == ()


@pytest.mark.parametrize("response", ["", "  \n"])
def test_an_empty_response_is_one_attempt_that_scores_zero(response: str):
    assert scores(response) == [0.0]
    assert judged(response).flags["degenerate"] is False


def test_cue_sentences_are_not_scored():
    response = "Knead the dough. Wait, I was talking about the oven. Raise the mast."
    assert scores(response) == [0.0, 100.0]
    assert scores("Wait, I was talking about the oven. Raise the mast.") == [100.0]


def test_attempts_are_character_ranges_that_cover_the_response():
    response = "Knead the dough. Scratch that. Raise the mast."
    assert [(each.start, each.end) for each in judged(response).attempts] == [(0, 17), (17, len(response))]


def test_a_trailing_unfinished_sentence_is_left_out_unless_it_is_the_only_one():
    assert scores("Raise the mast. Then the ov oven") == [100.0]
    assert scores("Raise the mast near the oven and") == [50.0]


def test_a_repeated_sentence_is_degenerate_and_counts_once():
    response = "Trim the jib before the next gale. " * 4
    assert judged(response).flags["degenerate"]
    assert scores(response) == [25.0]


def test_four_words_that_occur_three_times_are_degenerate():
    response = "Trim the jib and mast. Now trim the jib and oven. Then trim the jib and gale. Raise it."
    assert judged(response).flags["degenerate"]
    assert scores(response) == [pytest.approx(100 * (2.5 / 3) * (2 / 4), abs=0.01)]


def test_a_stuttering_word_is_degenerate():
    assert judged("The jib jib jib mast.").flags["degenerate"]
    assert scores("The jib jib jib mast.") == [0.0]


def test_unknown_words_are_degenerate_only_where_the_language_is_known():
    response = "Raise the mast. Blorp mast gnarf. Trim the jib."
    assert judged(response, words=False).flags["degenerate"] is False
    assert judged(response, words=True).flags["degenerate"]
    assert scores(response, words=True) == [pytest.approx(100 * 2 / 3, abs=0.01)]


def test_a_plain_answer_is_not_degenerate():
    response = "Raise the mast and trim the jib. Then trim the jib before the gale. The mast is near the jib."
    assert judged(response, words=True).flags["degenerate"] is False


def test_a_response_is_hijacked_when_its_last_attempt_is_mostly_about_the_latents_topic():
    assert judged("Knead the dough near the oven and mast.").flags["hijacked"]
    assert not judged("Knead the dough near the mast.").flags["hijacked"]
    assert not judged("Knead the dough. Oops. Raise the mast.").flags["hijacked"]
    assert judged("Raise the mast. Oops. Knead the dough.").flags["hijacked"]


def test_without_the_latents_topic_nothing_is_said_about_hijacking():
    assert "hijacked" not in judged("Knead the dough.", label=None).flags
    assert "hijacked" not in judged("Knead the dough.", label="knitting").flags


def test_silent_recovery_is_a_return_without_a_restart():
    assert judged("Knead the dough. Heat the oven and jib. Raise the mast.").flags["silent_recovery"]
    assert not judged("Raise the jib. Trim the jib. Raise the mast.").flags["silent_recovery"]
    assert not judged("Knead the dough. Oops. Trim the jib. Raise the mast.").flags["silent_recovery"]
    assert not judged("Raise the mast. Trim the jib. Knead the dough.").flags["silent_recovery"]


def test_the_judges_name_tells_vocabularies_apart():
    assert LexicalJudge(VOCABULARY).name == LexicalJudge(VOCABULARY).name
    assert LexicalJudge(VOCABULARY).name != LexicalJudge({**VOCABULARY, "_words": WORDS}).name


def test_a_word_of_two_topics_is_refused(tmp_path: Path):
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps({"sailing": ["mast"], "building": ["mast"]}))
    with pytest.raises(InputError, match=r"vocabulary\.json: 'mast' belongs to both 'sailing' and 'building'"):
        LexicalJudge.from_file(path)


@pytest.mark.parametrize("value", [[], {}, {"sailing": "mast"}, {"sailing": [1]}])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, value: object):
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"vocabulary\.json"):
        LexicalJudge.from_file(path)
