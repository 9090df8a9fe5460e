"""What a chat template writes, and conversations as text and tokens.

Nothing here knows a model family: what begins a conversation, what ends a turn and whether there is a system role is
read off probe conversations that the template has rendered.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from functools import lru_cache
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from esr_train.errors import InputError
from esr_train.transcript import SpanKind, Transcript

Range = tuple[int, int]
"""Characters [start, end) of a text."""

DATE = date(2024, 7, 26)
"""The day on which every conversation is rendered: a template that reads the clock would give other ids tomorrow."""

_PROBES = {"system": "qsystemq", "user": "qpromptq", "assistant": "qreplyq"}
_NO_REASONING = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
"""An empty stretch of reasoning, or the end of one."""
_NO_SYSTEM = "Move the system text into the prompt and set `system` to null."


@dataclass(frozen=True)
class ChatTemplate:
    """What a tokenizer's chat template writes.

    Args:
        around: text before the prompt, between prompt and reply, and behind the reply.
        around_system: the same with a system message in front; empty if the template refuses it, leaves it out, or
            writes it in generation otherwise than in training.
        reply_space: white space before the reply (the end of `around[1]`) that the model has to generate itself.
        turn_end: what ends a reply: the end-of-turn token, with the white space that is written before it.
        end_of_turn_id: that token's id.
        bos_id: the token that begins every conversation and occurs nowhere else in it; None if there is none.
        written: every control token that the template writes up to the end of the reply.
        control: matches control tokens: the special ones, and others that the template writes.
        reasons: whether a reply begins with the model's reasoning: rows are then written behind the very text that
            asks for a reply, where the template by itself would have them begin with an empty stretch of it.
    """

    around: tuple[str, ...]
    around_system: tuple[str, ...]
    reply_space: str
    turn_end: str
    end_of_turn_id: int
    bos_id: int | None
    written: frozenset[str]
    control: re.Pattern[str]
    reasons: bool = False


@dataclass(frozen=True)
class Rendered:
    """A transcript as the model reads it.

    Args:
        text: the whole conversation, template text included.
        contents: the messages' ranges, in order; control tokens are what the template writes outside them.
        spans: kind, start and end of every span, as characters of `text`; white space that the template trims
            off the reply's ends is in no span.
        reply_start: where the reply begins.
        reply_end: the end of the end-of-turn token; nothing outside [reply_start, reply_end) may be trained.
    """

    text: str
    contents: tuple[Range, ...]
    spans: tuple[tuple[SpanKind, int, int], ...]
    reply_start: int
    reply_end: int


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, the characters it stands for."""

    input_ids: tuple[int, ...]
    offsets: tuple[Range, ...]

    def first_token(self, character: int) -> int:
        """Index of the first token that holds some text at or behind a character (their number if there is none)."""
        ends = (i for i, (_, end) in enumerate(self.offsets) if end > character)
        return next(ends, len(self.input_ids))


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """What the tokenizer's chat template writes.

    Raises:
        InputError: if there is no template, or one under which a model cannot be trained and asked in the same words:
            it rewrites messages, ends replies without a token, begins them otherwise in training than in
            generation (but for reasoning that is left empty), or writes several BOS tokens.
    """
    where = str(tokenizer.name_or_path or "tokenizer")
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template, so no conversation can be written for this model",
            where,
            "Name an instruction-tuned model, put the template beside the tokenizer as chat_template.jinja, or set "
            "model.chat_template.",
        )
    if not tokenizer.is_fast:
        raise InputError("the tokenizer does not say which characters a token stands for", where, "Use a fast one.")
    return _probe(tokenizer, where, str(tokenizer.chat_template), tokenizer.bos_token, len(tokenizer))


