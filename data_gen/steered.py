"""On-policy rows: steer, cut, cue, correct; and their contrast, steered rows that stay on topic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from data_gen.collect import Make, Outcome, candidate_rng
from data_gen.context import SEEDS, Asked, Context, SteerableLatent, cut_sentences, cut_words, joined, other_topic
from esr_train.errors import InputError
from esr_train.files import read_text
from esr_train.models import local_path
from esr_train.recipe import ContrastSection, SteeredSection
from esr_train.steering.engine import Completion
from esr_train.transcript import SpanKind, Transcript
from eval.cells import Prompt
from eval.judging.attempts import attempts
from eval.judging.judge import JudgeItem

CUES = Path(__file__).parent / "cues.txt"


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

    @property
    def text(self) -> str:
        return "".join(span.text for span in joined(*self.parts))


def read_cues(path: str | None) -> list[str]:
    """Cues, one a line; the shipped set for None."""
    file = (local_path(path) or path) if path else CUES
    cues = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not cues:
        raise InputError("there is no cue in the file", path, "Write one cue a line.")
    return cues


def steered(
    context: Context, section: SteeredSection, prompts: Sequence[Prompt], latents: Sequence[SteerableLatent]
) -> Make:
    """Makes detours under steering, each followed by a cue and by the same model's unsteered answer."""
    cues = read_cues(section.cues)

    def make(numbers: Sequence[int]) -> list[Outcome]:
        drawn = [_draw(context, "steered", number, prompts, latents, section.strength) for number in numbers]
        _detour(context, section, drawn)
        for candidate in drawn:
            candidate.parts.append((SpanKind.CUE, _cue(cues, candidate)))
        again = [each for each in drawn if not each.reason and each.rng.random() < section.second_detour]
        _detour(context, section, again)
        for candidate in again:
            candidate.parts.append((SpanKind.CUE, _cue(cues, candidate)))
        _answer(context, section.min_answer_score, drawn)
        return [_outcome(context, "steered", candidate) for candidate in drawn]

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
    strength: tuple[float, float],
) -> _Candidate:
    rng = candidate_rng(context.seed, source, number)
    prompt = rng.choice(prompts)
    latent = rng.choice(other_topic(prompt, latents))
    return _Candidate(number, rng, prompt, latent, latent.threshold * rng.uniform(*strength), [], {})


def _asked(context: Context, candidate: _Candidate) -> Asked:
    return Asked(
        candidate.prompt.text,
        candidate.rng.randrange(SEEDS),
        prefix=candidate.text,
        interventions=(candidate.latent.direction.add(candidate.norm, context.positions),),
    )


def _detour(context: Context, section: SteeredSection, candidates: list[_Candidate]) -> None:
    """Let the steered model write on, and cut it after some sentences; refuse what is still on topic."""
    going = [candidate for candidate in candidates if not candidate.reason]
    completions = context.generate([_asked(context, candidate) for candidate in going], section.max_new_tokens)
    for candidate, completion in zip(going, completions, strict=True):
        text = _cut(section, candidate.rng, completion)
        candidate.parts.append((SpanKind.OFF_TOPIC, text))
        if not text:
            candidate.reason = "detour empty"
        elif len(attempts(candidate.text)) > sum(kind is SpanKind.OFF_TOPIC for kind, _ in candidate.parts):
            candidate.reason = "detour restarts by itself"
    _keep_scored(context, going, "off_topic", lambda score: score < section.max_detour_score, "detour on-topic")


def _cut(section: SteeredSection, rng: Random, completion: Completion) -> str:
    """Some sentences of a detour, or some words where it is cut in mid-sentence or its sentences run on."""
    count = rng.randint(*map(int, section.cut))
    text = cut_sentences(completion.text, count)
    endless = completion.finish_reason == "length" and text == completion.text.strip()
    if endless or len(text.split()) > section.cut_words[1] or rng.random() < section.mid_sentence:
        return cut_words(text, rng.randint(*map(int, section.cut_words)))
    return text


def _cue(cues: Sequence[str], candidate: _Candidate) -> str:
    """A cue; after a detour that was cut in mid-sentence it opens a new paragraph."""
    cue = candidate.rng.choice(cues)
    return cue if candidate.text.endswith((".", "!", "?")) else f"\n\n{cue}"


def _answer(context: Context, least: float, candidates: list[_Candidate]) -> None:
    """Let the same model, unsteered and without the detour before its eyes, answer the prompt."""
    going = [candidate for candidate in candidates if not candidate.reason]
    asked = [Asked(candidate.prompt.text, candidate.rng.randrange(SEEDS)) for candidate in going]
    for candidate, completion in zip(going, context.generate(asked), strict=True):
        candidate.parts.append((SpanKind.ANSWER, completion.text.strip()))
        if completion.finish_reason != "stop":
            candidate.reason = "answer too long"
    _keep_scored(context, going, "answer", lambda score: score >= least, "answer off-topic")


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
    threshold = candidate.latent.direction.strength(candidate.latent.threshold)
    return Outcome(
        Transcript(
            id=f"{name}-{context.seed}-{candidate.number:07d}",
            prompt=candidate.prompt.text,
            spans=joined(*candidate.parts),
            source="steered",
            steering=candidate.latent.steering(candidate.norm),
            meta={
                "model": context.model,
                "seed": context.seed,
                "topic": candidate.prompt.topic,
                "threshold": {"raw": threshold.raw, "norm": threshold.norm},
                "scores": candidate.scores,
            },
        )
    )
