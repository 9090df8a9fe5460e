"""The judge that asks how much likelier the question makes a text, on a scorer whose every word is known."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from esr_train.errors import InputError
from esr_train.recipe import Recipe, judging_model
from esr_train.steering.engine import Completion, Request, Sampling
from eval.cells import read_prompts
from eval.judging.judge import JudgeContext, JudgeItem, open_judge
from eval.judging.likelihood import NEUTRAL, LikelihoodJudge, passages
from eval.judging.prose import novelty
from recipes.resources import Resources
from tests.conftest import ASSETS

ABOUT = {
    "bread": {"knead", "dough", "flour", "oven", "crust", "loaf"},
    "boats": {"mast", "jib", "keel", "gale", "helm"},
}
QUESTION = "How do I bake bread?"
BREAD = "Knead the dough well and let it rest near the warm oven."
CRUST = "Bake the loaf until its crust is brown and serve it with flour."
BOATS = "Raise the mast and trim the jib before the gale hits the keel."
SALAD = "Zq xv kk jq wz qx vv zj kq xz jj qq."


@dataclass
class WordScorer:
    """Words cost two nats, those of the question's subject half a one; words without a vowel cost ten."""

    name: str = "words"
    asked: list[tuple[str, str]] = field(default_factory=list)

    def log_probabilities(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[tuple[float, ...]]:
        assert all(not request.interventions for request in requests)
        self.asked += [(request.prompt, text) for request, text in zip(requests, continuations, strict=True)]
        return [self._values(*pair) for pair in zip(requests, continuations, strict=True)]

    def _values(self, request: Request, text: str) -> tuple[float, ...]:
        own = next((words for subject, words in ABOUT.items() if subject in request.prompt), set())
        said = re.findall(r"\w+", text.lower())
        return tuple(-0.5 if word in own else -2.0 if re.search("[aeiouy]", word) else -10.0 for word in said)

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: object = None) -> list[Completion]:
        raise AssertionError("nothing is generated")


def judged(response: str, label: str | None = None, recovery: bool = True):
    (found,) = LikelihoodJudge("my/model", WordScorer).judge([JudgeItem(QUESTION, response, label, recovery)])
    assert found.error is None
    return found


def score(response: str) -> float | None:
    (attempt,) = judged(response).attempts
    return attempt.score


def test_a_text_scores_by_what_the_question_adds_to_its_likelihood():
    assert score(BREAD) > 60
    assert score(BOATS) == 0
    assert score("") == 0


def test_text_that_drifts_away_cannot_live_on_its_beginning():
    assert score(f"{BREAD} {BOATS} {BOATS.replace('Raise', 'Hoist')}") < score(f"{BREAD} {BOATS}") < score(BREAD)


def test_what_was_said_before_counts_as_nothing():
    assert score(" ".join([BREAD] * 8)) < score(BREAD) / 6
    assert judged(" ".join([BREAD] * 8)).flags["degenerate"]
    assert not judged(f"{BREAD} {CRUST}").flags["degenerate"]


def test_a_loop_of_apologies_is_degenerate_and_scores_nothing():
    found = judged("Sorry, sorry, sorry, sorry, sorry, sorry, sorry, sorry, sorry, sorry")
    assert found.flags["degenerate"]
    assert found.attempts[-1].score < 5


def test_word_salad_counts_as_nothing_whatever_the_question_adds():
    assert score(f"{BREAD} {SALAD}") == pytest.approx(score(BREAD) / 2, abs=5)
    found = judged("Zq dough xv flour kk loaf jq crust wz oven qx knead.")
    assert found.attempts[0].score == 0
    assert found.flags["degenerate"]


def test_an_unfinished_end_is_judged_for_what_is_there():
    assert score(f"{BREAD} {CRUST[:-20]}") == pytest.approx(score(f"{BREAD} {CRUST}"), abs=12)
    assert score(f"{BREAD} {BOATS[:-20]}") < score(BREAD) - 20


def test_attempts_begin_at_restarts_and_cues_are_not_scored():
    found = judged(f"{BOATS} Wait, that is off topic. {BREAD}")
    assert [attempt.score for attempt in found.attempts] == [0, score(BREAD)]
    assert found.attempts[0].end == found.attempts[1].start == len(BOATS) + 1
    assert found.flags == {"degenerate": False, "silent_recovery": False}


def test_a_recovery_without_a_word_is_seen():
    dense = "Dough, flour, crust and loaf, oven, knead dough, oven. Flour: knead dough, crust, loaf, oven, flour, loaf."
    assert judged(f"{BOATS} {dense}").flags["silent_recovery"]
    assert not judged(f"{dense} {BOATS}").flags["silent_recovery"]


