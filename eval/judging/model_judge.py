"""A language model as judge: it splits and scores responses, and says which recover without a word."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

import eval.judging.rubric as rubric
from esr_train.recipe import LocalJudgeSection, ModelJudgeSection
from esr_train.restarts import LEADING_MARKS, Range, attempts, find_cues
from eval.judging.judge import Attempt, JudgeContext, JudgeItem, Judgement, register_judge
from eval.judging.replies import read_reply
from eval.llm import LEDGER, Answer, Asker, EngineLlm, InspectLlm, Ledger, Llm

Value = TypeVar("Value")
_NEAR_WORDS = 3
"""A restart that the model begins at most this many words before the one in the text is the same."""


@dataclass(frozen=True)
class Cut:
    """How the model cut a response: where attempts begin (0 first), their scores, and its other findings."""

    starts: tuple[int, ...]
    scores: tuple[float, ...]
    degenerate: bool
    hijacked: bool | None


@dataclass
class _Case:
    """A response on its way through the questions: the answers so far, and its attempts once it was cut."""

    item: JudgeItem
    cut: Answer[Cut] = field(default_factory=lambda: Answer(None))
    ranges: Sequence[Range] = ()
    parts: Answer[tuple[float, ...]] | None = None
    recovers: Answer[bool] | None = None

    def texts(self) -> list[str]:
        return [self.item.response[start:end] for start, end in self.ranges]


class ModelJudge:
    """Asks a language model, and unites its split with the restarts that `find_cues` finds.

    Where the text holds a restart that the model overlooked, the model scores the united parts in a second
    question. A response that stays one attempt is read as a whole in a further one, if the item asks for that:
    `silent_recovery` is a text that strays and returns without a restart. The flag is None, so unscored, where
    that answer failed alone. An empty response scores 0 without being shown to anyone.

    Args:
        cache: folder of the answers; None keeps none.
        repeat: another number asks anew instead of taking kept answers (how steady is the judge?).
        ledger: of requests and costs; None counts in memory.
    """

    def __init__(self, llm: Llm, cache: Path | None = None, repeat: int = 0, ledger: Ledger | None = None) -> None:
        self.name = judge_name(llm, repeat)
        self.asker = Asker(llm, ledger or Ledger(llm.name), cache, repeat, label="judge")

    @property
    def spent(self) -> str:
        """What was asked so far and what it cost, in words."""
        return f"{self.name}: {self.asker.ledger.spent}"

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """One judgement an item; what the model did not answer is an error in it.

        Raises:
            InputError, RunError: if the model cannot be reached at all, or the limit is reached; see `eval.llm`.
        """
        shown = [_Case(item) for item in items if item.response.strip()]
        cuts = self._ask(shown, lambda case: rubric.split_question(case.item), _read_split, rubric.Split)
        for case, cut in zip(shown, cuts, strict=True):
            case.cut, case.ranges = cut, united(case.item.response, cut.value.starts) if cut.value else ()
        recut = [case for case in shown if case.cut.value and not _same(case.cut.value.starts, case.ranges)]
        parts = self._ask(recut, lambda case: rubric.parts_question(case.item, case.texts()), _read_parts, rubric.Parts)
        for case, scores in zip(recut, parts, strict=True):
            case.parts = scores
        # With a restart, a recovery is not silent.
        single = [case for case in shown if case.item.recovery and len(case.ranges) == 1]
        wholes = self._ask(single, lambda case: rubric.whole_question(case.item), _read_whole, rubric.Whole)
        for case, recovers in zip(single, wholes, strict=True):
            case.recovers = recovers
        cases = iter(shown)
        return [self._judgement(next(cases)) if item.response.strip() else self._empty(item) for item in items]

    def _ask(
        self,
        cases: Sequence[_Case],
        question: Callable[[_Case], str],
        read: Callable[[_Case, dict[str, Any]], Value],
        form: type[BaseModel],
    ) -> list[Answer[Value]]:
        def parse(index: int, reply: str) -> Value:
            item = cases[index].item
            return read_reply(reply, partial(read, cases[index]), f"{item.prompt}\n{item.response}")

        return self.asker.ask([question(case) for case in cases], parse, form)

    def _judgement(self, case: _Case) -> Judgement:
        item, cut, parts = case.item, case.cut, case.parts
        asked: dict[str, Answer[Any] | None] = {"split": cut, "parts": parts, "whole": case.recovers}
        raw: dict[str, Any] = {name: answer.text for name, answer in asked.items() if answer}
        if errors := {name: answer.error for name, answer in asked.items() if answer and answer.error}:
            raw["errors"] = errors
        told = json.dumps(raw, ensure_ascii=False)
        error = cut.error or (parts.error if parts else None)
        if error or not cut.value:
            return Judgement((), self.name, told, error=error or "no answer")
        scores = parts.value if parts and parts.value else cut.value.scores
        flags: dict[str, bool | None] = {"degenerate": cut.value.degenerate}
        if item.label:
            flags["hijacked"] = cut.value.hijacked
        if len(case.ranges) > 1:
            flags["silent_recovery"] = False
        elif case.recovers:
            flags["silent_recovery"] = case.recovers.value
        scored = tuple(Attempt(*at, score) for at, score in zip(case.ranges, scores, strict=True))
        return Judgement(scored, self.name, told, flags)

    def _empty(self, item: JudgeItem) -> Judgement:
        flags: dict[str, bool | None] = {"degenerate": False, "silent_recovery": False}
        if item.label:
            flags["hijacked"] = False
        return Judgement((Attempt(0, len(item.response), 0.0),), self.name, "", flags)


def judge_name(llm: Llm, repeat: int) -> str:
    """A name that tells apart models, their settings, what they are asked, and repeats."""
    told = json.dumps([rubric.digest(), llm.settings], sort_keys=True)
    again = f"#{repeat}" if repeat else ""
    return f"{llm.name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}{again}"


@register_judge("model", ModelJudgeSection)
def _open_model(section: ModelJudgeSection, context: JudgeContext) -> ModelJudge:
    llm = InspectLlm(section.model, section.temperature, context.llm.concurrency)
    if context.is_asked:
        llm.check()
    # Each process counts in a file of its own.
    name = re.sub(r"[^A-Za-z0-9.#-]+", "_", judge_name(llm, section.repeat))
    file = context.run / "requests" / f"{name}-{os.getpid()}{LEDGER}" if context.run else None
    return ModelJudge(llm, context.cache, section.repeat, Ledger(section.model, context.llm, file, context.run))


@register_judge("local", LocalJudgeSection)
def _open_local(section: LocalJudgeSection, context: JudgeContext) -> ModelJudge:
    open_engine = partial(context.open_engine, section.model)
    llm = EngineLlm(section.model, open_engine, section.temperature or 0.0, section.repeat)
    return ModelJudge(llm, context.cache, section.repeat)


def read_cut(item: JudgeItem, values: dict[str, Any]) -> Cut:
    """The answer to `split_question`, every attempt found in the response.

    Raises:
        ValueError: for an answer of another form, or a quotation that is not in the response.
    """
    answer = rubric.filled(rubric.Split, values)
    if item.label and answer.hijacked is None:
        raise ValueError("hijacked: field required")
    first, *others = (attempt.begins for attempt in answer.attempts)
    if not rubric.begins_at(first, item.response):
        raise ValueError(f"the first attempt begins with the first words of the text, not with {first[:80]!r}")
    starts = [0]
    for words in others:
        start = rubric.locate(words, item.response, starts[-1] + 1)
        if start is None:
            raise ValueError(f"no attempt can begin with {words[:80]!r}: these words do not follow in the text")
        starts.append(start)
    scores = tuple(float(attempt.score) for attempt in answer.attempts)
    return Cut(tuple(starts), scores, answer.degenerate, answer.hijacked)


def _read_split(case: _Case, values: dict[str, Any]) -> Cut:
    return read_cut(case.item, values)


def _read_parts(case: _Case, values: dict[str, Any]) -> tuple[float, ...]:
    scores = tuple(map(float, rubric.filled(rubric.Parts, values).scores))
    if len(scores) != len(case.ranges):
        raise ValueError(f"it has {len(scores)} scores for {len(case.ranges)} parts")
    return scores


def _read_whole(_: _Case, values: dict[str, Any]) -> bool:
    answer = rubric.filled(rubric.Whole, values)
    return answer.strays and answer.returns


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
        begins.add(earliest if response[:earliest].strip(LEADING_MARKS) else 0)
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
