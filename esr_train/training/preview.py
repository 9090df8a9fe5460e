"""A labelled row as text in which a person sees what is trained."""

from itertools import groupby

from esr_train.masking import IGNORED
from esr_train.training.dataset import TrainingRow

TRAINED, PLAIN, END = "\033[32m", "\033[2m", "\033[0m"


def preview(row: TrainingRow, colour: bool) -> str:
    """The row's rendered text; trained stretches are green, or in [[double brackets]] without colour.

    Args:
        row: from `read_rows`.
        colour: whether to write terminal colours.
    """
    labelled = row.labelled
    tokens = list(zip(labelled.offsets, labelled.labels, strict=True))
    pieces = []
    for trained, group in groupby(tokens, key=lambda token: token[1] != IGNORED):
        offsets = [offset for offset, _ in group if offset[1] > offset[0]]
        text = labelled.text[offsets[0][0] : offsets[-1][1]] if offsets else ""
        pieces.append(_marked(text, trained, colour))
    head = f"{labelled.id} ({row.source}): {row.trained} of {len(tokens)} tokens are trained"
    return f"{head}\n{''.join(pieces)}"


def _marked(text: str, trained: bool, colour: bool) -> str:
    if colour:
        return f"{TRAINED if trained else PLAIN}{text}{END}"
    return f"[[{text}]]" if trained else text
