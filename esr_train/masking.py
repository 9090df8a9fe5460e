"""Which tokens carry loss: the one place where a transcript's spans become labels."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Literal

from transformers import PreTrainedTokenizerBase

from esr_train.errors import InputError
from esr_train.template import Encoded, Range, Rendered, chat_template, encode, render
from esr_train.transcript import SpanKind, Transcript

TRAINED, MASKED, END = "\033[32m", "\033[2m", "\033[0m"
"""Terminal colours of what is trained, and of what is not."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
IGNORED = -100
"""The label of a token without loss."""

Policy = Literal["masked", "unmasked", "answer_only"]

TRAINED_KINDS: dict[Policy, frozenset[SpanKind]] = {
    "masked": frozenset({SpanKind.CUE, SpanKind.ANSWER}),
    "unmasked": frozenset(SpanKind),
    "answer_only": frozenset({SpanKind.ANSWER}),
}
"""The span kinds that carry loss under each policy; the end-of-turn token always does."""


@dataclass(frozen=True)
class Labelled:
    """A transcript as tokens and labels.

    Args:
        input_ids: [tokens].
        labels: [tokens]; the token's own id where it is trained, `IGNORED` elsewhere.
        offsets: [tokens]; the characters of `text` that each token stands for.
        straddling: how many tokens are masked although some of their characters are to be trained.
        spans: kind, start and end of every span, as characters of `text`.
        reply_start: index of the first token that holds some of the reply.
        answer_start: index of the first token that holds some of the reply's last span, if that is an answer; the
            number of tokens otherwise.
    """

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    offsets: tuple[Range, ...]
    text: str
    straddling: int
    spans: tuple[tuple[SpanKind, int, int], ...]
    reply_start: int
    answer_start: int

    @property
    def trained(self) -> int:
        """How many tokens carry loss."""
        return sum(value != IGNORED for value in self.labels)


def label(
    tokenizer: PreTrainedTokenizerBase,
    transcript: Transcript,
    policy: Policy = "masked",
    max_length: int | None = None,
) -> Labelled:
    """Tokenise a transcript and label the tokens that lie wholly inside what `policy` trains.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        transcript: the row.
        policy: `masked` trains cue and answer, `unmasked` the whole reply, `answer_only` the answers; each of
            them the end-of-turn token, too.
        max_length: most tokens the row may have; None for any number.

    Raises:
        InputError: naming the row, if it cannot be rendered, is longer than `max_length`, has nothing to train, no
            label on its end-of-turn token, characters without a token, or labels that do not decode to their text.
    """
    where = f"row {transcript.id!r}"
    rendered = render(tokenizer, transcript)
    encoded = encode(tokenizer, rendered.text, rendered.contents, where)
    if max_length is not None and len(encoded.input_ids) > max_length:
        raise InputError(
            f"{len(encoded.input_ids)} tokens are more than max_length {max_length}, "
            "and truncation would take the row's cue, answer or end of turn",
            where,
            "Raise train.max_length or leave the row out.",
        )
    wanted = _wanted_characters(rendered, policy)
    labels, straddling = _label_tokens(encoded, wanted)
    _check_offsets(rendered, encoded, wanted, where)
    _check_coverage(tokenizer, rendered, encoded, labels, where)
    _check_decoding(tokenizer, rendered.text, encoded, labels, where)
    kind, last, _ = rendered.spans[-1]
    answer = encoded.first_token(last if kind is SpanKind.ANSWER else len(rendered.text))
    start = encoded.first_token(rendered.reply_start)
    ids, offsets = encoded.input_ids, encoded.offsets
    return Labelled(transcript.id, ids, labels, offsets, rendered.text, straddling, rendered.spans, start, answer)


