"""A row source: detours are lines of a text file, taken back by a cue and followed by the model's own answer.

plugins: [examples/plugins/source.py]
data: {planted: {rows: 100, texts: my/detours.txt}}
"""

from collections.abc import Sequence
from pathlib import Path

from data_gen.sources import SEEDS, Context, Make, Outcome, candidate_rng, joined, register_source
from esr_train.recipe import SourceSection
from esr_train.steering.engine import Request
from esr_train.transcript import SpanKind, Transcript


class PlantedSection(SourceSection):
    """Its keys under `data.planted`, beside `rows`; each has a default, for most recipes have no such rows."""

    texts: str = "detours.txt"


@register_source("planted", PlantedSection)
def planted(context: Context, section: PlantedSection) -> Make:
    """What candidate number i becomes depends on i alone: an interrupted run goes on as if it was not."""
    texts = Path(section.texts).read_text(encoding="utf-8").splitlines()

    def make(numbers: Sequence[int]) -> list[Outcome]:
        drawn = [candidate_rng(context.seed, "planted", number) for number in numbers]
        prompts = [rng.choice(context.prompts.train) for rng in drawn]
        pairs = zip(prompts, drawn, strict=True)
        completions = context.generate([Request("", prompt.text, seed=rng.randrange(SEEDS)) for prompt, rng in pairs])
        answers = [completion.text.strip() for completion in completions]
        outcomes = []
        for number, rng, prompt, answer in zip(numbers, drawn, prompts, answers, strict=True):
            detour, cue = rng.choice(texts), context.cues.draw(rng, None)
            spans = joined((SpanKind.OFF_TOPIC, detour), (SpanKind.CUE, cue), (SpanKind.ANSWER, answer))
            row = Transcript(f"planted-{context.seed}-{number}", prompt.text, spans, "prompted")
            outcomes.append(Outcome(row) if answer else Outcome(None, "no answer"))
        return outcomes

    return make
