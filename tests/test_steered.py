"""Shapes of detours and of their corrections, on a scripted engine: what is steered, where it is cut, who goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
import torch

from data_gen.sources import Context, Cues, Outcome, SteerableLatent, whole_sentences
from data_gen.steered import steered
from esr_train.errors import InputError
from esr_train.recipe import SteeredSection, load_recipe
from esr_train.steering.directions import Direction
from esr_train.steering.engine import Completion, Progress, Request, Sampling
from esr_train.transcript import SaeRef, SpanKind, Transcript
from eval.cells import Pools, Prompt, Side
from eval.judging.judge import Attempt, JudgeItem, Judgement
from recipes.stages.rows import check_held_out

DETOUR = "Owls fly by night. They hunt mice. Their wings are quiet."
ANSWER = "Knead the dough. Bake it."
PROMPTS = (Prompt("How do I bake?", "bread"),)
POOLS = Pools({"bread": "train"}, PROMPTS, (), (), PROMPTS)
LATENTS = [SteerableLatent(Direction(1, "owls", torch.ones(4) / 2, 1.0, 2.0, SaeRef("r", "i"), 7), 0.5)]


@dataclass
class Scripted:
    """Writes about owls under steering and about bread without; behind a prefix, what it is told to write."""

    tokenizer: object
    behind: Callable[[str], str] = lambda prefix: " " + ANSWER
    detour: str = DETOUR
    answer: str = ANSWER
    finish: Literal["stop", "length"] = "stop"
    requests: list[Request] = field(default_factory=list)
    name: str = "scripted"

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        self.requests += requests
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Completion:
        if request.prefix and not request.prefix.endswith(("mice.", "night.", "quiet.")):
            text = self.behind(request.prefix)
        else:
            text = self.detour if request.interventions else self.answer
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Completion(request.id, text, ids, self.finish, 3, 3 if request.interventions else 0)


class OwlJudge:
    """Anything about owls scores 0, anything else 100."""

    name = "owls"

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        about = [any(word in item.response.casefold() for word in ("owl", "mice")) for item in items]
        return [Judgement((Attempt(0, 1, 0.0 if owls else 100.0),), self.name) for owls in about]


@pytest.fixture
def make(llama):
    def rows(
        count: int = 40, cue: str = "Wait, that's not right.", trim_answers: bool = False, **settings
    ) -> tuple[Scripted, list[Outcome]]:
        script = {key: settings.pop(key) for key in ("behind", "detour", "answer", "finish") if key in settings}
        engine = Scripted(llama.tokenizer, **script)
        cues = Cues({"plain": (cue,)})
        context = Context(engine, OwlJudge(), Sampling(), "all", "m", 0, llama.tokenizer, POOLS, LATENTS, cues)
        context = replace(context, trim_answers=trim_answers)
        values = SteeredSection.model_validate({"rows": count, **settings})
        return engine, steered(context, values)(range(count))

    return rows


def kept(outcomes: Sequence[Outcome]) -> list[Transcript]:
    return [each.transcript for each in outcomes if each.transcript]


def texts(rows: Sequence[Transcript], kind: SpanKind) -> list[str]:
    return [span.text for row in rows for span in row.spans if span.kind is kind]


def test_lengths_and_strengths_are_drawn_from_the_ranges_that_the_recipe_names(make):
    _, outcomes = make(cut=[1, 3], cut_words=[40, 40], strength=[0.9, 1.3], count=200)
    sentences = [text.count(".") for text in texts(kept(outcomes), SpanKind.OFF_TOPIC)]
    assert all(45 <= sentences.count(count) <= 90 for count in (1, 2, 3))
    multiples = [row.steering.strength.norm / 0.5 for row in kept(outcomes) if row.steering]
    assert len(multiples) == 200
    assert 0.9 <= min(multiples) < 0.95
    assert 1.25 < max(multiples) <= 1.3


def test_a_row_may_have_two_detours_each_with_its_cue(make):
    engine, outcomes = make(second_detour=0.5, behind=lambda prefix: " " + DETOUR)
    kinds = [[span.kind for span in row.spans] for row in kept(outcomes)]
    two = sum(len(each) == 5 for each in kinds)
    assert 10 <= two <= 30
    assert all(each[-3:] == list(SpanKind) and each[:2] == list(SpanKind)[:2] for each in kinds)
    assert sum(bool(request.interventions and request.prefix) for request in engine.requests) == two


def test_a_plain_row_holds_the_unsteered_answer_alone_and_the_steering_that_is_not_to_move_it(make):
    engine, outcomes = make(plain=0.5)
    rows = kept(outcomes)
    plain = [row for row in rows if [span.kind for span in row.spans] == [SpanKind.ANSWER]]
    assert 10 <= len(plain) <= 30
    assert len(rows) == 40
    assert all(row.steering and row.rejected is None and not row.corrects for row in plain)
    assert sum(bool(request.interventions) for request in engine.requests) == len(rows) - len(plain)


@pytest.mark.parametrize("correction", ["continued", "stem"])
def test_plain_rows_know_no_cue_however_corrections_are_written(make, correction):
    _, outcomes = make(plain=1.0, correction=correction)
    assert {span.kind for row in kept(outcomes) for span in row.spans} == {SpanKind.ANSWER}
    assert len(kept(outcomes)) == 40


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[3, 1]", r"data\.steered\.cut: .*the low end comes first"),
        ("[1.5, 3]", r"data\.steered\.cut\.0: .*integer"),
        ("[-1, 3]", r"data\.steered\.cut\.0: .*greater than or equal to 0"),
        ("3", r"data\.steered\.cut: "),
        ("{values: [1, 3]}", r"data\.steered\.cut: "),
    ],
)
def test_a_range_that_is_none_is_refused(tmp_path, value, message):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nmodel: {path: b}\n")
    with pytest.raises(InputError, match=message):
        load_recipe(path, [f"data.steered.cut={value}"])


def test_rows_whose_latent_or_label_is_held_out_are_refused(make):
    _, outcomes = make(count=3)
    with pytest.raises(InputError, match="share 1 latent"):
        check_held_out(kept(outcomes), Side(latents=frozenset([7])))
    with pytest.raises(InputError, match="share 1 off-topic subject"):
        check_held_out(kept(outcomes), Side(latents=frozenset([8]), subjects=frozenset(["Owls"])))


def test_an_answer_afresh_does_not_see_the_detour(make):
    engine, outcomes = make()
    assert texts(kept(outcomes), SpanKind.ANSWER) == [" " + ANSWER] * 40
    assert all(request.prefix == "" for request in engine.requests)


def test_an_answer_that_ran_on_is_refused_or_trimmed_to_whole_sentences(make):
    _, refused = make(finish="length", answer=ANSWER + " Let it")
    assert {outcome.reason for outcome in refused} == {"answer too long"}
    _, outcomes = make(finish="length", answer=ANSWER + " Let it", trim_answers=True)
    assert texts(kept(outcomes), SpanKind.ANSWER) == [" " + ANSWER] * 40
    assert all(outcome.trimmed for outcome in outcomes)


@pytest.mark.parametrize(("words", "answer"), [(None, ANSWER), (3, "Knead the dough."), (4, ANSWER), (99, ANSWER)])
def test_an_answer_may_end_with_the_sentence_that_reaches_so_many_words(make, words, answer):
    _, outcomes = make(answer_words=words)
    assert texts(kept(outcomes), SpanKind.ANSWER) == [" " + answer] * 40


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("Knead it. Bake", "Knead it."),
        ("Do this:\n\n1. Knead it.\n2. Bake it.\n3.", "Do this:\n\n1. Knead it.\n2. Bake it."),
        ('He said "stop." Then', 'He said "stop."'),
        ("No end in sight", ""),
    ],
)
def test_a_trimmed_answer_ends_with_its_last_finished_sentence(text, whole):
    assert whole_sentences(text) == whole


def test_a_continued_answer_is_written_unsteered_behind_detour_and_cue(make):
    engine, outcomes = make(correction="continued", behind=lambda prefix: " I'll go back to it. " + ANSWER)
    behind = [request for request in engine.requests if request.prefix]
    assert len(behind) == len(kept(outcomes)) == 40
    assert all(request.prefix.endswith(" Wait, that's not right.") and not request.interventions for request in behind)
    assert set(texts(kept(outcomes), SpanKind.CUE)) == {" Wait, that's not right. I'll go back to it."}
    assert set(texts(kept(outcomes), SpanKind.ANSWER)) == {" " + ANSWER}


def test_a_model_that_is_given_a_stem_writes_its_own_cue(make):
    _, outcomes = make(correction="stem", behind=lambda prefix: " I was off the subject. " + ANSWER)
    cues = set(texts(kept(outcomes), SpanKind.CUE))
    assert cues == {" Wait, I was off the subject.", " Wait, that's I was off the subject."}
    assert set(texts(kept(outcomes), SpanKind.ANSWER)) == {" " + ANSWER}


def test_a_stem_that_the_model_makes_no_cue_of_is_refused(make):
    cue = "I think that I drifted off."
    _, outcomes = make(correction="stem", cue=cue, behind=lambda prefix: " knead the dough well. Bake it.")
    assert {outcome.reason for outcome in outcomes} == {"cue missing"}


def test_a_silent_cue_is_not_shortened_and_swallows_no_answer(make):
    behind = " Actually, dough is simple. Bake it."
    _, outcomes = make(correction="stem", cue="Here is how it works.", behind=lambda prefix: behind)
    assert set(texts(kept(outcomes), SpanKind.CUE)) == {" Here is how it works."}
    assert set(texts(kept(outcomes), SpanKind.ANSWER)) == {behind}


def test_an_answer_that_turns_back_again_is_refused(make):
    _, outcomes = make(correction="continued", behind=lambda prefix: f" {ANSWER} Oops, wrong subject. {ANSWER}")
    assert {outcome.reason for outcome in outcomes} == {"answer restarts by itself"}


def test_a_reply_begins_unsteered_and_its_beginning_is_trained(make):
    engine, outcomes = make(behind=lambda prefix: " " + DETOUR, start=[0, 3], count=60)
    rows = kept(outcomes)
    begun = [row for row in rows if row.spans[0].kind is SpanKind.ANSWER]
    starts = [row.spans[0].text for row in begun]
    assert len(rows) == 60
    assert set(starts) == {"Knead", "Knead the", "Knead the dough."}
    assert len(rows) - len(begun) in range(5, 30)
    assert all([span.kind for span in row.spans[-3:]] == list(SpanKind) for row in rows)
    assert sorted(each.prefix for each in engine.requests if each.interventions and each.prefix) == sorted(starts)
    assert not [each for each in engine.requests if not each.interventions and each.prefix]


@pytest.mark.parametrize(
    ("detour", "reason"),
    [("Owls, owls, owls, owls, owls, owls, owls, owls.", "detour degenerate"), (ANSWER, "detour on-topic")],
)
def test_a_detour_that_is_refused_costs_no_answer(make, detour, reason):
    engine, outcomes = make(detour=detour, cut_words=[40, 40])
    assert {outcome.reason for outcome in outcomes} == {reason}
    assert len(engine.requests) == 40
    assert all(request.interventions for request in engine.requests)


def test_a_detour_is_what_the_model_itself_said_under_the_row_s_own_steering(make):
    engine, outcomes = make(count=20)
    rows = kept(outcomes)
    asked = [each.interventions[0].vector.norm().item() for each in engine.requests if each.interventions]
    assert len(rows) == 20
    for row in rows:
        detour = next(span.text for span in row.spans if span.kind is SpanKind.OFF_TOPIC)
        assert DETOUR.startswith(detour)
        wanted = LATENTS[0].direction.add(row.steering.strength.norm).vector.norm().item()
        assert any(norm == pytest.approx(wanted, rel=1e-3) for norm in asked)


def test_where_no_latent_is_of_another_topic_than_a_prompt_that_is_said(llama):
    bread = [replace(each, direction=replace(each.direction, label="bread")) for each in LATENTS]
    context = Context(Scripted(llama.tokenizer), OwlJudge(), Sampling(), "all", "m", 0, llama.tokenizer, POOLS, bread)
    with pytest.raises(InputError, match=r"no prompt can be steered off-topic: all stand for 'bread'.*other topics"):
        steered(context, SteeredSection(rows=1))
    with pytest.raises(InputError, match="nothing is left to steer with"):
        steered(replace(context, latents=()), SteeredSection(rows=1))


def test_the_rejected_reply_is_the_detour_as_the_steered_model_went_on(make):
    _, outcomes = make(cut=[1, 2], mid_sentence=0.5, start=[0, 2], behind=lambda prefix: " " + DETOUR)
    for row in kept(outcomes):
        *before, detour = row.rejected
        assert before == list(row.spans[:-3])
        shared = row.content[: row.content.index(row.spans[-2].text)]
        assert "".join(span.text for span in row.rejected).startswith(shared)
        assert DETOUR.startswith(detour.text.strip())
        more, correction = detour.text[len(row.spans[-3].text) :], row.spans[-2].text + row.spans[-1].text
        assert 0 < len(more.split()) <= len(correction.split())
    assert len(kept(outcomes)) == 40
