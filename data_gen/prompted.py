"""Off-policy rows: a detour that the model would not have written here, a cue, and the model's own answer."""

from collections.abc import Sequence

from data_gen.collect import Make, Outcome, candidate_rng
from data_gen.context import SEEDS, Asked, Context, cut_sentences, joined
from data_gen.cues import read_cues
from data_gen.draws import draw_count
from esr_train.recipe import PromptedSection
from esr_train.transcript import SpanKind, Transcript
from eval.cells import Prompt
from eval.judging.judge import JudgeItem


def prompted(context: Context, section: PromptedSection, prompts: Sequence[Prompt]) -> Make:
    """Makes rows whose detour is the model's unsteered answer to a question about another topic."""
    cues = read_cues(section.cues, section.registers)

    def make(numbers: Sequence[int]) -> list[Outcome]:
        rngs = [candidate_rng(context.seed, "prompted", number) for number in numbers]
        chosen = [rng.choice(prompts) for rng in rngs]
        others = [
            rng.choice([each for each in prompts if each.topic != prompt.topic])
            for rng, prompt in zip(rngs, chosen, strict=True)
        ]
        asked = [
            Asked(each.text, rng.randrange(SEEDS))
            for prompts_ in (others, chosen)
            for each, rng in zip(prompts_, rngs, strict=True)
        ]
        texts = [completion.text.strip() for completion in context.generate(asked)]
        detours = [
            cut_sentences(text, draw_count(rng, section.cut))
            for text, rng in zip(texts[: len(rngs)], rngs, strict=True)
        ]
        answers = texts[len(rngs) :]
        scores = context.scores([JudgeItem(p.text, d) for p, d in zip(chosen, detours, strict=True)])
        finals = context.scores([JudgeItem(p.text, a) for p, a in zip(chosen, answers, strict=True)])
        return [
            outcome(
                context,
                section,
                f"prompted-{context.seed}-{number:07d}",
                prompt,
                other.topic,
                (detour, cues.draw(rng, other.topic), answer),
                scored,
            )
            for number, prompt, other, detour, rng, answer, scored in zip(
                numbers, chosen, others, detours, rngs, answers, zip(scores, finals, strict=True), strict=True
            )
        ]

    return make


def outcome(
    context: Context,
    section: PromptedSection,
    row: str,
    prompt: Prompt,
    subject: str,
    texts: Sequence[str],
    scores: tuple[float | None, float | None],
) -> Outcome:
    """A row of detour, cue and answer, whoever wrote them, or why it is refused.

    Args:
        context: of the run.
        section: with the limits of the scores, and the writer, if there is one.
        row: the row's id.
        prompt: that is answered.
        subject: of the detour.
        texts: detour, cue and answer.
        scores: of detour and answer; None where the judge failed.
    """
    detour, answer = scores
    if detour is None or answer is None:
        return Outcome(None, "judge failed")
    if detour >= section.max_detour_score:
        return Outcome(None, "detour on-topic")
    if answer < section.min_answer_score:
        return Outcome(None, "answer off-topic")
    kinds = (SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER)
    meta = {
        "model": section.writer.model if section.writer else context.model,
        "seed": context.seed,
        "topic": prompt.topic,
        "subject": subject,
        "scores": {"off_topic": detour, "answer": answer},
    }
    return Outcome(Transcript(row, prompt.text, joined(*zip(kinds, texts, strict=True)), "prompted", meta=meta))