def test_a_response_about_the_latents_subject_is_hijacked():
    assert judged(f"{BREAD} Wait, that is off topic. {BOATS}", "boats").flags["hijacked"]
    assert not judged(BREAD, "boats").flags["hijacked"]
    assert not judged(SALAD, "boats").flags["hijacked"]
    assert "hijacked" not in judged(BOATS).flags
    assert "hijacked" not in judged(BOATS, "boats", recovery=False).flags


def test_the_same_passage_is_asked_once_for_each_question():
    scorer = WordScorer()
    items = [JudgeItem(QUESTION, f"{BREAD} {BREAD}"), JudgeItem("How do boats sail?", BREAD)]
    LikelihoodJudge("my/model", lambda: scorer).judge(items)
    assert sorted(scorer.asked) == sorted([(NEUTRAL, BREAD), (QUESTION, BREAD), ("How do boats sail?", BREAD)])


def test_short_sentences_are_read_together():
    assert passages("1. Knead. Let it rest for an hour or two. Then bake it in the hot oven. Good luck!") == [
        "1. Knead. Let it rest for an hour or two.",
        "Then bake it in the hot oven. Good luck!",
    ]
    assert passages(f"{BREAD} {BOATS}") == [BREAD, BOATS]
    assert passages(" \n") == []


def test_a_sentence_without_end_is_read_in_pieces():
    drift = f"{BREAD[:-1]} {'and raise the mast of the boat ' * 8}"
    first, *others = passages(drift)
    assert first.startswith("Knead the dough")
    assert others
    assert " ".join([first, *others]) == drift.strip()
    assert score(f"{BREAD[:-1]} {' '.join([BOATS[:-1]] * 2)} {BOATS[6:-1]}") < score(BREAD) / 2


def test_novelty_is_the_share_of_runs_of_three_words_or_marks_that_nobody_said_before():
    assert novelty(["# # # # # # # #"]) == [pytest.approx(1 / 6)]
    assert novelty(["a b c d", "a b c d", "x"]) == [1.0, 0.0, 1.0]
    assert novelty(["no no no no no no"]) == [0.25]


def test_the_judges_name_tells_models_apart():
    names = {LikelihoodJudge(model, WordScorer).name for model in ("my/model", "other/model", "my/other")}
    assert len(names) == 3


def test_a_judge_that_names_no_model_needs_the_recipes():
    section = Recipe.model_validate({"name": "t", "model": {"path": "x"}, "judge": {"kind": "likelihood"}}).judge
    with pytest.raises(InputError, match=r"judge\.model: the judge's model is missing"):
        open_judge(section, JudgeContext())


def recipe(judge: dict) -> Recipe:
    model = {"path": str(ASSETS / "llama"), "dtype": "float32", "device": "cpu"}
    return Recipe.model_validate({"name": "t", "model": model, "judge": {"kind": "likelihood", **judge}})


def test_the_base_model_judges_unless_another_is_named():
    section = recipe({})
    assert judging_model(section, section.judge) == section.model
    resources = Resources(section)
    assert "llama" in resources.judge().name
    assert resources.judge()._open_engine() is resources.base()
    other = Resources(recipe({"model": str(ASSETS / "gemma")}))
    engine = other.judge()._open_engine()
    assert engine is not other.base()
    assert engine is other.judge()._open_engine(), "it is loaded once"


def test_an_arm_under_test_never_reaches_the_judge():
    resources = Resources(recipe({}))
    items = [JudgeItem("How do I raise the mast?", "You will need a firm mast and a jib.")]
    judge = resources.judge()
    before = judge.judge(items)
    tested = resources.engine(None, str(ASSETS / "gemma"))
    assert judge._open_engine() is resources.base()
    assert judge._open_engine().model is not tested.model
    assert judge.judge(items) == before


def test_the_tiny_models_own_replies_score_higher_than_replies_to_other_questions(assets):
    resources = Resources(recipe({}))
    prompts = [prompt.text for prompt in read_prompts(str(assets / "prompts.jsonl"), "prompt")[::40]][:12]
    requests = [Request(str(number), prompt, seed=number) for number, prompt in enumerate(prompts)]
    made = resources.base().generate(requests, Sampling(max_new_tokens=48))
    replies = [completion.text for completion in made]
    own, other = (
        [found.attempts[0].score for found in resources.judge().judge([JudgeItem(*pair) for pair in pairs])]
        for pairs in (zip(prompts, replies, strict=True), zip(prompts, replies[1:] + replies[:1], strict=True))
    )
    assert sum(own) / 12 > sum(other) / 12 + 25
