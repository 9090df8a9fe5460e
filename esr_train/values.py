"""JSON and YAML values, read strictly: numbers and keys mean what they say."""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from enum import EnumType
from functools import lru_cache
from itertools import accumulate
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from yaml.constructor import ConstructorError

from esr_train.errors import InputError

Value = TypeVar("Value")

MOST_NESTED = 100
"""Levels of lists and objects in a value; what is nested deeper overflows the stack somewhere."""
_CALLED = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"} | {
    kind: "a list" for kind in (list, tuple)
}
_TOKEN = re.compile(
    r'"(?:[^"\\]++|\\.)*+"|[{}\[\]]|NaN|-?Infinity|-?[0-9]++(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?', re.DOTALL
)
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


def typed(kind: type[Value], value: Any, name: str = "") -> Value:
    """A JSON value as what is asked for, and nothing else: true is no number, and 5.9 no whole one.

    Args:
        kind: a dataclass (a key whose field has a default may be missing, an unknown one may not be there), or what its
            fields are made of: str, int, float, bool, list, dict, enums, `Literal[...]`, `X | None`, `tuple[...]`,
            `Mapping[str, ...]`, Any.
        value: as `parse_json` gives it.
        name: of the key that holds it.

    Raises:
        ValueError: naming the key.
    """
    made: Value = _typed(kind, value, name)
    return made


def _typed(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        inner = next(part for part in arguments if part is not NoneType)
        return None if value is None else _typed(inner, value, name)
    if is_dataclass(kind) and isinstance(value, dict):
        return kind(**_fields_of(kind, value, f"{name}." if name else ""))  # type: ignore[operator]
    if origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            return tuple(_typed(kinds[i], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin in (Mapping, dict) and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    known = arguments if origin is Literal else tuple(kind) if isinstance(kind, EnumType) else None
    if known:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name} is none of {', '.join(known)}: {shown(value)}")
        return value if origin is Literal else kind(value)
    if kind is Any or (type(value) is kind and kind is not float):
        return value
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return value
    raise ValueError(f"{name or 'this'} is not {_CALLED.get(origin or kind, 'an object')}: {shown(value)}")


def _fields_of(kind: Any, value: dict[str, Any], before: str) -> dict[str, Any]:
    kinds, required = _fields(kind)
    if unknown := sorted(value.keys() - kinds.keys()):
        raise ValueError(f"there is no key {before + unknown[0]!r}, only {', '.join(kinds)}")
    if missing := sorted(required - value.keys()):
        raise ValueError(f"the key {before + missing[0]!r} is missing")
    return {key: _typed(kinds[key], item, before + key) for key, item in value.items()}


@lru_cache
def _fields(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """The fields' types, and the names of those without a default."""
    plain = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    return get_type_hints(kind), plain


def shown(value: Any) -> str:
    """A JSON value as a message shows it: cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


def parse_json(text: str, whole_pairs: bool = True) -> Any:
    """The JSON value in a text, read strictly.

    Refused beside what is no JSON: an object with the same key twice, numbers that are not finite (NaN, Infinity,
    1e999), more than `MOST_NESTED` levels, and, with `whole_pairs`, half of a surrogate pair.

    Raises:
        json.JSONDecodeError: with the place of the fault.
    """
    if text.count("{") + text.count("[") > MOST_NESTED and _depth(text) > MOST_NESTED:
        raise json.JSONDecodeError(f"nested more than {MOST_NESTED} levels deep", text, 0)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
        if whole_pairs and ("\\ud" in text or "\\uD" in text):
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
        elif not math.isfinite(float(token)):
            return f"{last}: {token[:20]} is no finite number".removeprefix(": "), text, match.start()
    return "it cannot be read", text, 0


class _Loader(yaml.SafeLoader):
    """Safe YAML with the rules of `parse_yaml`."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MOST_NESTED:
            what = f"nested more than {MOST_NESTED} levels deep"
            raise ConstructorError(None, None, what, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
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
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise ConstructorError(None, None, f"{shown(str(node.value))} is no {node.tag}", node.start_mark) from None
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
    1.1 takes them for 8, 16, 90 and objects). Refused: a key twice in a mapping, a number that is not finite, more than
    `MOST_NESTED` levels.

    Raises:
        yaml.YAMLError: with the place of the fault; a ConstructorError for a fault that is none of grammar.
    """
    return yaml.load(text, _Loader)
