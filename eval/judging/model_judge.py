"""A language model as judge: it splits and scores responses, and says which recover without a word."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esr_train.restarts import attempts, find_cues
from eval.judging.judge import Attempt, JudgeItem, Judgement
from eval.judging.quotes import locate
from eval.judging.rubric import (
    Parts,
    Split,
    Whole,
    digest,
    parts_question,
    read_answer,
    split_question,
    whole_question,
)
from eval.llm import Answer, Asker, Cache, Llm

_NEAR_WORDS = 3
"""A restart that the model begins at most this many words before the one in the text is the same."""


@dataclass(frozen=True)
class Cut:
    """How the model cut a response: where attempts begin (0 first), their scores, and its other findings."""

    starts: tuple[int, ...]
    scores: tuple[float, ...]
    degenerate: bool
    hijacked: bool | None


class ModelJudge:
    """Asks a language model, and unites its split with the restarts that `find_cues` finds.

    Where the text holds a restart that the model overlooked, the model scores the united parts in a second
    question. A response that stays one attempt is read as a whole in a further one, if the item asks for that:
    `silent_recovery` is a text that strays and returns without a restart. The flag is None, so unscored, where
    that answer failed alone. An empty response scores 0 without being shown to anyone.

    Args:
        llm: who is asked.
        cache: folder of the answers; None keeps none.
        repeat: another number asks anew instead of taking kept answers (how steady is the judge?).
    """

    def __init__(self, llm: Llm, cache: Path | None = None, repeat: int = 0) -> None:
        self._asker = Asker(llm, Cache(cache) if cache else None, repeat, label="judge")
        told = json.dumps([digest(), llm.settings], sort_keys=True)
        again = f"#{repeat}" if repeat else ""
        self.name = f"{llm.name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}{again}"

    @property
    def spent(self) -> str:
        """What was asked so far and what it cost, in words."""
        return f"{self.name}: {self._asker.llm.spent}"

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """One judgement an item; what the model did not answer is an error in it.

        Raises:
            InputError, RunError: if the model cannot be reached at all; see `eval.llm.Llm.ask`.
        """
        shown = [place for place, item in enumerate(items) if item.response.strip()]
        found = dict(zip(shown, self._judge([items[place] for place in shown]), strict=True))
        return [found.get(place) or self._empty(item) for place, item in enumerate(items)]

    def _judge(self, items: list[JudgeItem]) -> list[Judgement]:
        questions = [split_question(item) for item in items]
        cuts = self._asker.ask(questions, lambda place, text: read_cut(items[place], text))
        ranges = [
            united(item.response, cut.value.starts) if cut.value else [] for item, cut in zip(items, cuts, strict=True)
        ]
        parts = self._score_parts(items, cuts, ranges)
        wholes = self._read_wholes(items, cuts, ranges)
        return [
            self._judgement(item, cut, at, parts.get(place), wholes.get(place))
            for place, (item, cut, at) in enumerate(zip(items, cuts, ranges, strict=True))
        ]

    def _score_parts(
        self, items: list[JudgeItem], cuts: list[Answer[Cut]], ranges: list[list[tuple[int, int]]]
    ) -> dict[int, Answer[list[float]]]:
        """Scores for the items whose united attempts are not the ones the model scored."""
        places = [p for p, cut in enumerate(cuts) if cut.value and not _same(cut.value.starts, ranges[p])]
        texts = [[items[place].response[start:end] for start, end in ranges[place]] for place in places]

        def parse(number: int, reply: str) -> list[float]:
            scores = read_answer(reply, Parts).scores
            if len(scores) != len(texts[number]):
                raise ValueError(f"it has {len(scores)} scores for {len(texts[number])} parts")
            return scores

        questions = [parts_question(items[place], parts) for place, parts in zip(places, texts, strict=True)]
        return dict(zip(places, self._asker.ask(questions, parse), strict=True))

    def _read_wholes(
        self, items: list[JudgeItem], cuts: list[Answer[Cut]], ranges: list[list[tuple[int, int]]]
    ) -> dict[int, Answer[Whole]]:
        """The second judgement, for single attempts: with a restart, a recovery is not silent."""
        places = [p for p, cut in enumerate(cuts) if cut.value and items[p].recovery and len(ranges[p]) == 1]
        questions = [whole_question(items[place]) for place in places]
        return dict(zip(places, self._asker.ask(questions, lambda _, text: read_answer(text, Whole)), strict=True))

    def _judgement(
        self,
        item: JudgeItem,
        cut: Answer[Cut],
        ranges: list[tuple[int, int]],
        parts: Answer[list[float]] | None,
        whole: Answer[Whole] | None,
    ) -> Judgement:
        asked: dict[str, Answer[Any] | None] = {"split": cut, "parts": parts, "whole": whole}
        raw = {name: answer.text for name, answer in asked.items() if answer}
        errors = {name: answer.error for name, answer in asked.items() if answer and answer.error}
        told = json.dumps({**raw, "errors": errors} if errors else raw, ensure_ascii=False)
        error = cut.error or (parts.error if parts else None)
        if error or not cut.value:
            return Judgement((), self.name, told, error=error or "no answer")
        scores = parts.value if parts and parts.value else cut.value.scores
        flags: dict[str, bool | None] = {"degenerate": cut.value.degenerate}
        if item.label:
            flags["hijacked"] = cut.value.hijacked
        if len(ranges) > 1:
            flags["silent_recovery"] = False
        elif whole:
            flags["silent_recovery"] = whole.value.strays and whole.value.returns if whole.value else None
        scored = tuple(Attempt(*at, score) for at, score in zip(ranges, scores, strict=True))
        return Judgement(scored, self.name, told, flags)

    def _empty(self, item: JudgeItem) -> Judgement:
        flags: dict[str, bool | None] = {"degenerate": False, "silent_recovery": False}
        if item.label:
            flags["hijacked"] = False
        return Judgement((Attempt(0, len(item.response), 0.0),), self.name, "", flags)


def read_cut(item: JudgeItem, reply: str) -> Cut:
    """Read the answer to `split_question` and find every attempt in the response.

    Raises:
        ValueError: for an answer of another form, or a quotation that is not in the response.
    """
    answer = read_answer(reply, Split)
    if item.label and answer.hijacked is None:
        raise ValueError("hijacked: field required")
    starts = [0]
    for attempt in answer.attempts[1:]:
        start = locate(attempt.begins, item.response, starts[-1] + 1)
        if start is None:
            words = attempt.begins[:80]
            raise ValueError(f"no attempt can begin with {words!r}: these words do not follow in the text")
        starts.append(start)
    return Cut(tuple(starts), tuple(each.score for each in answer.attempts), answer.degenerate, answer.hijacked)


def united(response: str, starts: Sequence[int]) -> list[tuple[int, int]]:
    """Attempts that begin wherever the model or a restart pattern says; two words for one restart are one.

    Args:
        starts: where the model's attempts begin, the first at 0.
    """
    cues = find_cues(response)
    begins = {start for start, _ in attempts(response)}
    for start in starts[1:]:
        cue = next((cue for cue in cues if _is_same(response, start, cue)), None)
        if cue and cue[0] in begins:
            begins.remove(cue[0])
        earliest = start if cue is None else min(start, cue[0])
        begins.add(earliest if response[:earliest].strip(" \t\n*_#>-(") else 0)
    ordered = sorted(begins)
    return list(zip(ordered, [*ordered[1:], len(response)], strict=True))


def _is_same(response: str, start: int, cue: tuple[int, int]) -> bool:
    """Whether the model's attempt begins at this cue: within it, right after it, or just before."""
    if start < cue[0]:
        return len(response[start : cue[0]].split()) <= _NEAR_WORDS
    return not response[cue[1] : start].strip()


def _same(starts: Sequence[int], ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether uniting has left the model's attempts as they were, so that its scores are theirs."""
    return len(starts) == len(ranges) and all(
        start <= mine < end for (start, end), mine in zip(ranges, starts, strict=True)
    )
