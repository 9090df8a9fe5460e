"""The grammar of restarts: where a text takes something back, where the next attempt begins, where a cue ends.

Two questions, two sets of patterns. `find_cues` asks where in a whole response a restart begins: it must not take
instructions for restarts ("Wait. Then stir."), so its patterns are narrow. `split_cue` asks where, in text that is
known to follow a detour, the restart ends and the answer begins: its patterns are broad.

For `find_cues` sentences are of four kinds. An *opener* takes something back by itself ("Oops, I drifted off."). A
*weak* one does so only when more follows ("Wait." before "You asked about sails."). A *follower* goes on with a restart
that has begun ("You asked about sails.") and means nothing alone. All else is text. Patterns are anchored where a
sentence starts, or a clause after a dash or dots.
"""

import re

Range = tuple[int, int]
"""Start and end of a stretch of text, in characters, end excluded."""
LEADING_MARKS = " \t\n*_#>-("
"""What may stand before the first word of a response without being text."""

_END = re.compile(r"[.!?…]+[\"')\]”*_]*(?=\s|$)|\n+")
_BREAK = re.compile(r"\s*(?:—|–|--|\s-\s|\.\.\.|…|;)\s*|,\s+(?:and |but )?(?=(?:wait|hold on|oops|scratch)\b)", re.I)
_MARKUP = r"[*_#>(\s]*(?:-\s+)?"
_FILLER = (
    r"(?:(?:oh dear|oh no|dear me|oh|ah|um+|uh+|erm?|okay|ok|well|so|but|and|anyway|anyhow|now|right|alright|yikes|huh"
    r"|hm+|whoa|goodness)\b[\s,.…!—–-]*)*"
)
_STOP = r"\s*(?:[,.!?:;…—–-]|$)"
_MOMENT = r"(?:just )?(?:wait|hold on|hang on|hold up|one moment|one second|a moment|a second)"
_WHILE = r"(?: (?:just )?a (?:minute|moment|second|sec|bit))?"
_OBJECT = r"(?:your|the|this|that|my|its)? ?(?:actual |real |original |first |right |main )?"
_ASKED = rf"(?:{_OBJECT}(?:question|topic|subject|point|task|request|prompt|matter)|what you (?:asked|wanted)|track)"
_OFF = r"off (?:the )?(?:topic|track|course|subject|point|question|rails|on a tangent|into|to)"
_THAT = (
    r"(?:that|this|all (?:of )?(?:that|this)|none of (?:that|this)|what i (?:just )?(?:said|wrote|described)"
    r"|the (?:above|last part)|my (?:last )?(?:answer|reply|response|last sentences?))"
)
_IS = r"(?:'s| is| was| are| were| seems| looks)"
_SELF = r"(?:i|we)"
_WILL = (
    r"(?:let me|let's|let us|allow me to|i(?:'ll| will| should| must| need to| have to| ought to| want to|'d better)"
    r"|we should|time to|please let me|may i|better)"
)
_AGAIN = (
    r"(?:try (?:(?:that|this|it) )?(?:again|once more|anew)(?! with| in| after| until)|(?:start|begin)(?: (?:this|that"
    r"|it))? (?:over|again|afresh|anew|fresh|from scratch)|restart\b|rewind|re-?(?:do|write|work) (?:that|this|it\b|my"
    r"|the (?:list|answer|reply))|backtrack|back up|re-?focus|reset\b(?! the)|correct (?:that|this|myself|my|course)"
    r"|fix (?:that|my)|rephrase|re-?read|reconsider|set (?:that|this) (?:right|straight)|stop (?:there|here|myself"
    r"|this|talking)|take (?:that|it) back|get on track|leave (?:that|this) aside|(?:go|get|come|turn|steer(?: this)?"
    rf"|bring (?:this|us|it)) back{_STOP}|(?:(?:go|get|come|turn|steer(?: this)?|bring (?:this|us|it)) back"
    r"|return) (?:to|on|onto) (?!you\b|\d|work\b|normal|this later|(?:our|the) (?:example|equation|step|beginning"
    r"|previous))|answer (?:what you|(?:your|the) (?:actual|real|original|right))|(?:actually|properly|really) answer)"
)
_STRAYED = (
    r"(?:(?:got|getting|went|gone|going|was|am|been|drifted|drifting|wandered|wandering|strayed|straying|slipped"
    r"|slipping|slid|veered|veering|wound up|ended up|moved|steered|pulled) (?:completely |a bit |quite |way |totally "
    rf"|far )?(?:{_OFF}|sidetracked|side-tracked|distracted|carried away|off{_STOP}|away(?: from|{_STOP})"
    r"|into (?:talking|writing|another|the wrong|a different|something)|to (?:another|the wrong|a different)"
    r"|off (?:there|again|on (?:a|an|the|another|some))\b|into [\w' -]{1,40} (?:there|again|instead)\b|from (?:your"
    r"|the) (?:question|topic|subject))|digress|rambl(?:ed|ing)|stray(?:ed|ing)|drift(?:ed|ing)\b(?! off to| to sleep)"
    r"|lost (?:the thread|my (?:train of thought|thread|place)|in [\w' -]{1,20}[.!]|my way|focus|the plot|track of)"
    r"|(?:mis(?:read|understood|took|spoke))|mixed (?:up|things)|got (?:mixed up|confused)|confused (?:the|your|two)"
    r"|(?:was|were|am|been|started|began|kept|keep) (?:just )?(?:talking|writing|telling you|speaking|rambling"
    r"|going on) (?:about|on)|(?:was|am) (?:describing|explaining|answering)(?: (?:the wrong|another|a different"
    r"|something))|(?:made|gave) (?:a|an|the) (?:mistake|error|wrong|slip)|switched (?:topics?|subjects?)"
    r"|changed the subject|(?:keep|kept) (?:wandering|drifting|straying|digressing))"
)
_HEDGE = (
    r"(?:(?:seem|seemed|appear) to (?:have|be)|think(?: that)? i(?:'ve| have)?|believe i(?:'ve| have)?|(?:realize"
    r"|realise|notice|see|fear|admit)d?(?: now)?(?: that)? i(?:'ve| have)?|must have|may have|might have|have|had|'ve"
    r"|'m|just|somehow|got|clearly|do|completely|also)"
)
_WRONG = (
    r"(?:n't| not)? ?(?:quite |at all |really |entirely |completely |the )*(?:right|correct|wrong|incorrect|mistaken"
    r"|a mistake|an error|nonsense)"
)

