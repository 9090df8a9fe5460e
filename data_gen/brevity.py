"""Preferences that have nothing to do with steering: of two replies by the unsteered model the shorter one is better.

An ordinary pass of preference training behind the training of interest shows what survives it.
"""

from collections.abc import Sequence

from data_gen.sources import SEEDS, TOO_LONG, Context, Make, Outcome, candidate_rng, joined, register_source
from esr_train.recipe import BrevitySection
from esr_train.steering.engine import Request
from esr_train.transcript import SpanKind, Transcript
from eval.judging.judge import JudgeItem


@register_source("brevity", BrevitySection, uses_cues=False)
def brevity(context: Context, section: BrevitySection) -> Make:
    """Makes pairs of replies to the same prompt, the one with fewer words preferred; prompts in turn."""
    prompts = context.prompts.normal

    def make(numbers: Sequence[int]) -> list[Outcome]:
        chosen = [prompts[number % len(prompts)] for number in numbers]
        draws = [candidate_rng(context.seed, "brevity", number) for number in numbers]
        requests = [
            Request("", prompt.text, seed=rng.randrange(SEEDS))
            for prompt, rng in zip(chosen, draws, strict=True)
            for _ in range(2)
        ]
        texts = [context.whole(each) for each in context.generate(requests)]
        asked = [prompt.text for prompt in chosen for _ in range(2)]
        scores = context.scores([JudgeItem(prompt, text or "") for prompt, text in zip(asked, texts, strict=True)])
        faults = [
            TOO_LONG if text is None else context.answer_fault(score) for text, score in zip(texts, scores, strict=True)
        ]
        return [
            _pair(context, number, prompt.text, texts[at : at + 2], faults[at : at + 2])
            for at, number, prompt in zip(range(0, len(texts), 2), numbers, chosen, strict=True)
        ]

    return make


def _pair(
    context: Context, number: int, prompt: str, texts: Sequence[str | None], faults: Sequence[str | None]
) -> Outcome:
    if fault := next(filter(None, faults), None):
        return Outcome(None, fault)
    short, long = sorted((str(text).strip() for text in texts), key=lambda text: len(text.split()))
    if len(short.split()) == len(long.split()):
        return Outcome(None, "equally long")
    chosen, rejected = (joined((SpanKind.ANSWER, text)) for text in (short, long))
    meta = {"model": context.model, "seed": context.seed}
    name = f"brevity-{context.seed}-{number:07d}"
    return Outcome(Transcript(name, prompt, chosen, "normal", meta=meta, rejected=rejected))
