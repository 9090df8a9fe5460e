"""On-policy rows: steer, cut, cue, correct; and their contrast, steered rows that stay on topic."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random

from data_gen.collect import Make, Outcome, candidate_rng
from data_gen.context import (
    SEEDS,
    Asked,
    Context,
    SteerableLatent,
    cut_sentences,
    cut_tokens,
    cut_words,
    joined,
    other_topic,
)
from data_gen.cues import Cues, read_cues, stem
from data_gen.draws import draw, draw_count, highest
from data_gen.filters import DEGENERATE, degenerate
from esr_train.recipe import ContrastSection, Drawn, FilterSection, SteeredSection
from esr_train.restarts import attempts, split_cue
from esr_train.steering.engine import Completion
from esr_train.transcript import SpanKind, Transcript
from eval.cells import Prompt
from eval.judging.judge import JudgeItem

START_TOKENS = 4
"""Tokens that are sampled for a word of a reply's start; rare words need several."""


@dataclass
class _Candidate:
    """One row on its way: what was drawn for it, and what has been written so far."""

    number: int
    rng: Random
    prompt: Prompt
    latent: SteerableLatent
    norm: float
    parts: list[tuple[SpanKind, str]]
    scores: dict[str, float]
    reason: str | None = None
    stays: bool = False
    stemmed: bool = False

    @property
    def text(self) -> str:
        return "".join(span.text for span in joined(*self.parts))


def steered(
    context: Context,
    section: SteeredSection,
    filters: FilterSection,
    prompts: Sequence[Prompt],
    latents: Sequence[SteerableLatent],
    name: str = "steered",
) -> Make:
    """Makes detours under steering, each followed by a cue and by the same model's answer.

    A candidate whose detour is refused costs no answer.

    Args:
        context: model, judge and sampling.
        section: shapes of the detours, and how they are corrected.
        filters: of the run; a detour that they refuse is not scored.
        prompts: to answer.
        latents: to steer with.
        name: `steered`, or `prefixed` for rows that are to be trained without the steering that made their detour.
    """
    cues = read_cues(section.cues, section.registers)

    def make(numbers: Sequence[int]) -> list[Outcome]:
        drawn = [_draw(context, name, number, prompts, latents, section.strength) for number in numbers]
        _start(context, section, drawn)
        _detour(context, section, filters, drawn)
        for candidate in drawn:
            candidate.parts.append((SpanKind.CUE, _cue(cues, candidate)))
        again = [each for each in drawn if not each.reason and each.rng.random() < section.second_detour]
        _detour(context, section, filters, again)
        for candidate in again:
            candidate.parts.append((SpanKind.CUE, _cue(cues, candidate)))
        _correct(context, section, drawn)
        return [_outcome(context, name, candidate) for candidate in drawn]

    return make


def contrast(
    context: Context, section: ContrastSection, prompts: Sequence[Prompt], latents: Sequence[SteerableLatent]
) -> Make:
    """Makes steered replies that stay on topic by themselves: no detour, so no cue."""

    def make(numbers: Sequence[int]) -> list[Outcome]:
        drawn = [_draw(context, "contrast", number, prompts, latents, section.strength) for number in numbers]
        completions = context.generate([_asked(context, candidate) for candidate in drawn])
        for candidate, completion in zip(drawn, completions, strict=True):
            candidate.parts.append((SpanKind.ANSWER, completion.text.strip()))
            if completion.finish_reason != "stop":
                candidate.reason = "answer too long"
        _keep_scored(context, drawn, "answer", lambda score: score >= section.min_answer_score, "answer off-topic")
        return [_outcome(context, "contrast", candidate) for candidate in drawn]

    return make


def _draw(
    context: Context,
    source: str,
    number: int,
    prompts: Sequence[Prompt],
    latents: Sequence[SteerableLatent],
    strength: Drawn,
) -> _Candidate:
    rng = candidate_rng(context.seed, source, number)
    prompt = rng.choice(prompts)
    latent = rng.choice(other_topic(prompt, latents))
    return _Candidate(number, rng, prompt, latent, latent.threshold * draw(rng, strength), [], {})


def _asked(context: Context, candidate: _Candidate) -> Asked:
    return Asked(
        candidate.prompt.text,
        candidate.rng.randrange(SEEDS),
        prefix=candidate.text,
        interventions=(candidate.latent.direction.add(candidate.norm, context.positions),),
    )


def _start(context: Context, section: SteeredSection, candidates: list[_Candidate]) -> None:
    """Let a reply begin as the unsteered model begins it: where no detour has happened yet, there is no cue."""
    counts = [draw_count(candidate.rng, section.start) for candidate in candidates] if highest(section.start) else []
    going = [(candidate, count) for candidate, count in zip(candidates, counts, strict=False) if count]
    asked = [replace(_asked(context, candidate), interventions=()) for candidate, _ in going]
    most = START_TOKENS * int(highest(section.start))
    for (candidate, count), completion in zip(going, context.generate(asked, most) if asked else [], strict=True):
        candidate.parts.append((SpanKind.ANSWER, cut_words(completion.text.strip(), count)))


def _detour(context: Context, section: SteeredSection, filters: FilterSection, candidates: list[_Candidate]) -> None:
    """Let the steered model write on, and cut it after some sentences; refuse what is no text or still on topic."""
    going = [candidate for candidate in candidates if not candidate.reason]
    completions = context.generate([_asked(context, candidate) for candidate in going], section.max_new_tokens)
    for candidate, completion in zip(going, completions, strict=True):
        text = _cut(context, section, candidate.rng, completion)
        candidate.parts.append((SpanKind.OFF_TOPIC, text))
        if not text:
            candidate.reason = "detour empty"
        elif len(attempts(candidate.text)) > sum(kind is SpanKind.OFF_TOPIC for kind, _ in candidate.parts):
            candidate.reason = "detour restarts by itself"
        elif degenerate(text, filters.repetition):
            candidate.reason = DEGENERATE
    _keep_scored(context, going, "off_topic", lambda score: score < section.max_detour_score, "detour on-topic")


