"""Which tokens are trained, on hand-written rows and on random ones."""

import json
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from esr_train.errors import InputError
from esr_train.masking import IGNORED, TRAINED_KINDS, Labelled, Policy, label
from esr_train.template import encode_prompt, render
from esr_train.transcript import Span, SpanKind, Transcript
from tests.conftest import Family, make_family

OFF, CUE, ANSWER = SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER
TOKENIZERS = {name: make_family(name).tokenizer for name in ("llama", "gemma")}
END = {"llama": "<|eot_id|>", "gemma": "<end_of_turn>"}


def row(*spans: tuple[SpanKind, str], prompt: str = "How?") -> Transcript:
    return Transcript("r7", prompt, tuple(Span(kind, text) for kind, text in spans), "prompted")


def supervised(tokenizer: PreTrainedTokenizerFast, labelled: Labelled) -> list[str]:
    """The trained tokens as the vocabulary spells them (Ġ is a space, Ċ a newline)."""
    return tokenizer.convert_ids_to_tokens([value for value in labelled.labels if value != IGNORED])


CASES = {
    "a detour at the very start": (
        [(OFF, "Trim the jib."), (CUE, " Wait, no."), (ANSWER, " Smooth it.")],
        ["Ġ", "Wait", ",", "Ġ", "n", "o", ".", "ĠSmo", "oth", "Ġit", "."],
    ),
    "a token straddling the border between detour and cue": (
        [(OFF, "Trim the jib. Wa"), (CUE, "it, no."), (ANSWER, " Smooth it.")],
        [",", "Ġ", "n", "o", ".", "ĠSmo", "oth", "Ġit", "."],
    ),
    "a token across cue and answer, both trained": (
        [(OFF, "Trim the jib."), (CUE, " Wa"), (ANSWER, "it, no.")],
        ["Ġ", "Wait", ",", "Ġ", "n", "o", "."],
    ),
    "a newline on either side of the border": (
        [(OFF, "Trim the jib.\n"), (CUE, "\nWait."), (ANSWER, "\n\nSmooth it.")],
        ["Ċ", "Wait", ".", "Ċ", "Ċ", "S", "mo", "oth", "Ġit", "."],
    ),
    "characters of several bytes on both sides of the border": (
        [(OFF, "Trim 😀"), (CUE, "é Wait."), (ANSWER, " 😀")],
        ["Ã", "©", "Ġ", "Wait", ".", "Ġ", "ð", "Ł", "ĺ", "Ģ"],
    ),
    "two detours": (
        [(OFF, "Trim."), (CUE, " Wait."), (OFF, " Knead."), (CUE, " Wait!"), (ANSWER, " Smooth it.")],
        ["Ġ", "Wait", ".", "Ġ", "Wait", "!", "ĠSmo", "oth", "Ġit", "."],
    ),
    "an answer before the detour": (
        [(ANSWER, "Smooth it."), (OFF, " Knead."), (CUE, " Wait."), (ANSWER, " Smooth it.")],
        ["S", "mo", "oth", "Ġit", ".", "Ġ", "Wait", ".", "ĠSmo", "oth", "Ġit", "."],
    ),
    "a normal reply": ([(ANSWER, "Smooth it.")], ["S", "mo", "oth", "Ġit", "."]),
}


@pytest.mark.parametrize("name", CASES)
def test_exactly_these_tokens_are_trained(family: Family, name: str) -> None:
    spans, expected = CASES[name]
    labelled = label(family.tokenizer, row(*spans))
    assert supervised(family.tokenizer, labelled) == [*expected, END[family.name]]


def test_labels_are_the_tokens_own_ids_in_their_places(family: Family) -> None:
    labelled = label(family.tokenizer, row(*CASES["two detours"][0]))
    assert len(labelled.input_ids) == len(labelled.labels) == len(labelled.offsets)
    pairs = zip(labelled.input_ids, labelled.labels, strict=True)
    assert all(value in (IGNORED, token) for token, value in pairs)


def test_straddling_tokens_are_counted(family: Family) -> None:
    assert label(family.tokenizer, row((OFF, "Trim. Wa"), (CUE, "it."), (ANSWER, " No."))).straddling == 1
    assert label(family.tokenizer, row((OFF, "Trim."), (CUE, " Wait."), (ANSWER, " No."))).straddling == 0


def test_a_full_stop_and_newlines_in_one_token_are_masked_with_the_detour(family: Family) -> None:
    tokenizer = deepcopy(family.tokenizer)
    tokenizer.add_tokens([".\n\n"])
    labelled = label(tokenizer, row((OFF, "Trim."), (CUE, "\n\nWait."), (ANSWER, " No.")))
    assert supervised(tokenizer, labelled)[:2] == ["Wait", "."]
    assert labelled.straddling == 1


def test_no_part_of_a_character_is_trained_when_a_token_with_another_part_is_masked(llama: Family) -> None:
    tokenizer = _with_space_merged_into_first_byte(llama.tokenizer)
    labelled = label(tokenizer, row((OFF, "Trim "), (CUE, "é Wait."), (ANSWER, " No.")))
    assert supervised(tokenizer, labelled)[:2] == ["Ġ", "Wait"]
    assert labelled.straddling == 2


