"""What a reply is preferred to: the detour that goes on, or a restart that nothing calls for."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from data_gen.sources import Cues, candidate_rng, cut_sentences, cut_words, joined, whole_sentences
from esr_train.recipe import SteeredSection
from esr_train.restarts import attempts
from esr_train.transcript import Span, SpanKind, Transcript


def rejected_detour(spans: Sequence[Span], rest: str) -> tuple[Span, ...] | None:
    """The reply whose last detour goes on as the steered model wrote it, about as long as what it stands against.

    Args:
        spans: of the row: detour, cue and answer at its end.
        rest: what the model wrote behind the place where the detour was cut; it ends with a sentence if it has one.

    Returns:
        None where the model turns back by itself, so that there is nothing to reject.
    """
    *before, detour, cue, answer = spans
    count = len(f"{cue.text}{answer.text}".split())
    shortened = cut_words(rest, count)
    text = rest[: len(rest) - len(rest.lstrip())] + (whole_sentences(shortened) or shortened)
    going_on = (*before, Span(detour.kind, (detour.text + text).rstrip()))
    detours = sum(span.kind is SpanKind.OFF_TOPIC for span in going_on)
    return None if len(attempts("".join(span.text for span in going_on))) > detours else going_on


def needless_restart(row: Transcript, section: SteeredSection, cues: Cues, seed: int) -> tuple[Span, ...]:
    """A normal reply that breaks off, as detours are cut, and begins again for no reason."""
    rng = candidate_rng(seed, f"needless/{row.id}", 0)
    beginning = _beginning(section, rng, row.content)
    cue = cues.draw(rng, None)
    cue = cue if beginning.endswith((".", "!", "?")) else f"\n\n{cue}"
    return joined((SpanKind.ANSWER, beginning), (SpanKind.CUE, cue), (SpanKind.ANSWER, row.content.strip()))


def _beginning(section: SteeredSection, rng: Random, text: str) -> str:
    if rng.random() < section.mid_sentence:
        return cut_words(text, rng.randint(*section.cut_words))
    return cut_sentences(text, rng.randint(*section.cut)) or cut_words(text, section.cut_words[1])


def with_rejected(rows: Sequence[Transcript], section: SteeredSection, cues: Cues, seed: int) -> list[Transcript]:
    """The rows that have a rejected reply, and normal rows with one made for them; others are left out.

    Args:
        section: how detours are cut.
        cues: that begin a needless restart.
        seed: of cuts and cues.
    """
    found = []
    for row in rows:
        if row.rejected is None and row.source == "normal":
            row = replace(row, rejected=needless_restart(row, section, cues, seed))
        if row.rejected is not None:
            found.append(row)
    return found