def use_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, variables: Mapping[str, Any] | None, where: str
) -> None:
    """Give a tokenizer another chat template, or its own with some of its variables set.

    They are set at its head, so that whoever gets the tokenizer, saved or not, writes what this one writes.

    Args:
        tokenizer: is changed.
        template: Jinja; None keeps its own.
        variables: such as `enable_thinking`; numbers, texts, true, false or null.
        where: names the section in messages.

    Raises:
        InputError: if there is no template, or it does not know a variable.
    """
    if template is not None:
        tokenizer.chat_template = template
    if not variables:
        return
    own: Any = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    known = sorted(set(re.findall(r"\b[a-z]\w+", own or "")))
    for name in variables:
        if name not in known:
            near = get_close_matches(name, known, 3)
            fix = f"Did you mean {' or '.join(near)}?" if near else "Leave it out."
            raise InputError(f"the chat template knows no variable {name!r}", f"{where}.template_kwargs", fix)
    # The plus sign keeps the template's first line break.
    head = "".join(f"{{% set {name} = {value!r} +%}}" for name, value in variables.items())
    tokenizer.chat_template = head + own


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that begins every text; without a chat template, the one that the tokenizer declares."""
    return chat_template(tokenizer).bos_id if tokenizer.chat_template else tokenizer.bos_token_id


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation: Any) -> frozenset[int]:
    """Every token at which a reply ends: end of turn, eos, and those of the model's generation config (or None)."""
    configured = getattr(generation, "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    ids = [chat_template(tokenizer).end_of_turn_id, tokenizer.eos_token_id, *listed]
    return frozenset(int(token) for token in ids if token is not None)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The declared padding token, or another special token if the template writes that one itself.

    Raises:
        InputError: if every special token has a meaning in conversations.
    """
    special = sorted(_special_tokens(tokenizer), key=lambda name: "pad" not in name.lower())
    taken = {*chat_template(tokenizer).written, None}
    for name in (tokenizer.pad_token, *special):
        if name not in taken:
            return str(name)
    raise InputError(
        "the tokenizer has no padding token apart from tokens of its chat template",
        str(tokenizer.name_or_path or "tokenizer"),
        "Add a pad_token to tokenizer_config.json: a model that is padded with its end of turn may not learn to stop.",
    )


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    """A conversation as the model reads it, up to where its reply begins.

    Raises:
        InputError: if the template refuses or rewrites a message.
    """
    return _conversation(tokenizer, prompt, system)[0]


def reply_text(tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str = "") -> str:
    """A conversation as the model reads it, up to the end of its reply, which `reply` begins or is.

    Raises:
        InputError: if the template refuses or rewrites a message.
    """
    return prompt_text(tokenizer, prompt) + chat_template(tokenizer).reply_space + reply


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None, prefix: str = ""
) -> tuple[list[int], int]:
    """Token ids of a conversation that waits for the reply's next token.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        prompt: the user's message; control-token text in it is encoded as plain text.
        prefix: text with which the reply already begins, taken as it is.

    Returns:
        The ids, and the index of the first one that holds some of `prefix` (their number if there is none).

    Raises:
        InputError: if the template refuses or rewrites a message.
    """
    asked, contents = _conversation(tokenizer, prompt, system)
    text = asked + (chat_template(tokenizer).reply_space + prefix if prefix else "")
    encoded = encode(tokenizer, text, [*contents, (len(asked), len(text))])
    return list(encoded.input_ids), encoded.first_token(len(asked))


def render(tokenizer: PreTrainedTokenizerBase, transcript: Transcript) -> Rendered:
    """Render a transcript and find its spans in the text.

    Raises:
        InputError: naming the row, if the reply is empty, or the template refuses or rewrites a message.
    """
    where = f"row {transcript.id!r}"
    if not transcript.content.strip():
        raise InputError("the reply is empty", where)
    template = chat_template(tokenizer)
    text, contents = _conversation(tokenizer, transcript.prompt, transcript.system, transcript.content, where)
    start, end = contents[-1]
    reply_start = start - len(template.reply_space)
    spans: list[tuple[SpanKind, int, int]] = []
    position = start - transcript.content.find(text[start:end])
    for span in transcript.spans:
        first, last = max(position, start), min(position + len(span.text), end)
        if first < last:
            # What the model generates before the reply's first word belongs to it.
            spans.append((span.kind, first if spans else reply_start, last))
        position += len(span.text)
    return Rendered(text, tuple(contents), tuple(spans), reply_start, end + len(template.turn_end))


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, contents: Sequence[Range], where: str | None = None
) -> Encoded:
    """Tokenise a rendered text; what stands in `contents` (ranges in order) never becomes a control token.

    Raises:
        InputError: naming `where`, if a message spells out a control token and the tokenizer cannot encode that as
            text without encoding its neighbours differently.
    """
    control = chat_template(tokenizer).control
    borders = [0, *(border for content in contents for border in content), len(text)]
    gaps = zip(borders[::2], borders[1::2], strict=True)
    controls = [match.span() for gap in gaps for match in control.finditer(text, *gap)]
    spelled = [match.span() for match in control.finditer(text)]
    encoded = _encode_plain(tokenizer, text)
    if controls != spelled:
        if _encode_stretches(tokenizer, text, spelled).input_ids != encoded.input_ids:
            raise InputError(
                "a message spells out a control token, which this tokenizer cannot encode as text",
                where,
                "Leave the row out, or spell the token differently.",
            )
        encoded = _encode_stretches(tokenizer, text, controls)
    # Some tokens swallow the white space behind them, which they do not stand for.
    exact = {start: (start, end) for start, end in controls}
    return Encoded(encoded.input_ids, tuple(exact.get(offset[0], offset) for offset in encoded.offsets))


@lru_cache(maxsize=16)
def _probe(tokenizer: PreTrainedTokenizerBase, where: str, *_: object) -> ChatTemplate:
    """The facts; the further arguments are what they depend on if the tokenizer is changed."""
    around, begins = _around(tokenizer, where, "user")
    try:
        around_system, begins_system = _around(tokenizer, where, "system", "user")
    except InputError:
        around_system, begins_system = (), ("", False)
    # Other added tokens than those in brackets of some kind may be ordinary words or white space.
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    special = _special_tokens(tokenizer)
    names = _matching([name for name in added if name in special or re.fullmatch(r"[^\w\s]\S+[^\w\s]", name)])
    end = re.match(rf"\s*({names.pattern})", around[-1])
    if end is None:
        raise InputError(
            f"the chat template ends a reply with {around[-1]!r}, which does not begin with a token of its own, so the "
            "model would never learn to stop",
            where,
            "Use a template that writes an end-of-turn token that is in the vocabulary.",
        )
    texts = (*around[:-1], end[1], *around_system[:-1])
    written = {name for text in texts for name in names.findall(text)}
    return ChatTemplate(
        around=around,
        around_system=around_system if begins_system == begins else (),
        reply_space=begins[0],
        turn_end=end[0],
        end_of_turn_id=tokenizer.get_added_vocab()[end[1]],
        bos_id=_find_bos(tokenizer, around, end[1], where),
        written=frozenset(written),
        control=_matching({*written, *special}),
        reasons=begins[1],
    )


def _around(tokenizer: PreTrainedTokenizerBase, where: str, *roles: str) -> tuple[tuple[str, ...], tuple[str, bool]]:
    """What is written around messages of these roles and a reply; how the reply begins: white space, and `reasons`."""
    messages = [{"role": role, "content": _PROBES[role]} for role in (*roles, "assistant")]
    pieces = re.split(f"({'|'.join(_PROBES.values())})", _apply(tokenizer, messages, where))
    if pieces[1::2] != [message["content"] for message in messages]:
        raise InputError("the chat template rewrites messages, so they cannot be found in its text", where)
    trained, asked = "".join(pieces[:-2]), _apply(tokenizer, messages[:-1], where, generation=True)
    reply_space = trained.removeprefix(asked)
    reasons = trained.startswith(asked) and bool(_NO_REASONING.fullmatch(reply_space))
    if reasons:
        pieces[-3], reply_space = pieces[-3].removesuffix(reply_space), ""
    if reply_space.strip():
        raise InputError(
            f"the chat template begins a reply with {trained[-80:]!r} in training and with {asked[-80:]!r} where one "
            "is to be generated",
            where,
            "Use a template that writes the same before a reply in both cases; some have a switch for it, see "
            "model.template_kwargs.",
        )
    if asked.endswith(" "):
        raise InputError(
            f"the chat template asks for a reply with {asked[-20:]!r}, whose last space becomes one token with the "
            "reply's first word in training, but not in generation",
            where,
            "Use a template that asks without that space.",
        )
    return tuple(pieces[::2]), (reply_space, reasons)


def _find_bos(tokenizer: PreTrainedTokenizerBase, around: tuple[str, ...], end: str, where: str) -> int | None:
    bos = tokenizer.bos_token
    asked = around[:-1]
    count = sum(text.count(bos) for text in asked) if bos else 0
    # A token that stands before every role's name is a turn's header, whatever the tokenizer calls it.
    is_header = count > 1 and not any(re.search(re.escape(bos) + r"(?!\w)", text) for text in asked)
    starts = count > 0 and asked[0].startswith(bos)
    if not count or is_header or (bos == end and not starts):
        return None
    if not starts or (count > 1 and bos != end):
        raise InputError(
            f"the chat template writes {count} BOS tokens instead of one at the start, {bos}, before a reply begins",
            where,
            "Use a chat template that writes it once.",
        )
    return tokenizer.get_added_vocab()[bos]


def _matching(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in longest_first) or r"(?!)")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _conversation(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system: str | None,
    reply: str | None = None,
    where: str | None = None,
) -> tuple[str, list[Range]]:
    """A rendered conversation, and where each message's content lies in it; without a reply it waits for one."""
    template = chat_template(tokenizer)
    if reply is not None and template.reasons:
        asked, ranges = _conversation(tokenizer, prompt, system, None, where)
        return asked + reply + template.around[-1], [*ranges, (len(asked), len(asked) + len(reply))]
    given = {"system": _without_header(system, template), "user": prompt, "assistant": reply}
    messages = [{"role": role, "content": content} for role, content in given.items() if content is not None]
    text = _apply(tokenizer, messages, where, generation=reply is None)
    around = template.around if given["system"] is None else template.around_system
    if not around:
        raise InputError("the chat template does not write the system message as it is", where, _NO_SYSTEM)
    if reply is None:
        around = (*around[:-2], around[-2].removesuffix(template.reply_space))
    contents: list[Range] = []
    position = 0
    for message, before, behind in zip(messages, around[:-1], around[1:], strict=True):
        said = message["content"]
        versions = (said, said.rstrip(), said.lstrip(), said.strip())
        found = next((kept for kept in versions if text.startswith(before + kept + behind, position)), None)
        whole = message is not messages[-1] or text[position:] == f"{before}{found}{behind}"
        if found is None or not whole:
            raise InputError(
                f"the chat template rewrites the {message['role']} message, so it cannot be found",
                where,
                "Use a template that prints messages as they are (white space at their ends may be trimmed).",
            )
        contents.append((position + len(before), position + len(before) + len(found)))
        position = contents[-1][1]
    return text, contents


def _without_header(system: str | None, template: ChatTemplate) -> str | None:
    """Imported system messages may begin with lines that the template writes itself, such as `Today Date: …`."""
    if system is None or not template.around_system:
        return system
    keys = re.findall(r"^([\w ]+): .*$", template.around_system[0], re.MULTILINE)
    lines = "".join(rf"{re.escape(key)}: .*(?:\n+|\Z)" for key in keys)
    return re.sub(rf"\A{lines}", "", system) or None if lines else system


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], where: str | None, generation: bool = False
) -> str:
    try:
        # Unless a recipe asks for reasoning, a template that can leave it out must do so.
        options: dict[str, Any] = {"strftime_now": DATE.strftime, "enable_thinking": False}
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **options)
    except (TemplateError, TypeError, ValueError) as error:
        fix = _NO_SYSTEM if messages[0]["role"] == "system" else None
        raise InputError(f"the chat template refuses this conversation ({error})", where, fix) from error
    return str(text)


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, split_special_tokens: bool = False) -> Encoded:
    found = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=split_special_tokens
    )
    offsets = tuple((int(start), int(end)) for start, end in found["offset_mapping"])
    return Encoded(tuple(found["input_ids"]), offsets)


def _encode_stretches(tokenizer: PreTrainedTokenizerBase, text: str, controls: Sequence[Range]) -> Encoded:
    """Tokenise between control tokens; tokenizers split there anyway, so other ids stay what they are."""
    special = _special_tokens(tokenizer)
    spelled = [match for match in chat_template(tokenizer).control.finditer(text) if match.span() not in controls]
    # A control token that is not special is always taken for one: the tokenizer never sees such a word whole.
    apart = [match.start() + 1 for match in spelled if match[0] not in special]
    borders = sorted({0, len(text), *apart, *(border for control in controls for border in control)})
    ids: list[int] = []
    offsets: list[Range] = []
    for start, end in pairwise(borders):
        if (start, end) in controls:
            stretch = Encoded((tokenizer.get_added_vocab()[text[start:end]],), ((0, end - start),))
        else:
            stretch = _encode_plain(tokenizer, text[start:end], split_special_tokens=True)
        ids += stretch.input_ids
        offsets += [(start + first, start + last) for first, last in stretch.offsets]
    return Encoded(tuple(ids), tuple(offsets))
