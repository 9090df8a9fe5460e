"""Normal rows: unsteered answers by the model itself, so that the adapter learns no other style."""

from collections.abc import Sequence

from data_gen.collect import Make, Outcome, candidate_rng
from data_gen.context import SEEDS, Asked, Context, joined
from esr_train.recipe import NormalSection
from esr_train.transcript import SpanKind, Transcript
from eval.cells import Prompt
from eval.judging.judge import JudgeItem


def normal(context: Context, section: NormalSection, prompts: Sequence[Prompt]) -> Make:
    """Makes unsteered answers, prompts in turn, so that every topic is covered."""

    def make(numbers: Sequence[int]) -> list[Outcome]:
        chosen = [prompts[number % len(prompts)] for number in numbers]
        seeds = [candidate_rng(context.seed, "normal", number).randrange(SEEDS) for number in numbers]
        completions = context.generate([Asked(prompt.text, seed) for prompt, seed in zip(chosen, seeds, strict=True)])
        texts = [completion.text.strip() for completion in completions]
        scores = context.scores([JudgeItem(p.text, text) for p, text in zip(chosen, texts, strict=True)])
        return [
            _outcome(context, section, number, prompt, text, score, completion.finish_reason)
            for number, prompt, text, score, completion in zip(numbers, chosen, texts, scores, completions, strict=True)
        ]

    return make


def _outcome(
    context: Context,
    section: NormalSection,
    number: int,
    prompt: Prompt,
    text: str,
    score: float | None,
    finish: str,
) -> Outcome:
    if finish != "stop":
        return Outcome(None, "answer too long")
    if score is None:
        return Outcome(None, "judge failed")
    if score < section.min_answer_score:
        return Outcome(None, "answer off-topic")
    meta = {"model": context.model, "seed": context.seed, "topic": prompt.topic, "scores": {"answer": score}}
    row = f"normal-{context.seed}-{number:07d}"
    return Outcome(Transcript(row, prompt.text, joined((SpanKind.ANSWER, text)), "normal", meta=meta))
