"""The JSON object in a language model's reply: its answer, and not the first thing that looks like one."""

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from esr_train.values import parse_json

Value = TypeVar("Value")
_OBJECT = re.compile(r'\{(?=\s*["}])')
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_STRING_OR_BRACE = re.compile(rf"{_STRING.pattern}|[{{}}]", re.DOTALL)
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_THOUGHT = r"(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad|analysis)"
_THOUGHT_BEGINS = re.compile(rf"<\s*{_THOUGHT}\s*>|\[{_THOUGHT}\]|<\|channel\|>analysis\b", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(rf"<\s*/\s*{_THOUGHT}\s*>|\[/{_THOUGHT}\]|<\|channel\|>final\b", re.IGNORECASE)
_NONE = "there is no whole JSON object in it"


def read_reply(reply: str, parse: Callable[[dict[str, Any]], Value], shown: str = "") -> Value:
    """The value of the one JSON object in a reply that `parse` accepts; prose and code fences around it do not matter.

    Nothing counts that stands in the model's reasoning, or that the question showed to the model: a text under test may
    hold a verdict. Raw line ends within strings are accepted.

    Args:
        parse: raises ValueError for an object it cannot use.
        shown: texts of the question that are not its form: an object that stands there is a quotation.

    Raises:
        ValueError: saying what is wrong with the reply, for the model to read.
    """
    if not reply.strip():
        raise ValueError("it is empty")
    objects, problems = _objects(_without_reasoning(reply))
    quoted, _ = _objects(shown)
    values: list[Value] = []
    for each in objects:
        try:
            if each in quoted:
                raise ValueError("its JSON object is a quotation of the text shown")
            value = parse(each)
        except ValueError as error:
            problems.append(str(error))
        else:
            values += [value] if value not in values else []
    if len(values) > 1:
        raise ValueError(f"it holds {len(values)} different answers where one JSON object is asked for")
    if not values:
        raise ValueError(problems[0] if problems else _NONE)
    return values[0]


def _without_reasoning(reply: str) -> str:
    """What stands behind the model's reasoning; tags within JSON strings are text, not tags."""
    outside = _QUOTED.sub(lambda match: " " * len(match[0]), reply)
    begin = max((match.end() for match in _THOUGHT_ENDS.finditer(outside)), default=0)
    if _THOUGHT_BEGINS.search(outside, begin):
        raise ValueError("its reasoning was cut off, so that no answer follows it")
    return reply[begin:]


def _objects(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The JSON objects of a text, without those within others, and what is wrong with the ones that are broken."""
    found: list[dict[str, Any]] = []
    problems, at = list[str](), 0
    while match := _OBJECT.search(text, at):
        end = _end(text, match.start())
        if end is None:
            problems.append(f"{_NONE}: it is cut off")
            break
        try:
            found.append(parse_json(_STRING.sub(_on_one_line, text[match.start() : end])))
        except json.JSONDecodeError as error:
            near = error.doc[max(error.pos - 20, 0) : error.pos + 10]
            problems.append(f"{_NONE}: it is broken near {near!r} ({error.msg})")
        at = end
    return found, problems


def _end(text: str, start: int) -> int | None:
    """Where the braces that open at `start` are closed again, None if they are not."""
    depth = 0
    for match in _STRING_OR_BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def _on_one_line(string: re.Match[str]) -> str:
    return string[0].replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
