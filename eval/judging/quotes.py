"""Where a quotation stands in a text, though the one who quotes may have changed case, marks or white space."""

import re
from difflib import SequenceMatcher

_WORD = re.compile(r"[^\W_]+")
_LEAST_WORDS = 3
_LIKENESS = 0.8


def locate(quote: str, text: str, start: int = 0) -> int | None:
    """The first character at or after `start` where the quotation begins, or None.

    It is looked for as it is; then word by word, blind to case, punctuation and mark-up; then, if it has three
    words or more, as the run of words most like it (a word changed, left out or put in).
    """
    exact = re.compile(rf"(?<!\w){re.escape(quote.strip())}(?!\w)").search(text, start) if quote.strip() else None
    if exact:
        return exact.start()
    wanted = [_plain(match[0]) for match in _WORD.finditer(quote)]
    found = list(_WORD.finditer(text, start))
    words = [_plain(match[0]) for match in found]
    if not wanted:
        return None
    for at in range(len(words) - len(wanted) + 1):
        if words[at : at + len(wanted)] == wanted:
            return _opening(text, found[at].start(), start)
    place = _most_alike(wanted, words) if len(wanted) >= _LEAST_WORDS else None
    return None if place is None else _opening(text, found[place].start(), start)


def _most_alike(wanted: list[str], words: list[str]) -> int | None:
    """Where the run of words begins that is most like the wanted one, None if none is like enough."""
    best, place = _LIKENESS, None
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(" ".join(wanted))
    for at in range(len(words)):
        # A run must begin as the quotation does, or with its second word: where it begins is all that is asked.
        if words[at] not in wanted[:2]:
            continue
        matcher.set_seq1(" ".join(words[at : at + len(wanted)]))
        if matcher.real_quick_ratio() > best and (ratio := matcher.ratio()) > best:
            best, place = ratio, at
    return place


def _opening(text: str, at: int, start: int) -> int:
    """`at`, or the opening marks right before it (quotation marks, brackets, mark-up)."""
    while at > start and text[at - 1] in "*_#>([\"'“‘":
        at -= 1
    return at


def _plain(word: str) -> str:
    return word.casefold()