def label_pair(
    tokenizer: PreTrainedTokenizerBase,
    transcript: Transcript,
    policy: Policy = "masked",
    max_length: int | None = None,
) -> tuple[Labelled, Labelled]:
    """Label a transcript and its rejected reply behind the tokens that both begin with: those are their context.

    Args:
        tokenizer, max_length: see `label`.
        policy: of the preferred reply; of the rejected one everything counts.

    Raises:
        InputError: as `label`, or for a row without a rejected reply.
    """
    if transcript.rejected is None:
        fix = "Generate rows with train.method=dpo, or give every row one."
        raise InputError("there is no rejected reply to prefer another to", f"row {transcript.id!r}", fix)
    chosen = label(tokenizer, transcript, policy, max_length)
    rejected = label(tokenizer, replace(transcript, spans=transcript.rejected), "unmasked", max_length)
    pairs = zip(chosen.input_ids, rejected.input_ids, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return _labelled_behind(chosen, common), _labelled_behind(rejected, common)


def _labelled_behind(labelled: Labelled, tokens: int) -> Labelled:
    return replace(labelled, labels=(IGNORED,) * tokens + labelled.labels[tokens:])


def trained_tokens(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, policy: Policy = "masked") -> int:
    """How many of a transcript's tokens carry loss; see `label`."""
    return label(tokenizer, transcript, policy).trained


def _wanted_characters(rendered: Rendered, policy: Policy) -> bytearray:
    """One flag for each character of the rendered text: 1 where it is to be trained."""
    flags = bytearray(len(rendered.text))
    spans = [(start, end) for kind, start, end in rendered.spans if kind in TRAINED_KINDS[policy]]
    for start, end in [*spans, (rendered.contents[-1][1], rendered.reply_end)]:
        flags[start:end] = b"\1" * (end - start)
    return flags


def _label_tokens(encoded: Encoded, wanted: bytearray) -> tuple[tuple[int, ...], int]:
    """Labels, and the number of tokens that lost theirs because they straddle a border."""
    labels = [IGNORED] * len(encoded.input_ids)
    straddling = 0
    for tokens in _tokens_sharing_characters(encoded.offsets):
        flags = wanted[encoded.offsets[tokens[0]][0] : max(encoded.offsets[i][1] for i in tokens)]
        if all(flags):
            for i in tokens:
                labels[i] = encoded.input_ids[i]
        elif any(flags):
            straddling += len(tokens)
    return tuple(labels), straddling


def _tokens_sharing_characters(offsets: Sequence[Range]) -> Iterator[list[int]]:
    """Runs of tokens that must be labelled together; mostly a run is one token. Empty tokens are in none.

    Byte-level BPE can cut a character into several tokens, all of which then stand for the whole character.
    """
    run: list[int] = []
    run_end = 0
    for i, (start, end) in enumerate(offsets):
        if start == end:
            continue
        if run and start >= run_end:
            yield run
            run = []
        run.append(i)
        run_end = max(run_end, end)
    if run:
        yield run


def _check_offsets(rendered: Rendered, encoded: Encoded, wanted: bytearray, where: str) -> None:
    """Every wanted character has a token, and every token among them its characters: none may lose its label."""
    without = bytearray(wanted)
    for start, end in encoded.offsets:
        without[start:end] = bytes(end - start)
    empty = next((at for at, end in encoded.offsets if at == end and wanted[at - 1 : at + 1] == b"\1\1"), -1)
    lost = without.find(1) if any(without) else empty
    if lost >= 0:
        around = rendered.text[max(lost - 20, 0) : lost + 20]
        raise InputError(
            f"the tokenizer does not say which token stands for a character to be trained, in {around!r}",
            where,
            "Load it with `esr_train.load_tokenizer`, or set trim_offsets to false in its tokenizer.json.",
        )


def _check_coverage(
    tokenizer: PreTrainedTokenizerBase, rendered: Rendered, encoded: Encoded, labels: Sequence[int], where: str
) -> None:
    trained = [i for i, value in enumerate(labels) if value != IGNORED]
    if not trained or labels[trained[-1]] != chat_template(tokenizer).end_of_turn_id:
        raise InputError("the end of turn has no label, so the model would never learn to stop", where)
    if encoded.offsets[trained[0]][0] >= rendered.contents[-1][1]:
        raise InputError("nothing is trained in this row", where, "Leave it out, or use another train.loss.")


def _check_decoding(
    tokenizer: PreTrainedTokenizerBase, text: str, encoded: Encoded, labels: Sequence[int], where: str
) -> None:
    """Compare every labelled stretch, decoded, with the characters that it stands for."""
    for trained, group in groupby(range(len(labels)), key=lambda i: labels[i] != IGNORED):
        tokens = list(group)
        if not trained:
            continue
        # Behind the token before it: some tokenizers drop the white space at the start of what they decode.
        before, *ids = encoded.input_ids[tokens[0] - 1 : tokens[-1] + 1]
        parts = ([before], [before, *ids])
        head, whole = (str(tokenizer.decode(part, clean_up_tokenization_spaces=False)) for part in parts)
        source = text[encoded.offsets[tokens[0]][0] : encoded.offsets[tokens[-1]][1]]
        if whole != head + source:
            raise InputError(
                f"the labelled tokens decode to {whole[len(head) :][:80]!r} and not to {source[:80]!r}",
                where,
                "Use a tokenizer that neither rewrites text nor trims offsets.",
            )


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
