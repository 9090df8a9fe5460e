"""Which tokens of a transcript are trained, shown to a person."""

import re
from collections.abc import Iterator
from itertools import groupby

from esr_train.masking import IGNORED, Labelled

TRAINED, MASKED, END = "\033[32m", "\033[2m", "\033[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """The text without terminal escapes, which a reply may hold and which must not act when it is shown."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def token_texts(labelled: Labelled) -> Iterator[tuple[str, bool, int]]:
    """Each token's text, whether it is trained, and its id.

    Of several tokens that cut up one character, the first has it as text and the others have none.
    """
    position = 0
    for (start, end), label, token in zip(labelled.offsets, labelled.labels, labelled.input_ids, strict=True):
        yield labelled.text[max(start, position) : end], label != IGNORED, token
        position = max(position, end)


def counted(labelled: Labelled) -> str:
    """How many tokens are trained, in words."""
    return f"{labelled.trained} of {len(labelled.labels)} tokens trained, {labelled.straddling} straddling"


def marked(labelled: Labelled, colour: bool) -> str:
    """The rendered text with its trained stretches in green, or in [[double brackets]] without colour.

    Args:
        labelled: from `masking.label`.
        colour: whether to write terminal colours.
    """
    pieces = []
    for trained, group in groupby(token_texts(labelled), key=lambda token: token[1]):
        text = visible("".join(text for text, _, _ in group))
        if colour:
            pieces.append(f"{TRAINED if trained else MASKED}{text}{END}")
        else:
            pieces.append(f"[[{text}]]" if trained else text)
    return "".join(pieces)