def _with_space_merged_into_first_byte(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    changed = deepcopy(tokenizer)
    state = json.loads(changed.backend_tokenizer.to_str())
    state["model"]["vocab"]["ĠÃ"] = len(changed)
    state["model"]["merges"].insert(0, ["Ġ", "Ã"])
    changed._tokenizer = Tokenizer.from_str(json.dumps(state))
    return changed


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("masked", "Smooth. Wait. No."),
        ("unmasked", "Smooth. Trim. Wait. No."),
        ("answer_only", "Smooth. No."),
    ],
)
def test_each_policy_trains_its_spans_and_the_end_of_turn(family: Family, policy: Policy, expected: str) -> None:
    spans = [(ANSWER, "Smooth."), (OFF, " Trim."), (CUE, " Wait."), (ANSWER, " No.")]
    labelled = label(family.tokenizer, row(*spans), policy)
    kept = [value for value in labelled.labels if value != IGNORED]
    assert family.tokenizer.decode(kept) == expected + END[family.name]


def test_neither_prompt_nor_template_is_trained(family: Family) -> None:
    labelled = label(family.tokenizer, row((ANSWER, "Smooth it.")), "unmasked")
    prompt, _ = encode_prompt(family.tokenizer, "How?")
    assert set(labelled.labels[: len(prompt)]) == {IGNORED}
    assert labelled.labels[len(prompt)] != IGNORED


def test_template_text_after_the_end_of_turn_is_not_trained() -> None:
    labelled = label(TOKENIZERS["gemma"], row((ANSWER, "Smooth it.")))
    assert labelled.text.endswith("<end_of_turn>\n")
    assert labelled.labels[-2:] == (TOKENIZERS["gemma"].convert_tokens_to_ids("<end_of_turn>"), IGNORED)


def test_an_end_of_turn_that_the_reply_spells_out_is_text_and_the_real_one_is_trained(family: Family) -> None:
    end = END[family.name]
    labelled = label(family.tokenizer, row((ANSWER, f"Say {end} twice.")))
    kept = [value for value in labelled.labels if value != IGNORED]
    assert family.tokenizer.decode(kept) == f"Say {end} twice.{end}"
    assert kept.count(family.tokenizer.convert_tokens_to_ids(end)) == 1


def test_a_cue_at_the_end_of_the_context_window_is_kept_whole_or_refused(family: Family) -> None:
    transcript = row((OFF, "Trim the jib. " * 20), (CUE, "Wait, no."))
    length = len(label(family.tokenizer, transcript).input_ids)
    assert supervised(family.tokenizer, label(family.tokenizer, transcript, max_length=length))[:2] == [
        "Wait",
        ",",
    ]
    with pytest.raises(InputError, match=rf"row 'r7': {length} tokens are more than max_length {length - 1}"):
        label(family.tokenizer, transcript, max_length=length - 1)


def test_a_row_with_nothing_to_train_is_refused(family: Family) -> None:
    with pytest.raises(InputError, match="row 'r7': nothing is trained"):
        label(family.tokenizer, row((OFF, "Trim the jib.")))
    with pytest.raises(InputError, match="row 'r7': nothing is trained"):
        label(family.tokenizer, row((OFF, "Trim the jib."), (CUE, " Wait.")), "answer_only")


def test_a_row_whose_only_trained_token_straddles_is_refused(family: Family) -> None:
    with pytest.raises(InputError, match="row 'r7': nothing is trained"):
        label(family.tokenizer, row((OFF, "Trim. Wa"), (CUE, "it")))


def test_labels_that_decode_to_other_text_are_refused(llama: Family) -> None:
    tokenizer = deepcopy(llama.tokenizer)
    tokenizer._tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match=r"row 'r7': the labelled tokens decode to 'smooth it\.<\|eot_id\|>'"):
        label(tokenizer, row((ANSWER, "Smooth it.")))


spans_strategy = st.lists(
    st.tuples(
        st.sampled_from(list(SpanKind)),
        st.lists(st.sampled_from([*"aeth. \n\tWoé😀,", "Wait", "the", "<|eot_id|>"]), min_size=1).map("".join),
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.parametrize("name", ["llama", "gemma"])
@given(spans=spans_strategy, policy=st.sampled_from(list(TRAINED_KINDS)))
@settings(max_examples=150, deadline=None)
def test_trained_characters_are_trained_unless_a_token_straddles(
    name: str, spans: list[tuple[SpanKind, str]], policy: Policy
) -> None:
    tokenizer = TOKENIZERS[name]
    transcript = row(*spans, (ANSWER, " Smooth it."))
    rendered = render(tokenizer, transcript)
    end = rendered.reply_end - len(END[name])
    wanted = set(range(end, rendered.reply_end))
    for kind, start, stop in rendered.spans:
        wanted |= set(range(start, stop)) if kind in TRAINED_KINDS[policy] else set()
    labelled = label(tokenizer, transcript, policy)
    straddling = 0
    for (start, stop), value in zip(labelled.offsets, labelled.labels, strict=True):
        characters = set(range(start, stop))
        assert (value != IGNORED) == (characters <= wanted)
        straddling += bool(characters & wanted) and not characters <= wanted
    assert labelled.straddling == straddling
