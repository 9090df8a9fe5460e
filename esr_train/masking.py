"""Which tokens carry loss: the one place where a transcript's spans become labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from transformers import PreTrainedTokenizerBase

from esr_train.errors import InputError
from esr_train.template import Encoded, Range, Rendered, encode, end_of_turn, render
from esr_train.transcript import SpanKind, Transcript

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
        id: the transcript's.
        input_ids: [tokens].
        labels: [tokens]; the token's own id where it is trained, `IGNORED` elsewhere.
        offsets: [tokens]; the characters of `text` that each token stands for.
        text: the rendered conversation.
        straddling: how many tokens are masked although some of their characters are to be trained.
        spans: kind, start and end of every span, as characters of `text`.
    """

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    offsets: tuple[Range, ...]
    text: str
    straddling: int
    spans: tuple[tuple[SpanKind, int, int], ...]

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
        InputError: naming the row, if it cannot be rendered, is longer than `max_length`, has nothing to
            train, no label on its end-of-turn token, or labels that do not decode to the text they stand for.
    """
    where = f"row {transcript.id!r}"
    rendered = render(tokenizer, transcript)
    encoded = encode(tokenizer, rendered.text, rendered.controls, where)
    trained = _trained_characters(tokenizer, rendered, policy)
    labels, straddling = _label_tokens(encoded, trained)
    _check_length(encoded, max_length, where)
    _check_coverage(tokenizer, rendered, encoded, labels, where)
    _check_decoding(tokenizer, rendered.text, encoded, labels, where)
    return Labelled(
        transcript.id, encoded.input_ids, labels, encoded.offsets, rendered.text, straddling, rendered.spans
    )


def trained_tokens(tokenizer: PreTrainedTokenizerBase, transcript: Transcript, policy: Policy = "masked") -> int:
    """How many of a transcript's tokens carry loss; see `label`."""
    return label(tokenizer, transcript, policy).trained


def _trained_characters(tokenizer: PreTrainedTokenizerBase, rendered: Rendered, policy: Policy) -> bytearray:
    """One flag for each character of the rendered text: 1 where it is trained."""
    flags = bytearray(len(rendered.text))
    end = rendered.reply_end
    turn = (end - len(end_of_turn(tokenizer)), end)
    spans = [(start, end) for kind, start, end in rendered.spans if kind in TRAINED_KINDS[policy]]
    for start, end in [*spans, turn]:
        flags[start:end] = b"\1" * (end - start)
    return flags


def _label_tokens(encoded: Encoded, trained: bytearray) -> tuple[tuple[int, ...], int]:
    """Labels, and the number of tokens that lost theirs because they straddle a border."""
    labels = [IGNORED] * len(encoded.input_ids)
    straddling = 0
    for tokens in _tokens_sharing_characters(encoded.offsets):
        flags = trained[encoded.offsets[tokens[0]][0] : max(encoded.offsets[i][1] for i in tokens)]
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
    reach = 0
    for i, (start, end) in enumerate(offsets):
        if start == end:
            continue
        if run and start >= reach:
            yield run
            run = []
        run.append(i)
        reach = max(reach, end)
    if run:
        yield run


def _check_length(encoded: Encoded, max_length: int | None, where: str) -> None:
    if max_length is not None and len(encoded.input_ids) > max_length:
        raise InputError(
            f"{len(encoded.input_ids)} tokens are more than max_length {max_length}, "
            "and truncation would take the row's cue, answer or end of turn",
            where,
            "Raise train.max_length or leave the row out.",
        )


def _check_coverage(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Rendered,
    encoded: Encoded,
    labels: Sequence[int],
    where: str,
) -> None:
    turn = end_of_turn(tokenizer)
    last = (rendered.reply_end - len(turn), rendered.reply_end)
    trained = [offset for offset, value in zip(encoded.offsets, labels, strict=True) if value != IGNORED]
    if last not in trained:
        raise InputError(
            f"the end of turn {turn} has no label, so the model would never learn to stop",
            where,
            f"Use a tokenizer in which {turn} is one token.",
        )
    if len(trained) == 1:
        raise InputError("nothing is trained in this row", where, "Leave it out, or use another train.loss.")


def _check_decoding(
    tokenizer: PreTrainedTokenizerBase, text: str, encoded: Encoded, labels: Sequence[int], where: str
) -> None:
    """Compare every labelled stretch, decoded, with the characters that it stands for."""
    for trained, group in groupby(range(len(labels)), key=lambda i: labels[i] != IGNORED):
        tokens = list(group)
        if not trained:
            continue
        decoded = tokenizer.decode([labels[i] for i in tokens], clean_up_tokenization_spaces=False)
        source = text[encoded.offsets[tokens[0]][0] : encoded.offsets[tokens[-1]][1]]
        if decoded != source:
            raise InputError(
                f"the labelled tokens decode to {decoded[:80]!r} and not to {source[:80]!r}",
                where,
                "Use a tokenizer that neither rewrites text nor trims offsets.",
            )
