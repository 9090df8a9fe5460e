"""How likely a restart is at every sentence end: a reading that needs far fewer trials than counting restarts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from esr_train.errors import InputError
from esr_train.files import read_lines
from esr_train.restarts import sentences
from esr_train.steering.engine import Request, Scorer

MOST_ENDS = 6
"""Sentence ends read in one response, from its beginning."""
BEFORE = (" ", "\n\n")
"""What may stand between a sentence and the phrase: a model turns back on the same line, or in a new paragraph."""
CHUNK = 4096
"""Texts scored in one call of the engine."""


def read_phrases(path: Path | str) -> tuple[str, ...]:
    """Restart phrases, one a line; a [heading], as files of cues have them, is none.

    Raises:
        InputError: if the file is missing or empty.
    """
    phrases = tuple(dict.fromkeys(line for _, line in read_lines(path) if not line.startswith(("[", "#"))))
    if not phrases:
        raise InputError("the file holds no phrase", str(path), "Write restart phrases, one a line.")
    return phrases


def restart_reader(
    scorer: Scorer, phrases: Sequence[str]
) -> Callable[[Sequence[Request], Sequence[str]], list[list[list[float]]]]:
    """What reads, for each request and first attempt, [characters, log-probability] at the attempt's sentence ends.

    The log-probability (nats) is that of any of the phrases coming next, behind a space or a blank line, the request's
    interventions at work. No phrase should be the beginning of another: it would count twice.
    """
    continuations = [f"{before}{phrase}" for before in BEFORE for phrase in phrases]

    def read(requests: Sequence[Request], firsts: Sequence[str]) -> list[list[list[float]]]:
        ends = [[end for _, end in sentences(text)[:MOST_ENDS]] for text in firsts]
        asked = [
            (replace(request, id=f"{request.id} / {end} / {number}", prefix=text[:end]), continuation)
            for request, text, places in zip(requests, firsts, ends, strict=True)
            for end in places
            for number, continuation in enumerate(continuations)
        ]
        scores: list[float] = []
        for start in range(0, len(asked), CHUNK):
            part = asked[start : start + CHUNK]
            scores += map(sum, scorer.log_probabilities([request for request, _ in part], [text for _, text in part]))
        width = len(continuations)
        groups = iter([scores[start : start + width] for start in range(0, len(scores), width)])
        return [[[end, round(float(np.logaddexp.reduce(next(groups))), 4)] for end in places] for places in ends]

    return read