_OPENERS = (
    rf"{_MOMENT}{_WHILE}(?:, | )*(?:wait)?\s*(?:[,!?…—–]|\.\.\.)(?!\s*(?:then|please|and|until|till|for|at|about|while"
    r"|or|watch|let (?!me)|if|but))",
    rf"(?:wait|hold on|hang on){_WHILE},? (?:no\b|i (?:was|am|got|drift|think|have|went)|that(?:'s| is| was| isn't)"
    r"|this (?:is|isn't)|sorry|actually|let me|what am)",
    r"(?:oops|whoops|oopsie)\b(?!-| of\b)",
    r"stop,\s+(?:that|this|i|no|wait)\b",
    rf"(?:my bad|my mistake|my error){_STOP}",
    r"(?:scratch|strike|ignore|disregard|forget|never mind) (?:all )?(?:that|this|the above|what i (?:just )?(?:said"
    rf"|wrote)|(?:that |the |my )?(?:last|previous|preceding) (?:part|bit|line|remark|paragraph|sentence)s?){_STOP}",
    r"(?:sorry,? )?(?:please |kindly )*(?:ignore|disregard|forget) (?:the (?:part|bit|remark|line)s? about\b|(?:that"
    r"|the|my) (?:last |previous )?(?:part|bit|line|remark|paragraph|sentence)s?[.!,])",
    r"(?:that|the|my) (?:last|previous) (?:part|bit|line|remark|paragraph|sentence)s? (?:came|made|makes|was|is|did"
    r"|does|had|has|went)\b",
    r"correction\s*[:,—]|on second thou?ghts?\b|i stand corrected|i take (?:that|it) back",
    r"(?:i(?:'m| am) )?(?:so |very |really |terribly )?sorry,? (?:about|for) (?:all )?(?:that|this|the (?:confusion"
    r"|mix-?up|tangent|detour|digression|mistake|error|drift|ramble)|(?:getting|going|wandering|drifting|losing"
    r"|rambling|talking|straying)|my (?:mistake|error|confusion|rambling))",
    r"(?:i(?:'m| am) )?(?:so |very |really |terribly )?sorry\s*[,.!:;—–…-]+\s*(?:but )?(?:i\b(?! can't| cannot"
    r"| can not| don't| do not| won't| couldn't| am (?:unable|late)|'m late)|that\b|this (?:is|was)|let me|let's|wait"
    r"|no\b|you asked|your question|back to|wrong|actually|where was|what was)",
    r"sorry,? (?:i'm |that's |i was )?(?:again |way |completely )?off (?:track|topic|course)",
    r"(?:pardon|excuse) me(?:[.!…—–]|,? (?:for\b|that was|i (?:got|was|am|went|lost|drift|stray|have|seem|mis)))",
    r"(?:please )?(?:excuse|forgive|pardon) (?:the|that|this|my) (?:detour|digression|tangent|confusion|rambling|slip"
    r"|mix-?up|interruption|mistake|error|drift)",
    rf"(?:my |sincere )*(?:apologies|i apologi[sz]e|forgive me)(?:{_STOP}| for | about |$)(?![^.!?\n]*(?:inconvenience"
    r"|delay|late\b|trouble caused|interrupt))",
    rf"no\b[\s,.!…—–-]*(?:no\b|wait(?! for| until| till| an? |\s+\d)|sorry|(?:that|this)(?:{_IS}(?: not)?|n't|isn't"
    r"| isn't| wasn't)|not that|i was|scratch)",
    rf"actually,? (?:let me|wait|no\b|sorry|hold on|scratch|{_THAT}(?:{_IS}| isn't| wasn't| doesn't)|i (?:got|was|am"
    r"|drift|should|need to|meant|mis|think i|seem|started|went)|you (?:asked|wanted)|your question|the question"
    r"|back to|going back)",
    rf"(?:hm+|no|oh|wait|actually|yikes|huh|um+|uh+)\b[\s,.…!—–-]*{_THAT}(?:{_IS}| isn| wasn| doesn| does| can)",
    rf"{_WILL} (?:just |quickly |please |now |simply |try to |stop and |first )*{_AGAIN}",
    rf"{_SELF} ?(?:{_HEDGE} ?){{0,4}}{_STRAYED}",
    r"(?:ah|oh|hm+|wait)\b[\s,.!…—–-]*you (?:meant|were asking|asked|wanted)\b",
    r"i(?:'m| am) (?:supposed|meant) to (?:be )?(?:answer|explain|talk|tell|writ|describ|help)",
    r"i(?:'ve| have) (?:just |somehow |now )*(?:started|begun|been) (?:explain|describ|writ|talk|list|tell)ing",
    r"i(?: was| am|'m|'ve been| have been) [^.!?\n]*\binstead of (?:answering|helping|what you)",
    r"i (?:did not|didn't) mean to (?:talk|write|go|bring|describe|drift|wander)",
    r"i (?:have to|must|should|need to) stop (?:myself|here|there)",
    r"[\w' -]{1,40} (?:has|have) no place (?:in this|here)\b",
    r"i (?:should|was (?:supposed|meant)|ought)(?: to)? (?:be|have been) (?:talking|writing|answering|explaining"
    r"|telling|helping)",
    rf"{_THAT}(?:{_IS}| isn| wasn)(?:n't|'t| not)? (?:\w+ ){{0,3}}?(?:what you (?:asked|wanted|were|need)|{_OFF}"
    r"|off-topic|beside the point|a tangent|a digression|a detour|the wrong (?:answer|topic|subject|question|thing)"
    r"|about [a-z' -]{1,40}?(?:,? (?:and )?not\b|\binstead\b)|an answer to|answering|unrelated|irrelevant"
    r"|relevant to your)",
    r"none of (?:this|that) (?:helps|answers|addresses|makes sense|(?:is|was) (?:about|relevant|useful|what))",
    rf"(?:i (?:realize|realise|notice|see|think|know) (?:that )?)?{_THAT} (?:has |had |is |was )(?:just |completely "
    rf"|all )*(?:gone|going|wandered|wandering|drifted|drifting|strayed|straying|veered|veering) (?:{_OFF}|off\b)",
    rf"{_THAT} (?:answers? your|(?:has|had|have) (?:nothing|little|no bearing)|(?:does|did|do)(?:n't| not) (?:really "
    r"|actually |even |quite )?(?:answer|address|help with your|fit (?:your|the)|match (?:your|the)|belong (?:here"
    rf"|in\b)|sound right|seem right|make (?:any )?sense|look right)|(?:went|got|drifted|came out|goes|ran) (?:{_OFF}"
    r"|wrong|off))",
    r"(?:you (?:had |have |'d )?(?:asked|wanted|were asking)|(?:your|the) (?:actual |original )?question (?:was|is"
    r"|asks))[^.!?\n]*?(?:,? (?:and )?not (?:about|for|how|what|to)?\b|\brather than\b|\binstead of\b)",
    r"(?:so |now )?where was i\s*[?.!…,—–]|what (?:was|am) i (?:saying|doing|talking|writing)|(?:why|how) (?:am i"
    r"|did i (?:get|end))|something (?:is|went|seems|feels) (?:off|wrong) (?:here|there|with (?:my|this|that))",
    r"(?:(?:to |let's |let me )?(?:go|get|come|going|getting|coming|turn|turning|return|returning) )?(?:back "
    rf"|returning |return )(?:to|on) {_ASKED}",
    rf"(?:enough|no more) (?:about|of) [\w' -]{{1,40}}{_STOP}|enough (?!said|already|is\b|time)[\w-]+[.!]+$",
    r"wrong [\w-]+,? sorry|(?:starting|beginning) (?:over|again|afresh|anew|fresh)\s*[.:,—–]",
    r"(?:now )?to (?:actually|properly|really) answer|as for (?:your|the) (?:actual|original|real) question",
    r"(?:now )?(?:on )?to (?:your|the) (?:actual|original|real) question",
    r"that was (?:the wrong|a wrong)|wrong (?:topic|subject|question|answer|track)\b",
)
_FILLED = (r"(?:anyway|anyhow|right|okay|ok|so),? (?:let's get )?back to [\w' -]{1,40}[.:,!—]",)
_WEAK = (
    rf"{_MOMENT}{_WHILE}[.!]*$|(?:no|stop|sorry|hm+|huh|ah|oh|uh|um+)[.!…]*$",
    rf"{_THAT}(?:{_IS}|isn| isn| wasn)(?:'t)?{_WRONG}",
    rf"{_THAT}{_IS}(?: all)? about \w|that was [\w' -]{{1,30}}[.!]*$",
    r"(?:this|that|it) (?:has |had |just )*(?:turned into|turning into|become|became)\b",
    r"not \w+(?: \w+){0,3}[.!]*$",
)
_FOLLOWERS = (
    r"you (?:had |have |'d |did )?(?:asked?|wanted|were asking|want(?:ed)? to know)",
    r"(?:your|the) (?:actual |original |real )?(?:question|topic|subject) (?:was|is|asks|asked|concerns)",
    r"(?:let me|let's|i(?:'ll| will| should)|allow me to|here(?:'s| is| are)|this is) (?:now |please |try to "
    r"|give you |then |instead |just |go |the |a |an |my )*(?:answer|reply|focus|talk|explain|return|address|tell"
    r"|stick|stay|continue|proceed|help|describe|do (?:that|better|it)|begin|start|real|actual|proper|correct|right"
    r"|better)",
    r"(?:back to|returning to|now for|now to|about|on to|instead,? (?:about|let)) [\w' -]{1,40}[.:!…]*$",
    r"(?:i|we) (?:should|was|am|meant|will|'ll|do not know|don't know|must|need) ",
    r"(?:that|this) (?:was|is|has|had|does|did|should|part)(?:n't)?\b[^.!?]*(?:question|asked|topic|subject|answer"
    r"|mistake|about)",
    r"(?:continuing|carrying on|moving on) with [\w' -]{1,40}[.:!…]*$",
    r"(?:here we go|once more|again|from the top|now,? (?:then|properly)|properly this time)[.:!,]*$",
)


