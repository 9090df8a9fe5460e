"""A judge that needs no key: how much likelier the question makes a text than a question about nothing does."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from esr_train.errors import InputError
from esr_train.recipe import LikelihoodJudgeSection
from esr_train.restarts import sentences
from esr_train.steering.engine import Engine, Request, Scorer
from eval.judging.judge import Attempt, JudgeContext, JudgeItem, Judgement, register_judge
from eval.judging.prose import bodies, degenerate, novelty, recovers

Asked = tuple[str, str]
"""A prompt, and a text that may answer it."""
NEUTRAL = "Write something."
"""The question about nothing."""
ABOUT = "Tell me about {label}."
"""The question that a hijacked text answers."""
NONE, FULL = 0.1, 0.4
"""Nats a token that the question must add for a passage to score more than 0, and to score 100."""
LEAST_WORDS, MOST_WORDS = 8, 32
"""Words of a passage: a shorter sentence is read together with the next, a longer one in pieces."""
UNLIKELY = -4.0
"""Nats a token below which a passage is word salad, whatever the question."""
REPEATED = 0.2
"""Share of a passage that may have been said before without a loss: names of what a text is about come again."""
ROUND = 0.3
"""Share of an attempt that has been said before from which it goes round in circles."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Passage:
    """A sentence, or several short ones, as the model reads it.

    Args:
        question: log-probability (nats) of the passage as the beginning of a reply to the question.
        neutral: the same as a reply to the question about nothing.
        new: share of it that the attempt has not said before, see `novelty`.
    """

    text: str
    tokens: int
    question: float
    neutral: float
    new: float

    @property
    def is_salad(self) -> bool:
        """Whether it is hardly language."""
        return max(self.question, self.neutral) < UNLIKELY * self.tokens

    @property
    def score(self) -> float:
        """How far it answers the question, 0-100; what was said before, and word salad, counts as nothing."""
        if self.is_salad:
            return 0.0
        added = ((self.question - self.neutral) / self.tokens - NONE) / (FULL - NONE)
        return 100 * min(max(added, 0.0), 1.0) * min(self.new / (1 - REPEATED), 1.0)


class LikelihoodJudge:
    """Scores attempts by their pointwise mutual information with the question under a model that nobody steers.

    Each passage (a sentence; short ones together, long ones in pieces) is scored by itself, as if the reply began
    with it, so that text which drifts away cannot live on its beginning: log p(passage | question) - log p(passage |
    "Write something."), a token. An attempt's score is the mean of its passages' scores, weighted with their tokens.
    Cue sentences are left out; an unfinished last sentence counts with the tokens that it has. What the attempt has
    said before counts as nothing, and so does word salad. The constants: `benchmarks/results/judges.md`.

    Args:
        model: its name, for the judge's own.
        open_engine: an engine on it, asked for at each call; nothing steers it.
    """

    def __init__(self, model: str, open_engine: Callable[[], Engine]) -> None:
        rules = json.dumps([model, NEUTRAL, ABOUT, NONE, FULL, LEAST_WORDS, MOST_WORDS, UNLIKELY, REPEATED, ROUND])
        self.name = f"likelihood-{Path(model).name}-{hashlib.sha256(rules.encode()).hexdigest()[:8]}"
        self._open_engine = open_engine

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """One judgement an item.

        Raises:
            InputError: if the model's chat template does not take a prompt.
            RunError: if the model's logits are not finite.
        """
        read = self.read(items)
        about = self._about(items, read)
        return [self._judgement(*each) for each in zip(items, read, about, strict=True)]

    def read(self, items: Sequence[JudgeItem]) -> list[list[list[Passage]]]:
        """The passages of each attempt of each response, as the model reads them."""
        said = [[passages(body.text) for body in bodies(item.response)] for item in items]
        texts = [[text for attempt in each for text in attempt] for each in said]
        asked = [(item.prompt, text) for item, those in zip(items, texts, strict=True) for text in those]
        found = self._log_probabilities(asked + [(NEUTRAL, text) for _, text in asked])
        return [
            [_read(item.prompt, attempt, found) for attempt in each] for item, each in zip(items, said, strict=True)
        ]

    def _about(self, items: Sequence[JudgeItem], read: Sequence[Sequence[Sequence[Passage]]]) -> list[float | None]:
        """Log-probability of each last attempt as a reply about the label; None where nobody asks or it can be seen."""
        asked = [
            [(ABOUT.format(label=item.label), passage.text) for passage in each[-1]]
            if item.recovery and item.label and attempt_score(each[-1]) < 50
            else []
            for item, each in zip(items, read, strict=True)
        ]
        found = self._log_probabilities([pair for pairs in asked for pair in pairs])
        return [sum(sum(found[pair]) for pair in pairs) if pairs else None for pairs in asked]

    def _log_probabilities(self, asked: Sequence[Asked]) -> dict[Asked, tuple[float, ...]]:
        return log_probabilities(self._open_engine(), asked) if asked else {}

    def _judgement(self, item: JudgeItem, read: Sequence[Sequence[Passage]], about: float | None) -> Judgement:
        parts = bodies(item.response)
        flags: dict[str, bool | None] = {
            "degenerate": any(map(is_degenerate, read)),
            "silent_recovery": recovers([[passage.score for passage in attempt] for attempt in read]),
        }
        if item.recovery and item.label:
            flags["hijacked"] = about is not None and _is_hijacked(read[-1], about)
        scored = tuple(Attempt(*part.range, attempt_score(attempt)) for part, attempt in zip(parts, read, strict=True))
        return Judgement(scored, self.name, _as_raw(read), flags)


