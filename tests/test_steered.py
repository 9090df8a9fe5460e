"""Shapes of detours and of their corrections, on a scripted engine: what is steered, where it is cut, who goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
import torch

from data_gen.collect import Outcome
from data_gen.context import Context, SteerableLatent
from data_gen.draws import draw, draw_count, highest
from data_gen.steered import steered
from esr_train.errors import InputError
from esr_train.recipe import Choice, FilterSection, Normal, SteeredSection, load_recipe
from esr_train.steering.directions import Direction
from esr_train.steering.engine import Completion, Progress, Request, Sampling
from esr_train.transcript import SaeRef, SpanKind, Transcript
from eval.cells import Prompt, Side
from eval.judging.judge import Attempt, JudgeItem, Judgement
from recipes.sources import check_held_out

DETOUR = "Owls fly by night. They hunt mice. Their wings are quiet."
ANSWER = "Knead the dough. Bake it."
PROMPTS = [Prompt("How do I bake?", "bread")]
LATENTS = [SteerableLatent(Direction(1, "owls", torch.ones(4) / 2, 1.0, 2.0, SaeRef("r", "i"), 7), 0.5)]


@dataclass
class Scripted:
    """Writes about owls under steering and about bread without; behind a prefix, what it is told to write."""

    tokenizer: object
    behind: Callable[[str], str] = lambda prefix: " " + ANSWER
    detour: str = DETOUR
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
            text = self.detour if request.interventions else ANSWER
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Completion(request.id, text, ids, "stop", 3, 3 if request.interventions else 0)


class OwlJudge:
    """Anything about owls scores 0, anything else 100."""

    name = "owls"

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        about = [any(word in item.response.casefold() for word in ("owl", "mice")) for item in items]
        return [Judgement((Attempt(0, 1, 0.0 if owls else 100.0),), self.name) for owls in about]


@pytest.fixture
def make(llama, tmp_path):
    cues = tmp_path / "cues.txt"
    cues.write_text("Wait, that's not right.\n")

    def rows(
        count: int = 40, behind=None, name: str = "steered", detour: str = DETOUR, **section
    ) -> tuple[Scripted, list[Outcome]]:
        engine = Scripted(llama.tokenizer, **({"behind": behind} if behind else {}), detour=detour)
        context = Context(engine, OwlJudge(), Sampling(), "all", "m", 0, llama.tokenizer)
        values = SteeredSection.model_validate({"rows": count, "cues": str(cues), **section})
        return engine, steered(context, values, FilterSection(), PROMPTS, LATENTS, name)(range(count))

    return rows


def kept(outcomes: Sequence[Outcome]) -> list[Transcript]:
    return [each.transcript for each in outcomes if each.transcript]


def texts(rows: Sequence[Transcript], kind: SpanKind) -> list[str]:
    return [span.text for row in rows for span in row.spans if span.kind is kind]


def test_a_detour_is_cut_at_a_token_wherever_that_falls(make, llama):
    _, outcomes = make(cut_tokens=[5, 14], at_token=1.0)
    ids = llama.tokenizer(DETOUR, add_special_tokens=False)["input_ids"]
    wanted = {llama.tokenizer.decode(ids[:count]).strip() for count in range(5, 15)}
    found = texts(kept(outcomes), SpanKind.OFF_TOPIC)
    assert len(found) == 40
    assert set(found) <= wanted
    assert len(set(found)) >= 6
    ends_in_mid_sentence = [not text.endswith(".") for text in found]
    cues = texts(kept(outcomes), SpanKind.CUE)
    assert [cue.startswith("\n\n") for cue in cues] == ends_in_mid_sentence


def test_lengths_come_from_the_distribution_that_the_recipe_names(make):
    _, outcomes = make(cut={"values": [1, 3], "weights": [3, 1]}, cut_words=[40, 40], count=200)
    sentences = [text.count(".") for text in texts(kept(outcomes), SpanKind.OFF_TOPIC)]
    assert set(sentences) == {1, 3}
    assert 130 <= sentences.count(1) <= 170


def test_strengths_come_from_the_distribution_that_the_recipe_names(make):
    _, outcomes = make(strength={"mean": 1.0, "sd": 0.1, "low": 0.9, "high": 1.3}, count=200)
    multiples = [row.steering.strength.norm / 0.5 for row in kept(outcomes) if row.steering]
    assert len(multiples) == 200
    assert 0.9 <= min(multiples) < 0.95
    assert max(multiples) <= 1.3
    assert sum(multiples) / 200 == pytest.approx(1.03, abs=0.03)


@pytest.mark.parametrize(
    ("drawn", "low", "high"),
    [((2, 5), 2, 5), (Normal(mean=3, sd=4, low=1, high=6), 1, 6), (Choice(values=(2, 8)), 2, 8)],
)
def test_a_draw_stays_within_its_ends(drawn, low, high):
    rng = Random(0)
    counts = {draw_count(rng, drawn) for _ in range(300)}
    assert (min(counts), max(counts), highest(drawn)) == (low, high, high)
    assert all(low <= draw(rng, drawn) <= high for _ in range(300))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{mean: 3, sd: 1, low: 4, high: 5}", "low <= mean <= high"),
        ("{values: []}", "at least 1 item"),
        ("{values: [1, 2], weights: [1]}", "2 values need as many weights"),
        ("{middle: 3}", "middle: unknown key"),
        ("often", r"data\.steered\.cut"),
    ],
)
def test_a_distribution_that_is_none_is_refused(tmp_path, value, message):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nmodel: {path: b}\n")
    with pytest.raises(InputError, match=message):
        load_recipe(path, [f"data.steered.cut={value}"])


def test_distributions_survive_an_arm_s_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nmodel: {path: b}\narms: {x: {data: {steered: {cut: {values: [2]}}}}}\n")
    section = load_recipe(path, ["data.steered.strength={mean: 1, sd: 0.1, low: 0.5, high: 2}"]).for_arm("x").data
    assert section.steered.cut == Choice(values=(2,))
    assert section.steered.strength == Normal(mean=1, sd=0.1, low=0.5, high=2)


def test_an_answer_afresh_does_not_see_the_detour(make):
    engine, outcomes = make()
    assert texts(kept(outcomes), SpanKind.ANSWER) == [" " + ANSWER] * 40
    assert all(request.prefix == "" for request in engine.requests)


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


def test_a_stem_that_the_model_makes_no_cue_of_is_refused(make, tmp_path):
    path = tmp_path / "soft.txt"
    path.write_text("I think that I drifted off.\n")
    _, outcomes = make(correction="stem", cues=str(path), behind=lambda prefix: " knead the dough well. Bake it.")
    assert {outcome.reason for outcome in outcomes} == {"cue missing"}


def test_a_silent_cue_is_not_shortened_and_swallows_no_answer(make, tmp_path):
    path = tmp_path / "silent.txt"
    path.write_text("Here is how it works.\n")
    behind = " Actually, dough is simple. Bake it."
    _, outcomes = make(correction="stem", cues=str(path), behind=lambda prefix: behind)
    assert set(texts(kept(outcomes), SpanKind.CUE)) == {" Here is how it works."}
    assert set(texts(kept(outcomes), SpanKind.ANSWER)) == {behind}


def test_an_answer_that_turns_back_again_is_refused(make):
    _, outcomes = make(correction="continued", behind=lambda prefix: f" {ANSWER} Oops, wrong subject. {ANSWER}")
    assert {outcome.reason for outcome in outcomes} == {"answer restarts by itself"}


def test_steering_that_stays_on_reaches_the_correction_and_only_answers_on_topic_are_kept(make):
    engine, outcomes = make(
        steering_stays=0.5,
        count=60,
        behind=lambda prefix: " " + (ANSWER if prefix.startswith("Owls fly by night. Wait") else "More mice."),
    )
    steered_on = [request for request in engine.requests if request.prefix]
    assert all(request.interventions for request in steered_on)
    assert 18 <= len(steered_on) <= 42
    rows = kept(outcomes)
    marked = [row for row in rows if row.meta.get("answer_steered")]
    refused = [outcome.reason for outcome in outcomes if outcome.reason]
    assert set(refused) == {"answer off-topic"}
    assert len(marked) + len(refused) == len(steered_on)
    assert marked
    assert all(row.content.startswith("Owls fly by night. Wait") for row in marked)
    assert all(row.steering for row in rows)


def test_a_prefixed_row_has_the_detour_but_is_not_steered(make):
    _, outcomes = make(name="prefixed")
    rows = kept(outcomes)
    assert len(rows) == 40
    assert all(row.steering is None and row.corrects for row in rows)
    assert {row.meta["detour"]["latent"] for row in rows} == {7}
    assert rows[0].id.startswith("prefixed-")


def test_a_prefixed_row_whose_detour_is_held_out_is_refused(make):
    _, outcomes = make(name="prefixed", count=3)
    with pytest.raises(InputError, match="share 1 latent"):
        check_held_out(kept(outcomes), Side(latents=frozenset([7])))
    with pytest.raises(InputError, match="share 1 off-topic subject"):
        check_held_out(kept(outcomes), Side(latents=frozenset([8]), subjects=frozenset(["Owls"])))


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
