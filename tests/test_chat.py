"""A conversation becomes one text and one list of ids; control words that a person types stay plain text."""

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esr_train import template as chat
from esr_train.errors import InputError
from esr_train.template import encode, encode_prompt, end_of_turn, find_controls, render
from esr_train.transcript import Span, SpanKind, Transcript
from tests.conftest import Family, make_family

TYPED = "What do <|eot_id|>, <end_of_turn>, <bos> and <|begin_of_text|> do?"
TOKENIZERS = {name: make_family(name).tokenizer for name in ("llama", "gemma")}


def transcript(*texts: str, prompt: str = "How?", system: str | None = None) -> Transcript:
    kinds = (SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER)[-len(texts) :]
    spans = tuple(Span(kind, text) for kind, text in zip(kinds, texts, strict=True))
    return Transcript("row", prompt, spans, "normal", system=system)


def pieces(rendered: chat.Rendered) -> list[str]:
    return [rendered.text[start:end] for _, start, end in rendered.spans]


def test_the_prompt_is_what_the_template_prints(family: Family) -> None:
    expected = family.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How?"}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(family.tokenizer, "How?") == (expected, len(expected))


def test_the_reply_starts_at_the_first_token_of_the_prefix(family: Family) -> None:
    bare, _ = encode_prompt(family.tokenizer, "How?")
    ids, start = encode_prompt(family.tokenizer, "How?", prefix="Wait, é😀")
    assert ids[:start] == bare
    assert family.tokenizer.decode(ids[start:]) == "Wait, é😀"


@pytest.mark.parametrize("place", ["prompt", "prefix", "system"])
def test_control_words_that_a_person_types_are_never_control_tokens(llama: Family, place: str) -> None:
    plain, _ = encode_prompt(llama.tokenizer, **{"prompt": "a", "system": "a", "prefix": "a", place: "b"})
    typed, _ = encode_prompt(llama.tokenizer, **{"prompt": "a", "system": "a", "prefix": "a", place: TYPED})
    special = set(llama.tokenizer.all_special_ids)
    assert [i for i in typed if i in special] == [i for i in plain if i in special]
    assert TYPED in llama.tokenizer.decode(typed)


def test_typed_control_words_leave_the_other_ids_as_they_are(family: Family) -> None:
    calm = render(family.tokenizer, transcript("The jib. ", "Wait, ", "Smooth it.", prompt="What does X do?"))
    typed = render(family.tokenizer, transcript("The jib. ", "Wait, ", "Smooth it.", prompt=TYPED))
    tail = len(calm.text) - calm.reply_start
    ends = []
    for rendered in (calm, typed):
        encoded = encode(family.tokenizer, rendered.text, rendered.controls)
        start = next(i for i, (first, _) in enumerate(encoded.offsets) if first >= rendered.reply_start)
        ends.append(encoded.input_ids[start:])
    assert ends[0] == ends[1]
    assert typed.text[-tail:] == calm.text[-tail:]


def test_offsets_after_typed_control_words_point_at_their_characters(family: Family) -> None:
    rendered = render(family.tokenizer, transcript("Smooth it.", prompt=TYPED))
    encoded = encode(family.tokenizer, rendered.text, rendered.controls)
    for token, (start, end) in zip(encoded.input_ids, encoded.offsets, strict=True):
        assert family.tokenizer.decode([token]) == rendered.text[start:end]


def test_the_tokenizer_still_knows_control_tokens_after_typed_ones(family: Family) -> None:
    before = encode_prompt(family.tokenizer, "How?")
    encode_prompt(family.tokenizer, TYPED)
    assert encode_prompt(family.tokenizer, "How?") == before


