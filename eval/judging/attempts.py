"""Where attempts begin: a response is cut at explicit restart language, in character ranges.

Sentences are of four kinds. An *opener* takes something back by itself ("Oops, I drifted off."). A *weak*
one does so only when more follows ("Wait." before "You asked about sails."), because instructions use the
same words ("Wait. Then stir."). A *follower* goes on with a restart that has begun ("You asked about
sails.") and means nothing alone. All else is text. Patterns are anchored where a sentence starts, or a
clause after a dash or dots.
"""

import re

Range = tuple[int, int]
"""Start and end of a stretch of text, in characters, end excluded."""

_END = re.compile(r"[.!?…]+[\"')\]”*_]*(?=\s|$)|\n+")
_BREAK = re.compile(r"\s*(?:—|–|--|\s-\s|\.\.\.|…|;)\s*|,\s+(?:and |but )?(?=(?:wait|hold on|oops|scratch)\b)", re.I)
_MARKUP = r"[*_#>(\s]*(?:-\s+)?"
_FILLER = (
    r"(?:(?:oh dear|oh no|dear me|oh|ah|um+|uh+|erm?|okay|ok|well|so|but|and|anyway|anyhow|now|right"
    r"|alright"
    r"|yikes|huh|hm+|whoa|goodness)\b[\s,.…!—–-]*)*"
)
_STOP = r"\s*(?:[,.!?:;…—–-]|$)"
_MOMENT = r"(?:just )?(?:wait|hold on|hang on|hold up|one moment|one second|a moment|a second)"
_WHILE = r"(?: (?:just )?a (?:minute|moment|second|sec|bit))?"
_OBJECT = r"(?:your|the|this|that|my|its)? ?(?:actual |real |original |first |right |main )?"
_ASKED = (
    rf"(?:{_OBJECT}(?:question|topic|subject|point|task|request|prompt|matter)"
    r"|what you (?:asked|wanted)|track)"
)
_OFF = r"off (?:the )?(?:topic|track|course|subject|point|question|rails|on a tangent|into|to)"
_THAT = (
    r"(?:that|this|all (?:of )?(?:that|this)|none of (?:that|this)|what i (?:just )?(?:said|wrote"
    r"|described)"
    r"|the (?:above|last part)|my (?:last )?(?:answer|reply|response|last sentences?))"
)
_IS = r"(?:'s| is| was| are| were| seems| looks)"
_SELF = r"(?:i|we)"
_WILL = (
    r"(?:let me|let's|let us|allow me to|i(?:'ll| will| should| must| need to| have to| ought to"
    r"| want to|'d better)"
    r"|we should|time to|please let me|may i|better)"
)
_AGAIN = (
    r"(?:try (?:(?:that|this|it) )?(?:again|once more|anew)(?! with| in| after| until)"
    r"|(?:start|begin)(?: (?:this|that|it))? (?:over|again|afresh|anew|fresh|from scratch)|restart\b|rewind"
    r"|re-?(?:do|write|work) (?:that|this|it\b|my|the (?:list|answer|reply))"
    r"|backtrack|back up|re-?focus|reset\b(?! the)|correct (?:that|this|myself"
    r"|my|course)"
    r"|fix (?:that|my)|rephrase|re-?read|reconsider|set (?:that|this) (?:right|straight)"
    r"|stop (?:there|here|myself|this|talking)|take (?:that|it) back|get on track|leave (?:that|this) aside"
    rf"|(?:go|get|come|turn|steer(?: this)?|bring (?:this|us|it)) back{_STOP}"
    r"|(?:(?:go|get|come|turn|steer(?: this)?|bring (?:this|us|it)) back|return) (?:to|on|onto)"
    r" (?!you\b|\d|work\b|normal|this later|(?:our|the) (?:example|equation|step|beginning|previous))"
    r"|answer (?:what you|(?:your|the) (?:actual|real|original|right))|(?:actually|properly|really) answer)"
)
_STRAYED = (
    rf"(?:(?:got|getting|went|gone|going|was|am|been|drifted|drifting|wandered|wandering|strayed|straying"
    rf"|slipped|slipping|slid"
    rf"|veered|veering|wound up|ended up|moved|steered|pulled) (?:completely |a bit |quite |way "
    rf"|totally |far )?"
    rf"(?:{_OFF}|sidetracked|side-tracked|distracted|carried away|off{_STOP}|away(?: from|{_STOP})"
    r"|into (?:talking|writing|another|the wrong|a different|something)|to (?:another|the wrong"
    r"|a different)"
    r"|off (?:there|again|on (?:a|an|the|another|some))\b|into [\w' -]{1,40} (?:there|again|instead)\b"
    r"|from (?:your|the) (?:question|topic|subject))"
    r"|digress|rambl(?:ed|ing)|stray(?:ed|ing)|drift(?:ed|ing)\b(?! off to| to sleep)|lost (?:the thread"
    r"|my (?:train of thought|thread|place)|in [\w' -]{1,20}[.!]|my way|focus|the plot|track of)"
    r"|(?:mis(?:read|understood|took|spoke))|mixed (?:up|things)|got (?:mixed up|confused)"
    r"|confused (?:the|your|two)"
    r"|(?:was|were|am|been|started|began|kept|keep) (?:just )?(?:talking|writing|telling you|speaking"
    r"|rambling|going on)"
    r" (?:about|on)|(?:was|am) (?:describing|explaining|answering)(?: (?:the wrong|another|a different"
    r"|something))"
    r"|(?:made|gave) (?:a|an|the) (?:mistake|error|wrong|slip)|switched (?:topics?|subjects?)"
    r"|changed the subject|(?:keep|kept) (?:wandering|drifting|straying|digressing))"
)
_HEDGE = (
    r"(?:(?:seem|seemed|appear) to (?:have|be)|think(?: that)? i(?:'ve| have)?|believe i(?:'ve| have)?"
    r"|(?:realize|realise|notice|see|fear|admit)d?(?: now)?(?: that)? i(?:'ve| have)?|must have|may have"
    r"|might have|have|had"
    r"|'ve|'m|just|somehow|got|clearly|do|completely|also)"
)
_WRONG = (
    r"(?:n't| not)? ?(?:quite |at all |really |entirely |completely |the )*(?:right|correct|wrong"
    r"|incorrect|mistaken"
    r"|a mistake|an error|nonsense)"
)

