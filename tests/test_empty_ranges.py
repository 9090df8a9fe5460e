"""No token loses its label without a word because its range of characters is empty or too short."""

from copy import deepcopy

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from esr_train import load_tokenizer, masking
from esr_train.errors import InputError
from esr_train.masking import IGNORED, label
from esr_train.template import Encoded, encode
from esr_train.transcript import Span, SpanKind, Transcript
from tests.conftest import Family

OFF, CUE, ANSWER = SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER
REPLIES = {
    "a space token at the cue's start": [(OFF, "Trim the jib."), (CUE, " Wait, no."), (ANSWER, " Smooth it.")],
    "a space token inside the cue": [(OFF, "Trim the jib. "), (CUE, "Wait, no."), (ANSWER, "\n\nSmooth it.")],
    "a space token inside the answer": [(ANSWER, "Smooth é it, one over the other.")],
    "a space at the end of the detour": [(OFF, "Trim the jib. "), (CUE, "Wait."), (ANSWER, " Smooth it.")],
    "white space runs": [(OFF, "Trim."), (CUE, "  \n Wait.  "), (ANSWER, "\t Smooth   it.")],
}
PROCESSORS = {
    "alone": processors.ByteLevel(trim_offsets=True),
    "before a template": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[]),
        ]
    ),
    "RoBERTa's": processors.RobertaProcessing(("<|eot_id|>", 2), ("<|begin_of_text|>", 1), trim_offsets=True),
}


def row(name: str) -> Transcript:
    return Transcript("r7", "How?", tuple(Span(kind, text) for kind, text in REPLIES[name]), "prompted")


def trimmed(tokenizer: PreTrainedTokenizerFast, processor: str) -> PreTrainedTokenizerFast:
    changed = deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = PROCESSORS[processor]
    return changed


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("reply", REPLIES)
def test_a_tokenizer_that_trims_offsets_labels_as_another_once_it_is_loaded(llama, tmp_path, processor, reply):
    trimmed(llama.tokenizer, processor).save_pretrained(tmp_path)
    assert label(load_tokenizer(tmp_path), row(reply)) == label(llama.tokenizer, row(reply))


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("reply", REPLIES)
def test_a_tokenizer_that_was_loaded_otherwise_is_refused(llama, tmp_path, processor, reply):
    trimmed(llama.tokenizer, processor).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"row 'r7': the tokenizer does not say .* `esr_train.load_tokenizer`"):
        label(AutoTokenizer.from_pretrained(tmp_path), row(reply))


@pytest.mark.parametrize("shift", ["empty", "short"])
@pytest.mark.parametrize("policy", ["masked", "unmasked", "answer_only"])
def test_a_trained_token_whose_range_is_lost_is_refused(family: Family, monkeypatch, shift, policy):
    """Whatever the tokenizer does: each token of the reply in turn stands for too few characters."""
    honest = label(family.tokenizer, row("a space token at the cue's start"), policy)
    inside = [i for i, value in enumerate(honest.labels) if value != IGNORED and i + 1 < len(honest.labels)]

    def broken(at: int):
        def lossy(*arguments, **options):
            encoded = encode(*arguments, **options)
            start, end = encoded.offsets[at]
            kept = (end, end) if shift == "empty" or end - start == 1 else (start + 1, end)
            return Encoded(encoded.input_ids, (*encoded.offsets[:at], kept, *encoded.offsets[at + 1 :]))

        return lossy

    for at in inside:
        monkeypatch.setattr(masking, "encode", broken(at))
        with pytest.raises(InputError, match="row 'r7': the tokenizer does not say"):
            label(family.tokenizer, row("a space token at the cue's start"), policy)


def test_an_empty_token_outside_what_is_trained_does_no_harm(family: Family, monkeypatch):
    honest = label(family.tokenizer, row("a space token at the cue's start"))

    def with_empty(*arguments, **options):
        encoded = encode(*arguments, **options)
        return Encoded((7, *encoded.input_ids), ((0, 0), *encoded.offsets))

    monkeypatch.setattr(masking, "encode", with_empty)
    assert label(family.tokenizer, row("a space token at the cue's start")).labels == (IGNORED, *honest.labels)


def test_an_empty_token_between_two_trained_characters_is_refused(family: Family, monkeypatch):
    def with_empty(*arguments, **options):
        encoded = encode(*arguments, **options)
        at = len(encoded.input_ids) - 4
        start = encoded.offsets[at][0]
        ids = (*encoded.input_ids[:at], 7, *encoded.input_ids[at:])
        return Encoded(ids, (*encoded.offsets[:at], (start, start), *encoded.offsets[at:]))

    monkeypatch.setattr(masking, "encode", with_empty)
    with pytest.raises(InputError, match="row 'r7': the tokenizer does not say"):
        label(family.tokenizer, row("a space token at the cue's start"))