def log_probabilities(engine: Engine, asked: Sequence[Asked]) -> dict[Asked, tuple[float, ...]]:
    """(Prompt, text) -> log-probability (nats) of each token of the text at the beginning of a reply, each read once.

    Args:
        engine: that scores texts; nothing steers it.
        asked: prompts and texts, which may come more than once.

    Raises:
        InputError: if the model's chat template does not take a prompt.
        RunError: if the model's logits are not finite.
    """
    assert isinstance(engine, Scorer)
    pairs = list(dict.fromkeys(asked))
    requests = [Request(str(number), prompt) for number, (prompt, _) in enumerate(pairs)]
    return dict(zip(pairs, engine.log_probabilities(requests, [text for _, text in pairs]), strict=True))


def passages(text: str) -> list[str]:
    """The passages of an attempt: its sentences, short ones together, long ones in pieces of about equal length."""
    ranges: list[tuple[int, int]] = []
    short = False
    for start, end in sentences(text):
        if short:
            start = ranges.pop()[0]
        ranges.append((start, end))
        short = len(_WORD.findall(text[start:end])) < LEAST_WORDS
    if short and len(ranges) > 1:
        _, end = ranges.pop()
        ranges[-1] = (ranges[-1][0], end)
    return [piece for start, end in ranges for piece in _pieces(text[start:end])]


def _pieces(sentence: str) -> list[str]:
    words = list(re.finditer(r"\S+", sentence))
    count = math.ceil(len(words) / MOST_WORDS)
    borders = [round(number * len(words) / count) for number in range(count + 1)]
    return [sentence[words[first].start() : words[last - 1].end()] for first, last in pairwise(borders)]


def attempt_score(attempt: Sequence[Passage]) -> float:
    """0-100; an attempt without a passage scores 0."""
    tokens = sum(passage.tokens for passage in attempt)
    return round(sum(passage.tokens * passage.score for passage in attempt) / tokens, 2) if tokens else 0.0


def is_degenerate(attempt: Sequence[Passage]) -> bool:
    """Whether an attempt goes round in circles, or is word salad by more than half."""
    tokens = sum(passage.tokens for passage in attempt)
    salad = sum(passage.tokens for passage in attempt if passage.is_salad)
    new = sum(passage.tokens * passage.new for passage in attempt)
    whole = " ".join(passage.text for passage in attempt)
    return salad > tokens / 2 or new < (1 - ROUND) * tokens or degenerate(whole)


def _is_hijacked(attempt: Sequence[Passage], about: float) -> bool:
    """Whether an attempt is likelier as a reply about the label than as one to the question or to none."""
    return about > max(sum(passage.question for passage in attempt), sum(passage.neutral for passage in attempt))


def _read(prompt: str, attempt: Sequence[str], found: dict[tuple[str, str], tuple[float, ...]]) -> list[Passage]:
    return [
        Passage(text, len(found[prompt, text]), sum(found[prompt, text]), sum(found[NEUTRAL, text]), new)
        for text, new in zip(attempt, novelty(attempt), strict=True)
    ]


def _as_raw(read: Sequence[Sequence[Passage]]) -> str:
    """For a person to check: tokens, nats a token with and without the question, and score of every passage."""
    told = [
        [
            {
                "text": passage.text,
                "tokens": passage.tokens,
                "question": round(passage.question / passage.tokens, 3),
                "neutral": round(passage.neutral / passage.tokens, 3),
                "score": round(passage.score, 1),
            }
            for passage in attempt
        ]
        for attempt in read
    ]
    return json.dumps(told, ensure_ascii=False)


@register_judge("likelihood", LikelihoodJudgeSection)
def _open_likelihood(section: LikelihoodJudgeSection, context: JudgeContext) -> LikelihoodJudge:
    model = section.model or context.model
    if model is None:
        raise InputError("the judge's model is missing", f"{context.key}.model", "Name a folder or a hub id.")
    return LikelihoodJudge(model, lambda: context.open_engine(model))