@pytest.mark.parametrize("name", ["llama", "gemma"])
@given(prompt=st.text(max_size=20), reply=st.text(max_size=30).filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_stretch_by_stretch_gives_the_ids_of_a_single_call(name: str, prompt: str, reply: str) -> None:
    tokenizer = TOKENIZERS[name]
    text = render(tokenizer, transcript(reply, prompt=prompt)).text
    controls = find_controls(tokenizer, text, ())
    assert chat._encode_stretches(tokenizer, text, controls) == chat._encode_plain(tokenizer, text)


def test_a_prefix_gives_the_ids_of_the_same_text_in_a_whole_transcript(family: Family) -> None:
    prefix = "First, knead the dough.\n\nWait, that's not right."
    ids, _ = encode_prompt(family.tokenizer, "How?", prefix=prefix)
    rendered = render(family.tokenizer, transcript(prefix, " Smooth it."))
    whole = encode(family.tokenizer, rendered.text, rendered.controls)
    assert list(whole.input_ids[: len(ids)]) == ids


def test_spans_lie_where_their_text_is(family: Family) -> None:
    rendered = render(family.tokenizer, transcript("The jib.", " Wait, no.", "\n\nSmooth it."))
    assert pieces(rendered) == ["The jib.", " Wait, no.", "\n\nSmooth it."]
    reply = rendered.text[rendered.reply_start : rendered.reply_end]
    assert reply == "The jib. Wait, no.\n\nSmooth it." + end_of_turn(family.tokenizer)


def test_white_space_that_the_template_trims_shifts_no_span(family: Family) -> None:
    rendered = render(family.tokenizer, transcript(" \nThe jib.", " Wait.", " Smooth it.\n ", prompt="\n How? "))
    assert pieces(rendered) == ["The jib.", " Wait.", " Smooth it."]


def test_white_space_that_a_template_keeps_at_the_end_is_the_last_span_s(family: Family) -> None:
    tokenizer = deepcopy(family.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(" | trim", "")
    assert pieces(render(tokenizer, transcript(" The jib.", " Wait.", " Smooth it.\n"))) == [
        "The jib.",
        " Wait.",
        " Smooth it.\n",
    ]


@pytest.mark.parametrize("word", ["user", "model", "assistant", "turn", "a", "<end_of_turn>", "<|eot_id|>"])
def test_a_reply_that_repeats_template_text_and_prompt_is_found(family: Family, word: str) -> None:
    rendered = render(family.tokenizer, transcript(word, f" {word}", f" {word}", prompt=word))
    assert pieces(rendered) == [word, f" {word}", f" {word}"]
    end = end_of_turn(family.tokenizer)
    assert rendered.text[rendered.reply_start :].rstrip("\n") == f"{word} {word} {word}{end}"


def test_text_after_the_end_of_turn_is_outside_the_reply() -> None:
    rendered = render(TOKENIZERS["gemma"], transcript("Smooth it."))
    assert rendered.text[rendered.reply_end :] == "\n"


def test_the_end_of_turn_is_found_though_eos_is_another_token() -> None:
    tokenizer = deepcopy(TOKENIZERS["gemma"])
    tokenizer.eos_token = "<eos>"
    assert end_of_turn(tokenizer) == "<end_of_turn>"


def test_a_system_message_that_the_template_refuses_is_an_error_with_row_and_remedy() -> None:
    with pytest.raises(InputError, match=r"row 'row'.*System role not supported.*Move the system text"):
        render(TOKENIZERS["gemma"], transcript("Smooth it.", system="Be brief."))


def test_a_template_that_rewrites_the_reply_is_an_error(llama: Family) -> None:
    tokenizer = deepcopy(llama.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("| trim", "| upper")
    with pytest.raises(InputError, match=r"row 'row'.*rewrites the assistant message"):
        render(tokenizer, transcript("Smooth it."))


def test_two_bos_are_an_error(family: Family) -> None:
    tokenizer = deepcopy(family.tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(InputError, match="2 BOS tokens instead of one"):
        encode_prompt(tokenizer, "How?")


def test_an_empty_reply_is_an_error(llama: Family) -> None:
    with pytest.raises(InputError, match="row 'row': the reply is empty"):
        render(llama.tokenizer, transcript(" \n"))


def test_a_date_header_that_the_template_writes_itself_is_not_doubled(llama: Family) -> None:
    header = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"
    tokenizer = deepcopy(llama.tokenizer)
    start = "<|start_header_id|>system<|end_header_id|>\n\n"
    tokenizer.chat_template = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
        f"{{{{ {start!r} + {header + chr(10) * 2!r} + said + '<|eot_id|>' }}}}"
        + tokenizer.chat_template.removeprefix("{{- bos_token }}")
    )
    bare = render(tokenizer, transcript("Smooth it."))
    assert bare.text.count("Cutting Knowledge Date") == 1
    assert render(tokenizer, transcript("Smooth it.", system=header)) == bare
    more = render(tokenizer, transcript("Smooth it.", system=f"{header}\n\nBe brief."))
    assert f"{header}\n\nBe brief.<|eot_id|>" in more.text
