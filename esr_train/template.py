"""A conversation rendered once by the chat template, and where in that text everything lies."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from esr_train.errors import InputError
from esr_train.transcript import SpanKind, Transcript

Range = tuple[int, int]
"""Characters [start, end) of a text."""

_DATE_HEADER = re.compile(r"Cutting Knowledge Date: .*\nToday Date: .*\n*")
_ENDS_OF_TURN = ("<|eot_id|>", "<end_of_turn>", "<|im_end|>")


@dataclass(frozen=True)
class Rendered:
    """A transcript as the model reads it.

    Args:
        text: the whole conversation, template text included.
        spans: kind, start and end of every span, as characters of `text`; white space that the template trims
            off the reply's ends, and any at its start, is in no span.
        reply_start: where the reply begins.
        reply_end: the end of the end-of-turn token; nothing outside [reply_start, reply_end) may be trained.
        controls: the control tokens' ranges. The same words typed by a user are not among them.
    """

    text: str
    spans: tuple[tuple[SpanKind, int, int], ...]
    reply_start: int
    reply_end: int
    controls: tuple[Range, ...]


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, the characters it stands for."""

    input_ids: tuple[int, ...]
    offsets: tuple[Range, ...]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None, prefix: str = ""
) -> tuple[list[int], int]:
    """Token ids of a conversation that waits for the reply's next token.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        prompt: the user's message; control-token text in it is encoded as plain text.
        system: the system message, or None.
        prefix: text with which the reply already begins, taken as it is.

    Returns:
        The ids, and the index of the first one that holds some of `prefix` (their number if there is none).

    Raises:
        InputError: if the template refuses or rewrites a message, or does not write exactly one BOS.
    """
    messages = _messages(tokenizer, prompt, system)
    text = _apply(tokenizer, messages, None, add_generation_prompt=True)
    contents = _find_contents(tokenizer, text, messages, None)
    reply = (len(text), len(text) + len(prefix))
    text += prefix
    encoded = encode(tokenizer, text, find_controls(tokenizer, text, [*contents, reply]))
    start = next((i for i, (_, end) in enumerate(encoded.offsets) if end > reply[0]), len(encoded.input_ids))
    return list(encoded.input_ids), start


def render(tokenizer: PreTrainedTokenizerBase, transcript: Transcript) -> Rendered:
    """Render a transcript and find its spans in the text.

    Raises:
        InputError: naming the row, if the reply is empty, or the template refuses or rewrites a message.
    """
    where = f"row {transcript.id!r}"
    if not transcript.content.strip():
        raise InputError("the reply is empty", where)
    reply = {"role": "assistant", "content": transcript.content}
    messages = [*_messages(tokenizer, transcript.prompt, transcript.system), reply]
    text = _apply(tokenizer, messages, where)
    contents = _find_contents(tokenizer, text, messages, where)
    start, end = contents[-1]
    return Rendered(
        text=text,
        spans=_place_spans(transcript, start, end),
        reply_start=start,
        reply_end=end + len(end_of_turn(tokenizer)),
        controls=find_controls(tokenizer, text, contents),
    )


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, controls: Sequence[Range], where: str | None = None
) -> Encoded:
    """Tokenise a rendered text; what stands outside `controls` never becomes a control token.

    Raises:
        InputError: naming `where`, if the ids do not hold exactly one BOS.
    """
    if tuple(controls) == find_controls(tokenizer, text, ()):
        encoded = _encode_plain(tokenizer, text)
    else:
        encoded = _encode_stretches(tokenizer, text, controls)
    found = encoded.input_ids.count(tokenizer.bos_token_id)
    if tokenizer.bos_token_id is not None and found != 1:
        raise InputError(
            f"the rendered conversation has {found} BOS tokens instead of one",
            where,
            "Use a chat template that writes the BOS token once.",
        )
    return encoded


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The control token that ends a reply (Gemma-2's `eos_token` is another one)."""
    known = set(tokenizer.get_added_vocab())
    return next((token for token in _ENDS_OF_TURN if token in known), str(tokenizer.eos_token))


def find_controls(tokenizer: PreTrainedTokenizerBase, text: str, contents: Sequence[Range]) -> tuple[Range, ...]:
    """Where control tokens stand in `text` outside the ranges in `contents`, which are in order."""
    names = sorted(_special_tokens(tokenizer), key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(name) for name in names) or r"(?!)")
    borders = [0, *(border for content in contents for border in content), len(text)]
    gaps = zip(borders[::2], borders[1::2], strict=True)
    return tuple(match.span() for gap in gaps for match in pattern.finditer(text, *gap))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _messages(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> list[dict[str, str]]:
    # Llama-3.1's template writes its date header itself; imported rows have it in their system message.
    if system is not None and "Cutting Knowledge Date" in str(tokenizer.chat_template):
        system = _DATE_HEADER.sub("", system, count=1) or None
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    where: str | None,
    add_generation_prompt: bool = False,
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        has_system = messages[0]["role"] == "system"
        raise InputError(
            f"the chat template refuses this conversation ({error})",
            where,
            "Move the system text into the prompt and set `system` to null." if has_system else None,
        ) from error
    return str(text)


def _find_contents(
    tokenizer: PreTrainedTokenizerBase, text: str, messages: list[dict[str, str]], where: str | None
) -> list[Range]:
    """Where each message's content lies, in order.

    Found from the back, each with the end-of-turn token after it: so a content that also occurs in a header,
    or in another message, is not mistaken for that.
    """
    ranges: list[Range] = []
    limit = len(text)
    for message in reversed(messages):
        found = _find_content(text, message["content"], end_of_turn(tokenizer), limit)
        if found is None:
            raise InputError(
                f"the chat template rewrites the {message['role']} message, so it cannot be found",
                where,
                "Use a template that prints messages as they are (white space at their ends may be trimmed).",
            )
        ranges.insert(0, found)
        limit = found[0]
    return ranges


def _find_content(text: str, content: str, end: str, limit: int) -> Range | None:
    # Headers end in white space, so white space at a content's start cannot be told from theirs.
    for version in (content.lstrip(), content.strip()):
        start = text.rfind(version + end, 0, limit)
        if start >= 0:
            return start, start + len(version)
    return None


def _place_spans(transcript: Transcript, start: int, end: int) -> tuple[tuple[SpanKind, int, int], ...]:
    content = transcript.content
    position = start - (len(content) - len(content.lstrip()))
    placed = []
    for span in transcript.spans:
        first, last = max(position, start), min(position + len(span.text), end)
        if first < last:
            placed.append((span.kind, first, last))
        position += len(span.text)
    return tuple(placed)


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, split_special_tokens: bool = False) -> Encoded:
    found = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=split_special_tokens,
    )
    offsets = tuple((int(start), int(end)) for start, end in found["offset_mapping"])
    return Encoded(tuple(found["input_ids"]), offsets)


def _encode_stretches(tokenizer: PreTrainedTokenizerBase, text: str, controls: Sequence[Range]) -> Encoded:
    """Tokenise between control tokens; tokenizers split there anyway, so other ids stay what they are."""
    ids: list[int] = []
    offsets: list[Range] = []
    position = 0
    for start, end in [*controls, (len(text), len(text))]:
        stretch = _encode_plain(tokenizer, text[position:start], split_special_tokens=True)
        ids += stretch.input_ids
        offsets += [(position + first, position + last) for first, last in stretch.offsets]
        if start < end:
            ids.append(tokenizer.get_added_vocab()[text[start:end]])
            offsets.append((start, end))
        position = end
    return Encoded(tuple(ids), tuple(offsets))
