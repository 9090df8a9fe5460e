"""Ways to damage a file: bytes, keys, numbers, control tokens, odd letters, nesting, encodings, lines of 10 MB."""

import contextlib
import gzip
import re
from collections.abc import Callable
from random import Random

TOKENS = [
    *("<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<|eom_id|>"),
    *("<|finetune_right_pad_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<pad>"),
    *("<start_of_turn>", "<end_of_turn>", "<unused7>", "<｜end▁of▁sentence｜>", "[INST]"),
]
NUMBERS = [
    *("NaN", "Infinity", "-Infinity", ".nan", ".inf", "1e999", "-1e999", "1e308", "9" * 30, "9" * 400, "9" * 5000),
    *("5.9", "-1", "0", "true", "false", "null", '"5"', "[5]", "{}", "1_0", "010", "0x1F", "1:30", "+5", "5.", ".5"),
]
ODD = [
    *("\u2028", "\x85", "\x0c", "\r", "\r\n", "\0", "\ufeff", "\x1b[2J", "\ud7ff", "😀", "é", "ﬁ", "\u202e", '"', "'"),
    *("\\", "\\ud800", "\\udfff", "\\u0000", ",", ":", "{", "}", "[", "]", "\n", "\n\n", "\t", "---", "&a ", "*a "),
    *("!!int ", "# ", "\u3000", "<<: "),
]


def flipped(data: bytes, rng: Random) -> bytes:
    """A few bytes changed."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(data: bytes, rng: Random) -> bytes:
    """The end, or a stretch in the middle, is gone."""
    start = rng.randrange(len(data))
    return data[:start] + (data[start + rng.randrange(1, 40) :] if rng.random() < 0.5 else b"")


def _texts(change: Callable[[str, Random], str]) -> Callable[[bytes, Random], bytes]:
    return lambda data, rng: change(data.decode(), rng).encode("utf-8", "surrogatepass")


def _replaced(text: str, pattern: str, rng: Random, new: Callable[[str], str]) -> str:
    matches = list(re.finditer(pattern, text))
    if not matches:
        return text
    match = rng.choice(matches)
    return text[: match.start()] + new(match[0]) + text[match.end() :]


@_texts
def key_dropped(text: str, rng: Random) -> str:
    """A key with its value, a column, or a whole line is gone."""
    pattern = rng.choice(
        (r'"\w+": (?:"(?:[^"\\]|\\.)*"|[\w.+-]+|\[[^\[\]]*\]|\{[^{}]*\})(?:, )?', r"(?m)^[^\n]*\n", r"[\w ]+,")
    )
    return _replaced(text, pattern, rng, lambda _: "")


@_texts
def key_doubled(text: str, rng: Random) -> str:
    """A key comes twice with another value, or a line comes twice."""
    if rng.random() < 0.5:
        return _replaced(text, r"(?m)^[^\n]*\n", rng, lambda line: line * 2)
    other = rng.choice(('"other"', "7", "null", "{}"))
    return _replaced(text, r'"?[\w ]+"?(?:: |,)', rng, lambda key: f"{key}{other}, {key}" if ":" in key else key * 2)


@_texts
def number_changed(text: str, rng: Random) -> str:
    """A number, or another value, is not finite, huge, of another kind."""
    new = rng.choice(NUMBERS)
    pattern = rng.choice(
        (r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])", r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])", r'"[^"]*"(?=[,}\]])')
    )
    return _replaced(text, pattern, rng, lambda _: new)


@_texts
def token_inserted(text: str, rng: Random) -> str:
    """A control token, or white space behind one, somewhere in the text."""
    place = rng.randrange(len(text) + 1)
    token = rng.choice(TOKENS) + rng.choice(("", "", "\\n", " "))
    if rng.random() < 0.5:  # Where it may look like the end of a reply.
        return _replaced(text, r'(?:<\|eot_id\|>|<end_of_turn>|[.?!])(?=")', rng, lambda end: end + token)
    return text[:place] + token + text[place:]


@_texts
def odd_letter(text: str, rng: Random) -> str:
    """A letter, escape or sign that some readers stumble over."""
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice(ODD) * rng.choice((1, 1, 3)) + text[place:]


@_texts
def nested(text: str, rng: Random) -> str:
    """A value lies deep in lists or objects."""
    depth = rng.choice((20, 99, 101, 300, 900, 5000, 60_000))
    left, right = rng.choice((("[", "]"), ('{"a": ', "}")))
    inside = left * depth + "1" + right * rng.choice((depth, depth, depth - 1, 0))
    return _replaced(text, r'"[^"]*"(?=[,}\]])|(?<=: )[\w.]+', rng, lambda _: inside)


def packed(data: bytes, rng: Random) -> bytes:
    """In another encoding or with other line ends."""
    text = data.decode()
    return rng.choice(
        (text.encode("utf-16"), text.encode("utf-32"), b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"),
         data.replace(b"\n", b"\r"), gzip.compress(data), b"", b"\n", data * 2, data.rstrip(b"\n"))
    )  # fmt: skip


@_texts
def lengthened(text: str, rng: Random) -> str:
    """A line of 10 MB."""
    place = rng.randrange(len(text) + 1)
    more = rng.choice(
        ("x", " ", "[", "{", '"', "\\", "9", "<|eot_id|>", "<eos> ", "x ", "é", "\\u00e9", "\u2028", "0.1, ")
    )
    return text[:place] + more * (10_000_000 // len(more)) + text[place:]


DAMAGES = (flipped, cut, key_dropped, key_doubled, number_changed, token_inserted, odd_letter, nested, packed)


def damaged(data: bytes, rng: Random, long_lines: float = 0.0) -> bytes:
    """A copy with one to three damages, now and then one of them a line of 10 MB."""
    if rng.random() < long_lines:
        return lengthened(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(UnicodeDecodeError):  # After a damage of bytes there is no text left to damage.
            data = rng.choice(DAMAGES)(data, rng) or b"\n"
    return data
