"""On-policy rows: steer, cut, cue, correct; or the plain answer, which the row's steering is not to move."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from data_gen.filters import DEGENERATE
from data_gen.preferences import rejected_detour
from data_gen.sources import (
    SEEDS,
    TOO_LONG,
    Context,
    Make,
    Outcome,
    SteerableLatent,
    candidate_rng,
    cut_sentences,
    cut_words,
    joined,
    register_source,
    stem,
)
from esr_train.errors import InputError
from esr_train.recipe import SteeredSection
from esr_train.restarts import attempts, sentences, split_cue
from esr_train.steering.engine import Completion, Request
from esr_train.transcript import SpanKind, Transcript
from eval.cells import Prompt
from eval.judging.judge import JudgeItem
from eval.judging.prose import degenerate

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
    parts: list[tuple[SpanKind, str]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    plain: bool = False
    stemmed: bool = False
    trimmed: bool = False
    rest: str = ""
    """What the model wrote behind the cut of its last detour."""

    @property
    def text(self) -> str:
        return "".join(span.text for span in joined(*self.parts))


@register_source("steered", SteeredSection, needs_latents=True)
def steered(context: Context, section: SteeredSection) -> Make:
    """Makes detours under steering, each followed by a cue and by the same model's answer.

    A candidate whose detour is refused costs no answer.

    Raises:
        InputError: if no latent is of another topic than some prompt.
    """
    labels = {latent.direction.label for latent in context.latents}
    prompts = [prompt for prompt in context.prompts.train if labels - {prompt.topic}]
    if not prompts:
        what = "no prompt can be steered off-topic: " + (
            f"all stand for {labels.pop()!r}, as the prompts do" if labels else "nothing is left to steer with"
        )
        raise InputError(what, "data.steered", "Add prompts of other topics, or latents or vectors.")

    def make(numbers: Sequence[int]) -> list[Outcome]:
        candidates = [_draw(context, section, prompts, number) for number in numbers]
        drifting = [each for each in candidates if not each.plain]
        _start(context, section, drifting)
        _detour(context, section, drifting)
        again = [each for each in drifting if not each.reason and each.rng.random() < section.second_detour]
        _detour(context, section, again)
        _correct(context, section, candidates)
        return [_outcome(context, candidate) for candidate in candidates]

    return make


def _draw(context: Context, section: SteeredSection, prompts: Sequence[Prompt], number: int) -> _Candidate:
    """One of the prompts, a latent of another topic, and a strength."""
    rng = candidate_rng(context.seed, "steered", number)
    prompt = rng.choice(prompts)
    latent = rng.choice([latent for latent in context.latents if latent.direction.label != prompt.topic])
    norm = latent.threshold * rng.uniform(*section.strength)
    plain = section.plain > 0 and rng.random() < section.plain
    return _Candidate(number, rng, prompt, latent, norm, plain=plain)


def _request(context: Context, candidate: _Candidate, steers: bool) -> Request:
    """To write on behind what a candidate has, under its steering or without."""
    steering = (candidate.latent.direction.add(candidate.norm, context.positions),) if steers else ()
    seed = candidate.rng.randrange(SEEDS)
    return Request("", candidate.prompt.text, prefix=candidate.text, interventions=steering, seed=seed)


def _start(context: Context, section: SteeredSection, candidates: list[_Candidate]) -> None:
    """Let a reply begin as the unsteered model begins it: where no detour has happened yet, there is no cue."""
    most = section.start[1]
    counts = [candidate.rng.randint(*section.start) for candidate in candidates] if most else []
    going = [(candidate, count) for candidate, count in zip(candidates, counts, strict=False) if count]
    requests = [_request(context, candidate, steers=False) for candidate, _ in going]
    completions = context.generate(requests, START_TOKENS * most) if requests else []
    for (candidate, count), completion in zip(going, completions, strict=True):
        candidate.parts.append((SpanKind.ANSWER, cut_words(completion.text.strip(), count)))


def _detour(context: Context, section: SteeredSection, candidates: list[_Candidate]) -> None:
    """Let the steered model write on, cut it, refuse what is no text or still on topic, and put a cue behind it."""
    going = [candidate for candidate in candidates if not candidate.reason]
    requests = [_request(context, candidate, steers=True) for candidate in going]
    completions = context.generate(requests, section.max_new_tokens)
    for candidate, completion in zip(going, completions, strict=True):
        text = _cut(section, candidate.rng, completion)
        candidate.rest = completion.text.lstrip()[len(text) :]
        candidate.parts.append((SpanKind.OFF_TOPIC, text))
        if not text:
            candidate.reason = "detour empty"
        elif len(attempts(candidate.text)) > sum(kind is SpanKind.OFF_TOPIC for kind, _ in candidate.parts):
            candidate.reason = "detour restarts by itself"
        elif degenerate(text):
            candidate.reason = DEGENERATE
    _keep_scored(context, going, "off_topic", context.detour_fault)
    for candidate in going:
        candidate.parts.append((SpanKind.CUE, _cue(context, candidate)))


def _cut(section: SteeredSection, rng: Random, completion: Completion) -> str:
    """Some sentences of a detour; or some words, in mid-sentence or where its sentences run on."""
    text = cut_sentences(completion.text, rng.randint(*section.cut))
    endless = completion.finish_reason == "length" and text == completion.text.strip()
    if endless or len(text.split()) > section.cut_words[1] or rng.random() < section.mid_sentence:
        return cut_words(text, rng.randint(*section.cut_words))
    return text


def _cue(context: Context, candidate: _Candidate) -> str:
    """A cue; after a detour that was cut in mid-sentence it opens a new paragraph."""
    cue = context.cues.draw(candidate.rng, candidate.latent.direction.label)
    return cue if candidate.text.endswith((".", "!", "?")) else f"\n\n{cue}"


def _correct(context: Context, section: SteeredSection, candidates: list[_Candidate]) -> None:
    """Let the same model answer, unsteered: afresh, or on behind detour and cue."""
    going = [candidate for candidate in candidates if not candidate.reason]
    if section.correction == "stem":
        for candidate in going:
            if not candidate.plain:
                _shorten_cue(candidate)
    afresh = section.correction == "afresh"
    requests = [_request(context, candidate, steers=False) for candidate in going]
    completions = context.generate([replace(request, prefix="") for request in requests] if afresh else requests)
    for candidate, completion in zip(going, completions, strict=True):
        text, candidate.trimmed = context.whole(completion), completion.finish_reason != "stop"
        if text is None:
            candidate.reason = TOO_LONG
        elif afresh or candidate.plain:
            candidate.parts.append((SpanKind.ANSWER, _shortened(section, text).strip()))
        else:
            candidate.reason = _take_up(candidate, _shortened(section, text).rstrip())
    _keep_scored(context, going, "answer", context.answer_fault)


def _shortened(section: SteeredSection, text: str) -> str:
    """An answer up to the end of the sentence that reaches the wanted words: with it, detour and cue weigh more."""
    if section.answer_words is None:
        return text
    ends = [end for _, end in sentences(text)]
    return text[: next((end for end in ends if len(text[:end].split()) >= section.answer_words), len(text))]


def _shorten_cue(candidate: _Candidate) -> None:
    """Leave of the last cue the words with which the model is to write its own; a silent one stays whole."""
    kind, cue = candidate.parts[-1]
    if split_cue(cue) is not None:
        gap = cue[: len(cue) - len(cue.lstrip())]
        candidate.parts[-1] = (kind, gap + stem(candidate.rng, cue))
        candidate.stemmed = True


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
    detours = sum(kind is SpanKind.OFF_TOPIC for kind, _ in candidate.parts)
    return "answer restarts by itself" if len(attempts(candidate.text)) > detours + 1 else None


def _keep_scored(
    context: Context, candidates: list[_Candidate], name: str, fault: Callable[[float | None], str | None]
) -> None:
    """Score every candidate's newest part and refuse those with a `fault`."""
    going = [candidate for candidate in candidates if not candidate.reason]
    items = [JudgeItem(each.prompt.text, each.parts[-1][1], each.latent.direction.label) for each in going]
    for candidate, score in zip(going, context.scores(items), strict=True):
        candidate.reason = fault(score)
        if score is not None and not candidate.reason:
            candidate.scores[name] = score


def _outcome(context: Context, candidate: _Candidate) -> Outcome:
    if candidate.reason:
        return Outcome(None, candidate.reason)
    latent = candidate.latent
    threshold = latent.direction.strength(latent.threshold)
    meta = {
        "model": context.model,
        "seed": context.seed,
        "topic": candidate.prompt.topic,
        "threshold": {"raw": threshold.raw, "norm": threshold.norm},
        "scores": candidate.scores,
    }
    spans = joined(*candidate.parts)
    row = Transcript(
        id=f"steered-{context.seed}-{candidate.number:07d}",
        prompt=candidate.prompt.text,
        spans=spans,
        rejected=None if candidate.plain else rejected_detour(spans, candidate.rest),
        source="steered",
        steering=latent.steering(candidate.norm),
        meta=meta,
    )
    return Outcome(row, trimmed=candidate.trimmed)