def _compiled(patterns: tuple[str, ...], lead: str) -> re.Pattern[str]:
    return re.compile(lead + "(?:" + "|".join(f"(?:{pattern})" for pattern in patterns) + ")", re.IGNORECASE)


_OPENER = _compiled((*(_FILLER + pattern for pattern in _OPENERS), *_FILLED), _MARKUP)
_WEAK_OPENER = _compiled(_WEAK, _MARKUP + _FILLER)
_FOLLOWER = _compiled(_FOLLOWERS, _MARKUP + _FILLER)

_PIECE = re.compile(r"\s*\S.*?(?:[.!?…]+[\"')*]*(?=\s)|:[*]*(?=\s)|(?=\n)|\Z)", re.DOTALL)
_TAKES_BACK = re.compile(
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


def sentences(text: str) -> list[Range]:
    """The sentences of `text`, in order, without the white space between them; line ends end sentences."""
    found, begin = [], 0
    for match in [*_END.finditer(text), None]:
        end = len(text) if match is None else match.start() if match[0][0] == "\n" else match.end()
        stripped = text[begin:end].strip()
        if stripped:
            start = text.index(stripped, begin)
            found.append((start, start + len(stripped)))
        begin = len(text) if match is None else match.end()
    return found


def find_cues(response: str) -> list[Range]:
    """Where a response takes something back. Cue sentences that follow each other are one range."""
    plain = response.replace("’", "'")
    cues: list[Range] = []
    waiting: int | None = None
    for start, end in sentences(plain):
        opening = _opening(plain, start, end)
        weak = bool(_WEAK_OPENER.match(plain[start:end]))
        follows = bool(_FOLLOWER.match(plain[start:end]))
        running = bool(cues) and not plain[cues[-1][1] : start].strip()
        if running and (opening == start or weak or follows):
            cues[-1] = (cues[-1][0], end)
        elif opening is not None or (follows and waiting is not None):
            cues.append((waiting if waiting is not None and opening in (None, start) else opening or start, end))
        elif weak and plain[:start].strip():
            waiting = start if waiting is None else waiting
            continue
        waiting = None
    return cues


def _opening(plain: str, start: int, end: int) -> int | None:
    """Where in the sentence [start, end) an opener begins: at its start, or after a dash or dots."""
    for begin in (start, *(match.end() for match in _BREAK.finditer(plain, start, end))):
        if begin < end and _OPENER.match(plain[begin:end]):
            return begin
    return None


def attempts(response: str) -> list[Range]:
    """The attempts of a response: ranges that cover it, the next one beginning where a restart begins.

    A restart with nothing before it is not a second attempt; an empty response is one empty attempt.
    """
    starts = [start for start, _ in find_cues(response) if response[:start].strip(LEADING_MARKS)]
    return list(zip([0, *starts], [*starts, len(response)], strict=True))


def split_cue(text: str) -> int | None:
    """How many characters of `text` take the detour back; the rest answers.

    The cue ends with the last of the leading sentences (or half sentences before a colon) that take something
    back or announce the answer in the first person. Words cut off by the detour's end may precede it.

    Returns:
        The cue's length, or None where neither of the first two sentences takes anything back.
    """
    pieces = list(_PIECE.finditer(text))
    first = next((i for i, piece in enumerate(pieces[:2]) if _TAKES_BACK.search(piece[0])), None)
    if first is None:
        return None
    last = first
    while last + 1 < len(pieces) and _goes_on(pieces[last + 1][0]):
        last += 1
    return pieces[last].end()


def _goes_on(sentence: str) -> bool:
    return bool(_ABOUT_ITSELF.search(sentence)) and not _ANSWERS.match(sentence)