_OPENERS = (
    rf"{_MOMENT}{_WHILE}(?:, | )*(?:wait)?\s*(?:[,!?…—–]|\.\.\.)(?!\s*(?:then|please|and|until|till|for|at"
    rf"|about|while|or|watch|let (?!me)|if|"
    r"but))",
    rf"(?:wait|hold on|hang on){_WHILE},? (?:no\b|i (?:was|am|got|drift|think|have|went)|that(?:'s| is"
    rf"| was| isn't)"
    r"|this (?:is|isn't)|sorry|actually|let me|what am)",
    r"(?:oops|whoops|oopsie)\b(?!-| of\b)",
    r"stop,\s+(?:that|this|i|no|wait)\b",
    rf"(?:my bad|my mistake|my error){_STOP}",
    rf"(?:scratch|strike|ignore|disregard|forget|never mind) (?:all )?(?:that|this|the above"
    rf"|what i (?:just )?"
    rf"(?:said|wrote)|(?:that |the |my )?(?:last|previous|preceding) "
    rf"(?:part|bit|line|remark|paragraph|sentence)s?){_STOP}",
    r"(?:sorry,? )?(?:please |kindly )*(?:ignore|disregard|forget) (?:the (?:part|bit|remark|line)s? about\b"
    r"|(?:that|the|my) (?:last |previous )?(?:part|bit|line|remark|paragraph|sentence)s?[.!,])",
    r"(?:that|the|my) (?:last|previous) (?:part|bit|line|remark|paragraph|sentence)s? (?:came|made|makes|was|is|did"
    r"|does|had|has|went)\b",
    r"correction\s*[:,—]|on second thou?ghts?\b|i stand corrected|i take (?:that|it) back",
    r"(?:i(?:'m| am) )?(?:so |very |really |terribly )?sorry,? (?:about|for) (?:all )?(?:that|this"
    r"|the (?:confusion"
    r"|mix-?up|tangent|detour|digression|mistake|error|drift|ramble)|(?:getting|going|wandering|drifting"
    r"|losing"
    r"|rambling|talking|straying)|my (?:mistake|error|confusion|rambling))",
    r"(?:i(?:'m| am) )?(?:so |very |really |terribly )?sorry\s*[,.!:;—–…-]+\s*(?:but )?(?:i\b(?! can't"
    r"| cannot"
    r"| can not| don't| do not| won't| couldn't| am (?:unable|late)|'m late)|that\b|this (?:is|was)"
    r"|let me|let's|wait|no\b"
    r"|you asked|your question|back to|wrong|actually|where was|what was)",
    r"sorry,? (?:i'm |that's |i was )?(?:again |way |completely )?off (?:track|topic|course)",
    r"(?:pardon|excuse) me(?:[.!…—–]|,? (?:for\b|that was|i (?:got|was|am|went|lost|drift|stray|have|seem|mis)))",
    r"(?:please )?(?:excuse|forgive|pardon) (?:the|that|this|my) (?:detour|digression|tangent|confusion|rambling|slip"
    r"|mix-?up|interruption|mistake|error|drift)",
    rf"(?:my |sincere )*(?:apologies|i apologi[sz]e|forgive me)(?:{_STOP}| for "
    rf"| about |$)"
    r"(?![^.!?\n]*(?:inconvenience|delay|late\b|trouble caused|interrupt))",
    rf"no\b[\s,.!…—–-]*(?:no\b|wait(?! for| until| till| an? |\s+\d)|sorry"
    rf"|(?:that|this)(?:{_IS}(?: not)?|n't|isn't| isn't| wasn't)"
    rf"|not that|i was|scratch)",
    rf"actually,? (?:let me|wait|no\b|sorry|hold on|scratch|{_THAT}(?:{_IS}| isn't| wasn't| doesn't)"
    r"|i (?:got|was|am|drift|should|need to|meant|mis|think i|seem|started|went)|you (?:asked|wanted)"
    r"|your question|the question|back to|going back)",
    rf"(?:hm+|no|oh|wait|actually|yikes|huh|um+|uh+)\b[\s,.…!—–-]*{_THAT}(?:{_IS}| isn| wasn| doesn"
    rf"| does| can)",
    rf"{_WILL} (?:just |quickly |please |now |simply |try to |stop and |first )*{_AGAIN}",
    rf"{_SELF} ?(?:{_HEDGE} ?){{0,4}}{_STRAYED}",
    r"(?:ah|oh|hm+|wait)\b[\s,.!…—–-]*you (?:meant|were asking|asked|wanted)\b",
    r"i(?:'m| am) (?:supposed|meant) to (?:be )?(?:answer|explain|talk|tell|writ|describ|help)",
    r"i(?:'ve| have) (?:just |somehow |now )*(?:started|begun|been) (?:explain|describ|writ|talk|list|tell)ing",
    r"i(?: was| am|'m|'ve been| have been) [^.!?\n]*\binstead of (?:answering|helping|what you)",
    r"i (?:did not|didn't) mean to (?:talk|write|go|bring|describe|drift|wander)",
    r"i (?:have to|must|should|need to) stop (?:myself|here|there)",
    r"[\w' -]{1,40} (?:has|have) no place (?:in this|here)\b",
    r"i (?:should|was (?:supposed|meant)|ought)(?: to)? (?:be|have been) (?:talking|writing|answering"
    r"|explaining|telling"
    r"|helping)",
    rf"{_THAT}(?:{_IS}| isn| wasn)(?:n't|'t| not)? (?:\w+ ){{0,3}}?(?:what you (?:asked|wanted|were"
    rf"|need)|{_OFF}|off-topic"
    r"|beside the point|a tangent|a digression|a detour|the wrong (?:answer|topic|subject|question|thing)"
    r"|about [a-z' -]{1,40}?(?:,? (?:and )?not\b|\binstead\b)|an answer to|answering|unrelated|irrelevant"
    r"|relevant to your)",
    r"none of (?:this|that) (?:helps|answers|addresses|makes sense|(?:is|was) (?:about|relevant|useful|what))",
    rf"(?:i (?:realize|realise|notice|see|think|know) (?:that )?)?{_THAT} "
    r"(?:has |had |is |was )(?:just |completely |all )*"
    rf"(?:gone|going|wandered|wandering|drifted|drifting|strayed|straying|veered|veering) (?:{_OFF}|off\b)",
    rf"{_THAT} (?:answers? your|(?:has|had|have) (?:nothing|little|no bearing)|(?:does|did|do)(?:n't"
    rf"| not) (?:really |actually |even "
    r"|quite )?(?:answer|address|help with your|fit (?:your|the)|match (?:your|the)|belong (?:here|in\b)"
    r"|sound right|seem right"
    rf"|make (?:any )?sense|look right)|(?:went|got|drifted|came out|goes|ran) (?:{_OFF}|wrong|off))",
    r"(?:you (?:had |have |'d )?(?:asked|wanted|were asking)|(?:your|the) (?:actual "
    r"|original )?question (?:was|is|asks)"
    r")[^.!?\n]*?(?:,? (?:and )?not (?:about|for|how|what|to)?\b|\brather than\b|\binstead of\b)",
    r"(?:so |now )?where was i\s*[?.!…,—–]|what (?:was|am) i (?:saying|doing|talking|writing)|(?:why|how) (?:am i"
    r"|did i (?:get|end))"
    r"|something (?:is|went|seems|feels) (?:off|wrong) (?:here|there|with (?:my|this|that))",
    rf"(?:(?:to |let's |let me )?(?:go|get|come|going|getting|coming|turn|turning|return"
    rf"|returning) )?(?:back |returning |return )"
    rf"(?:to|on) {_ASKED}",
    rf"(?:enough|no more) (?:about|of) [\w' -]{{1,40}}{_STOP}|enough (?!said|already|is\b|time)[\w-]+[.!]+$",
    r"wrong [\w-]+,? sorry|(?:starting|beginning) (?:over|again|afresh|anew|fresh)\s*[.:,—–]",
    r"(?:now )?to (?:actually|properly|really) answer|as for (?:your|the) (?:actual|original"
    r"|real) question",
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
    r"(?:let me|let's|i(?:'ll| will| should)|allow me to|here(?:'s| is| are)|this is) (?:now |please "
    r"|try to |give you |then "
    r"|instead |just |go |the |a |an |my )*(?:answer|reply|focus|talk|explain|return|address|tell|stick"
    r"|stay|continue"
    r"|proceed|help|describe|do (?:that|better|it)|begin|start|real|actual|proper|correct|right|better)",
    r"(?:back to|returning to|now for|now to|about|on to|instead,? (?:about|let)) [\w' -]{1,40}[.:!…]*$",
    r"(?:i|we) (?:should|was|am|meant|will|'ll|do not know|don't know|must|need) ",
    r"(?:that|this) (?:was|is|has|had|does|did|should|part)(?:n't)?\b[^.!?]*(?:question|asked|topic"
    r"|subject|answer|mistake|about)",
    r"(?:continuing|carrying on|moving on) with [\w' -]{1,40}[.:!…]*$",
    r"(?:here we go|once more|again|from the top|now,? (?:then|properly)|properly this time)[.:!,]*$",
)


def _compiled(patterns: tuple[str, ...], lead: str) -> re.Pattern[str]:
    return re.compile(lead + "(?:" + "|".join(f"(?:{pattern})" for pattern in patterns) + ")", re.IGNORECASE)


_OPENER = _compiled((*(_FILLER + pattern for pattern in _OPENERS), *_FILLED), _MARKUP)
_WEAK_OPENER = _compiled(_WEAK, _MARKUP + _FILLER)
_FOLLOWER = _compiled(_FOLLOWERS, _MARKUP + _FILLER)


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
    starts = [start for start, _ in find_cues(response) if response[:start].strip(" \t\n*_#>-(")]
    return list(zip([0, *starts], [*starts, len(response)], strict=True))
