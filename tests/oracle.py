"""The lexical judge behind a language model's mask: it reads the rubric's questions and answers in their form."""

import json
import re

from eval.judging.judge import JudgeItem, Judgement
from eval.judging.lexical import LexicalJudge
from tests.llm_stub import Messages

_SECTION = re.compile(r"<<<(?P<name>[A-Z]+(?: \d+)?) (?P<mark>\w{8})\n(?P<text>.*?)\n(?P=mark) (?P=name)>>>", re.DOTALL)
_LABEL = re.compile(r'pulled the text towards "(.*?)"\. That')


def sections(question: str) -> dict[str, str]:
    """The marked texts of a question, by their names."""
    return {match["name"]: match["text"] for match in _SECTION.finditer(question)}


class Oracle:
    """Answers as `LexicalJudge` would, in the form of whichever question it is asked.

    Args:
        judge: decides.
        overlooks: whether it reports every response as one attempt, as a judge does that misses restarts.
    """

    def __init__(self, judge: LexicalJudge, overlooks: bool = False) -> None:
        self.judge, self.overlooks = judge, overlooks

    def __call__(self, messages: Messages) -> str:
        question = messages[-1]["content"]
        found, label = sections(question), _LABEL.search(question)
        prompt = found.pop("QUESTION")
        if "TEXT" not in found:
            scores = [self._judged(prompt, part).attempts[0].score for part in found.values()]
            return json.dumps({"scores": [round(score or 0) for score in scores]})
        judged = self._judged(prompt, found["TEXT"], label[1] if label else None)
        if '"course"' in question:
            recovers = judged.flags["silent_recovery"]
            return json.dumps({"course": "as the words say", "strays": recovers, "returns": recovers})
        return json.dumps(self._split(found["TEXT"], judged))

    def _judged(self, prompt: str, text: str, label: str | None = None) -> Judgement:
        return self.judge.judge([JudgeItem(prompt, text, label)])[0]

    def _split(self, text: str, judged: Judgement) -> dict[str, object]:
        attempts = [
            {"begins": " ".join(text[each.start : each.end].split()[:8]), "score": round(each.score or 0)}
            for each in judged.attempts
        ]
        flags = {name: judged.flags[name] for name in ("degenerate", "hijacked") if name in judged.flags}
        return {"attempts": attempts[:1] if self.overlooks else attempts, **flags}
