"""Where, in text that follows a detour, turning back ends and the answer begins."""

import re

_PIECE = re.compile(r"\s*\S.*?(?:[.!?…]+[\"')*]*(?=\s)|:[*]*(?=\s)|(?=\n)|\Z)", re.DOTALL)
_RESTART = re.compile(
    r"\b(?:wait|hold on|hang on|sorry|apolog\w+|oops|whoops|scratch that|my mistake|correction|no,|stop\b"
    r"|correct myself|never ?mind|actually|on second thought"
    r"|(?:not|n[’']t) (?:\w+ )?(?:right|correct|relevant|related|make sense|answer|what you)"
    r"|wrong (?:topic|track|question|subject|thing)|off[- ](?:track|topic|course|subject|on a)|off the rails"
    r"|side-?track\w*|tangent|stray\w*|drift\w*|wander\w*|digress\w*|rambl\w*|mixed up|confus\w+|carried away"
    r"|los(?:t|ing) (?:the thread|focus|track)|start(?:ing)? over|begin again|try (?:that |this |it )?again"
    r"|you (?:\w+ )?(?:asked|wanted)|your (?:\w+ )?(?:question|request)|back (?:on|to))\b",
    re.IGNORECASE,
)
_ABOUT_ITSELF = re.compile(
    r"\b(?:I|I[’'](?:ll|m|ve)|[Mm]y|[Ll]et me|[Ll]et[’']s|[Yy]ou (?:\w+ )?(?:asked|wanted)"
    r"|[Yy]our (?:\w+ )?(?:question|request))\b"
)
_ANSWERS = re.compile(r"\s*(?:to\b|I(?:[’']d)? (?:recommend|suggest))", re.IGNORECASE)


def split_cue(text: str) -> int | None:
    """How many characters of `text` take the detour back; the rest answers.

    The cue ends with the last of the leading sentences (or half sentences before a colon) that take something
    back or announce the answer in the first person. Words cut off by the detour's end may precede it.

    Returns:
        The cue's length, or None where neither of the first two sentences takes anything back.
    """
    pieces = list(_PIECE.finditer(text))
    first = next((i for i, piece in enumerate(pieces[:2]) if _RESTART.search(piece[0])), None)
    if first is None:
        return None
    last = first
    while last + 1 < len(pieces) and _goes_on(pieces[last + 1][0]):
        last += 1
    return pieces[last].end()


def _goes_on(sentence: str) -> bool:
    return bool(_ABOUT_ITSELF.search(sentence)) and not _ANSWERS.match(sentence)
