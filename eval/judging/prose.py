"""What several judges and filters read off a text's form: attempts without their cues, repetition, loops."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from esr_train.restarts import Range, attempts, find_cues

ON_TOPIC, OFF_TOPIC = 80.0, 50.0
"""A silent recovery: its first third of sentences scores below the one, its last third at least the other."""
REPETITION = 0.5
"""Most of a text's word triples that it may have said before."""
TRIPLE = 3
"""Words in a row that a text says again."""
LEAST_TEXT = 0.5
"""Share of letters and digits among the visible characters below which a text is none."""
LOOP = re.compile(r"([^\W_]{1,4}?)\1{9,}")
"""One to four letters ten times in a row."""
_WORD_OR_MARKS = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class Body:
    """An attempt's range in the response, and its text without the cue that it begins with."""

    range: Range
    text: str


def bodies(response: str) -> list[Body]:
    """The attempts of a response, in order."""
    cues = find_cues(response)
    found = []
    for start, end in attempts(response):
        begin = next((stop for cue, stop in cues if start <= cue and stop <= end), start)
        found.append(Body((start, end), response[begin:end]))
    return found


def recovers(scores: Sequence[Sequence[float]]) -> bool:
    """Whether a response recovers without a word: one attempt, off topic in its first third, on topic in its last.

    Args:
        scores: of the sentences of each attempt, 0-100.
    """
    if len(scores) != 1 or len(scores[0]) < 3:
        return False
    third = len(scores[0]) // 3
    return sum(scores[0][:third]) / third < OFF_TOPIC and sum(scores[0][-third:]) / third >= ON_TOPIC


def degenerate(text: str) -> bool:
    """Whether a text goes round in circles or is no text at all."""
    visible = [character for character in text if not character.isspace()]
    if sum(map(str.isalnum, visible)) < LEAST_TEXT * len(visible) or LOOP.search(text):
        return True
    return repetition(text) > REPETITION


def repetition(text: str) -> float:
    """Share of a text's word triples that it has said before, 0 to 1."""
    triples = grams(words(text), TRIPLE)
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def novelty(texts: Sequence[str]) -> list[float]:
    """The share of each text's runs of three words or marks that neither it nor one before has said, 0 to 1."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for text in texts:
        said = grams(_WORD_OR_MARKS.findall(text.casefold()), TRIPLE)
        new = set(said) - seen
        found.append(len(new) / len(said) if said else 1.0)
        seen |= new
    return found


def words(text: str) -> list[str]:
    """The words of a text, blind to case."""
    return re.findall(r"\w+", text.casefold())


def grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Every run of so many words."""
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
