"""JSON and YAML values, read strictly: numbers and keys mean what they say."""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, TypeVar

import yaml
from yaml.constructor import ConstructorError

from esr_train.errors import InputError

Value = TypeVar("Value", str, int, float, bool, dict, list)

MOST_NESTED = 100
"""Levels of lists and objects in a JSON value; what is nested deeper overflows the stack somewhere."""
_KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[{}\[\]]|[^\s"{}\[\],:]++', re.DOTALL)
_NO_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"|[^"\[\]{}]++', re.DOTALL)
_COLON = re.compile(r"\s*:")


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Turn what a parser of values raises (KeyError, TypeError, ValueError) into an `InputError` at a place."""
    try:
        yield
    except KeyError as error:
        raise InputError(f"the key {error} is missing", where) from error
    except (ValueError, TypeError) as error:
        raise InputError(str(error).rstrip("."), where) from error


def typed(row: Mapping[str, Any], key: str, kind: type[Value]) -> Value:
    """The value of a JSON object under a key, if it is of the kind that is asked.

    True is no number, 5.9 no whole one; a whole number is a finite one if a float can hold it.

    Raises:
        KeyError: if the key is missing.
        TypeError: naming the key, for a value of another kind.
    """
    value = row[key]
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        fits = abs(value) <= sys.float_info.max
        value = float(value) if fits else value
    if not fits:
        raise TypeError(f"{key} must be {_KINDS[kind]}, not {shown(value)}")
    return value


def only_keys(row: Mapping[str, Any], keys: Iterable[str], what: str) -> None:
    """Refuse a JSON object with other keys than these: nobody would read them.

    Raises:
        ValueError: naming the first such key.
    """
    other = next((key for key in row if key not in set(keys)), None)
    if other is not None:
        raise ValueError(f"{what} has no key {other!r}, only {', '.join(keys)}")


def shown(value: Any) -> str:
    """A JSON value as a message shows it: cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


def parse_json(text: str) -> Any:
    """The JSON value in a text, read strictly.

    Refused beside what is no JSON: an object with the same key twice, numbers that are not finite (NaN, Infinity,
    1e999), half of a surrogate pair, and more than `MOST_NESTED` levels.

    Raises:
        json.JSONDecodeError: with the place of the fault.
    """
    if text.count("{") + text.count("[") > MOST_NESTED and _depth(text) > MOST_NESTED:
        raise json.JSONDecodeError(f"nested more than {MOST_NESTED} levels deep", text, 0)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except ValueError:  # The hooks do not know where they are.
        raise json.JSONDecodeError(*_fault(text)) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _depth(text: str) -> int:
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in _NO_BRACKET.sub("", text)), default=0)


def _fault(text: str) -> tuple[str, str, int]:
    """The first fault in JSON whose grammar is sound: message, text and place, as JSONDecodeError takes them."""
    keys: list[set[str]] = []
    last = ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "{[":
            keys.append(set())
        elif token in "}]":
            keys.pop()
        elif token.startswith('"'):
            string = json.loads(token)
            half = next((letter for letter in string if "\ud800" <= letter <= "\udfff"), None)
            if half:
                what = f"{ascii(half)[1:-1]} is half of a pair of surrogates and no character"
                return what, text, match.start()
            if _COLON.match(text, match.end()):
                last = string
                if last in keys[-1]:
                    return f"the key {shown(last)} comes twice", text, match.start()
                keys[-1].add(last)
        elif token not in ("true", "false", "null") and not math.isfinite(float(token)):
            return f"{last}: {token[:20]} is no finite number".removeprefix(": "), text, match.start()
    return "it cannot be read", text, 0


class _Loader(yaml.SafeLoader):
    """Safe YAML with the rules of `parse_yaml`."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(node, yaml.CollectionNode) and node.end_mark is None:
            raise ConstructorError(None, None, "the value holds itself", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                what = f"the key {key.value!r} comes twice, first in line {first.start_mark.line + 1}"
                raise ConstructorError(None, None, what, key.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConstructorError(None, None, f"{node.value!r} is no {node.tag} ({error})", node.start_mark) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise ConstructorError(None, None, f"{node.value} is no finite number", node.start_mark)
        return value


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?\Z|[-+]?\.(?:inf|Inf|INF)\Z"
        r"|\.(?:nan|NaN|NAN)\Z"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The YAML value in a text, read strictly.

    `2e-4` is a number (YAML 1.1 takes it for text unless it has a dot); `010`, `0x10`, `1:30` and dates are text (YAML
    1.1 takes them for 8, 16, 90 and objects). Refused: a key twice in a mapping, a number that is not finite.

    Raises:
        yaml.YAMLError: with the place of the fault; a ConstructorError for a fault that is none of grammar.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ConstructorError(None, None, "nested too deeply", None) from None
