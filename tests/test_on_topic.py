"""The likelihood judge against a reader, who graded 400 responses of a real model before anything scored them."""

import pytest

from benchmarks.judges import Graded, auc, graded, rank_correlation, read, retest, stored
from esr_train.models import load_model, load_tokenizer, local_path
from esr_train.recipe import ModelSection
from esr_train.steering.transformers_engine import TransformersEngine
from eval.judging.judge import JudgeItem
from eval.judging.likelihood import LikelihoodJudge, attempt_score, is_degenerate

MODEL = "smollm2-135m-instruct"
ROWS = read()


def scored(half: str | None = None) -> list[Graded]:
    """The graded attempts with the scores that follow from the stored log-probabilities."""
    rows = [row for row in ROWS if half in (None, row["half"])]
    return graded(rows, [[attempt_score(attempt) for attempt in stored(row)] for row in rows])


def test_enough_responses_of_every_kind_were_read():
    assert len(ROWS) >= 300
    assert {row["kind"] for row in ROWS} == {"steered", "unsteered", "restarted", "other", "drift"}
    assert sum(row["restarted"] for row in ROWS) >= 40
    assert sum(row["degenerate"] for row in ROWS) >= 100
    tuned, held_out = ({row["prompt"] for row in ROWS if row["half"] == half} for half in ("tuned", "held out"))
    assert not tuned & held_out


def test_the_reader_says_the_same_again():
    n, correlation, equal = retest(ROWS)
    assert n >= 60
    assert correlation >= 0.9
    assert equal >= 0.85


@pytest.mark.parametrize("half", [None, "held out"])
def test_scores_rank_attempts_as_the_reader_does(half):
    found = scored(half)
    assert len(found) >= 200
    assert rank_correlation(found) >= 0.85
    assert auc(found) >= 0.97


def test_among_steered_responses_too():
    found = [each for each in scored() if each.kind == "steered"]
    assert rank_correlation(found) >= 0.8
    assert auc(found) >= 0.95


def test_a_text_that_opens_on_topic_and_drifts_scores_low_and_replies_to_other_questions_nothing():
    found = scored()
    mean = {
        kind: sum(each.score for each in found if each.kind == kind) / sum(each.kind == kind for each in found)
        for kind in ("drift", "other", "unsteered")
    }
    assert mean["drift"] < 40
    assert mean["other"] < 5
    assert mean["unsteered"] > 85


def test_loops_and_word_salad_are_told_from_text():
    pairs = [(any(map(is_degenerate, stored(row))), row["degenerate"]) for row in ROWS]
    assert sum(judge == reader for judge, reader in pairs) / len(pairs) >= 0.87


@pytest.mark.slow
def test_the_model_itself_still_judges_so():
    if local_path(MODEL) is None:
        pytest.skip(f"{MODEL} is not here: the judge was not tested on it (esr models fetch {MODEL})")
    section = ModelSection(path=MODEL, device="cpu")
    engine = TransformersEngine(load_model(section), load_tokenizer(section), batch_rows=48)
    rows = [row for row in ROWS if row["half"] == "held out"]
    found = LikelihoodJudge(MODEL, lambda: engine).judge([JudgeItem(row["prompt"], row["response"]) for row in rows])
    attempts = graded(rows, [[float(each.score or 0) for each in one.attempts] for one in found])
    assert rank_correlation(attempts) >= 0.8
    assert auc(attempts) >= 0.95