def _cut(context: Context, section: SteeredSection, rng: Random, completion: Completion) -> str:
    """Some sentences of a detour; or some tokens; or some words, in mid-sentence or where its sentences run on."""
    if section.at_token and rng.random() < section.at_token:
        return cut_tokens(context.tokenizer, completion, draw_count(rng, section.cut_tokens))
    text = cut_sentences(completion.text, draw_count(rng, section.cut))
    endless = completion.finish_reason == "length" and text == completion.text.strip()
    if endless or len(text.split()) > highest(section.cut_words) or rng.random() < section.mid_sentence:
        return cut_words(text, draw_count(rng, section.cut_words))
    return text


def _cue(cues: Cues, candidate: _Candidate) -> str:
    """A cue; after a detour that was cut in mid-sentence it opens a new paragraph."""
    cue = cues.draw(candidate.rng, candidate.latent.direction.label)
    return cue if candidate.text.endswith((".", "!", "?")) else f"\n\n{cue}"


def _correct(context: Context, section: SteeredSection, candidates: list[_Candidate]) -> None:
    """Let the same model answer: afresh and unsteered, behind the cue, or behind the cue while it is still steered."""
    going = [candidate for candidate in candidates if not candidate.reason]
    for candidate in going:
        candidate.stays = bool(section.steering_stays) and candidate.rng.random() < section.steering_stays
        if section.correction == "stem":
            _shorten_cue(candidate)
    afresh = [each for each in going if section.correction == "afresh" and not each.stays]
    onwards = [each for each in going if section.correction != "afresh" or each.stays]
    asked = [Asked(each.prompt.text, each.rng.randrange(SEEDS)) for each in afresh]
    asked += [_onwards(context, candidate) for candidate in onwards]
    completions = context.generate(asked)
    for candidate, completion in zip(afresh, completions[: len(afresh)], strict=True):
        candidate.parts.append((SpanKind.ANSWER, completion.text.strip()))
    for candidate, completion in zip(onwards, completions[len(afresh) :], strict=True):
        candidate.reason = _take_up(candidate, completion.text.rstrip())
    for candidate, completion in zip([*afresh, *onwards], completions, strict=True):
        if completion.finish_reason != "stop":
            candidate.reason = "answer too long"
    _keep_scored(context, going, "answer", lambda score: score >= section.min_answer_score, "answer off-topic")


def _shorten_cue(candidate: _Candidate) -> None:
    """Leave of the last cue the words with which the model is to write its own; a silent one stays whole."""
    kind, cue = candidate.parts[-1]
    if split_cue(cue) is not None:
        gap = cue[: len(cue) - len(cue.lstrip())]
        candidate.parts[-1] = (kind, gap + stem(candidate.rng, cue))
        candidate.stemmed = True


def _onwards(context: Context, candidate: _Candidate) -> Asked:
    asked = _asked(context, candidate)
    return asked if candidate.stays else replace(asked, interventions=())


def _take_up(candidate: _Candidate, text: str) -> str | None:
    """Split what the model wrote behind a cue into the rest of the cue and the answer; why not, if it cannot be."""
    kind, cue = candidate.parts.pop()
    written = cue + text
    end = split_cue(written) if candidate.stemmed or split_cue(cue) is not None else None
    if candidate.stemmed and (end is None or end <= len(cue)):
        return "cue missing"
    end = max(end or 0, len(cue))
    answer = written[end:]
    candidate.parts += [(kind, written[:end]), (SpanKind.ANSWER, answer if answer.startswith("\n") else answer.strip())]
    if not answer.strip():
        return "answer empty"
    detours = sum(each is SpanKind.OFF_TOPIC for each, _ in candidate.parts)
    return "answer restarts by itself" if len(attempts(candidate.text)) > detours + 1 else None


def _keep_scored(
    context: Context, candidates: list[_Candidate], name: str, good: Callable[[float], bool], reason: str
) -> None:
    """Score every candidate's newest part and refuse those that are not `good`."""
    going = [candidate for candidate in candidates if not candidate.reason]
    items = [JudgeItem(each.prompt.text, each.parts[-1][1], each.latent.direction.label) for each in going]
    for candidate, score in zip(going, context.scores(items), strict=True):
        if score is None:
            candidate.reason = "judge failed"
        elif not good(score):
            candidate.reason = reason
        else:
            candidate.scores[name] = score


def _outcome(context: Context, name: str, candidate: _Candidate) -> Outcome:
    if candidate.reason:
        return Outcome(None, candidate.reason)
    latent = candidate.latent
    threshold = latent.direction.strength(latent.threshold)
    steering = latent.steering(candidate.norm)
    meta = {
        "model": context.model,
        "seed": context.seed,
        "topic": candidate.prompt.topic,
        "threshold": {"raw": threshold.raw, "norm": threshold.norm},
        "scores": candidate.scores,
        **({"answer_steered": True} if candidate.stays else {}),
        **({"detour": asdict(steering)} if name == "prefixed" else {}),
    }
    return Outcome(
        Transcript(
            id=f"{name}-{context.seed}-{candidate.number:07d}",
            prompt=candidate.prompt.text,
            spans=joined(*candidate.parts),
            source="steered",
            steering=None if name == "prefixed" else steering,
            meta=meta,
        )
    )
