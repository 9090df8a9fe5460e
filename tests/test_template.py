"""A conversation becomes one text and one list of ids; control words that a person types stay plain text."""

from copy import deepcopy
from datetime import datetime, tzinfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esr_train import template as module
from esr_train.errors import InputError
from esr_train.masking import IGNORED, label
from esr_train.steering.engine import Encoding, Request, checked_completion
from esr_train.template import (
    DATE,
    chat_template,
    encode,
    encode_prompt,
    padding_token,
    prompt_text,
    render,
    stop_ids,
    use_template,
)
from esr_train.transcript import Span, SpanKind, Transcript
from tests.chat_templates import KINDS, UNUSABLE, make_tokenizer
from tests.conftest import Family, make_family

TYPED = "What do <|eot_id|>, <end_of_turn>, <bos> and <|begin_of_text|> do?"
TOKENIZERS = {name: make_family(name).tokenizer for name in ("llama", "gemma")}


def transcript(*texts: str, prompt: str = "How?", system: str | None = None) -> Transcript:
    kinds = (SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER)[-len(texts) :]
    spans = tuple(Span(kind, text) for kind, text in zip(kinds, texts, strict=True))
    return Transcript("row", prompt, spans, "normal", system=system)


def pieces(rendered: module.Rendered) -> list[str]:
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
        encoded = encode(family.tokenizer, rendered.text, rendered.contents)
        start = next(i for i, (first, _) in enumerate(encoded.offsets) if first >= rendered.reply_start)
        ends.append(encoded.input_ids[start:])
    assert ends[0] == ends[1]
    assert typed.text[-tail:] == calm.text[-tail:]


def test_offsets_after_typed_control_words_point_at_their_characters(family: Family) -> None:
    rendered = render(family.tokenizer, transcript("Smooth it.", prompt=TYPED))
    encoded = encode(family.tokenizer, rendered.text, rendered.contents)
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
    controls = [match.span() for match in chat_template(tokenizer).control.finditer(text)]
    assert module._encode_stretches(tokenizer, text, controls) == module._encode_plain(tokenizer, text)


def test_a_prefix_gives_the_ids_of_the_same_text_in_a_whole_transcript(family: Family) -> None:
    prefix = "First, knead the dough.\n\nWait, that's not right."
    ids, _ = encode_prompt(family.tokenizer, "How?", prefix=prefix)
    rendered = render(family.tokenizer, transcript(prefix, " Smooth it."))
    whole = encode(family.tokenizer, rendered.text, rendered.contents)
    assert list(whole.input_ids[: len(ids)]) == ids


def test_spans_lie_where_their_text_is(family: Family) -> None:
    rendered = render(family.tokenizer, transcript("The jib.", " Wait, no.", "\n\nSmooth it."))
    assert pieces(rendered) == ["The jib.", " Wait, no.", "\n\nSmooth it."]
    reply = rendered.text[rendered.reply_start : rendered.reply_end]
    assert reply == "The jib. Wait, no.\n\nSmooth it." + chat_template(family.tokenizer).turn_end


def test_white_space_that_the_template_trims_shifts_no_span(family: Family) -> None:
    rendered = render(family.tokenizer, transcript(" \nThe jib.", " Wait.", " Smooth it.\n ", prompt="\n How? "))
    assert pieces(rendered) == ["The jib.", " Wait.", " Smooth it."]


def test_white_space_that_a_template_keeps_is_in_the_first_and_the_last_span(family: Family) -> None:
    tokenizer = deepcopy(family.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(" | trim", "")
    said = [" The jib.", " Wait.", " Smooth it.\n"]
    assert pieces(render(tokenizer, transcript(*said))) == said


@pytest.mark.parametrize("word", ["user", "model", "assistant", "turn", "a", "<end_of_turn>", "<|eot_id|>"])
def test_a_reply_that_repeats_template_text_and_prompt_is_found(family: Family, word: str) -> None:
    rendered = render(family.tokenizer, transcript(word, f" {word}", f" {word}", prompt=word))
    assert pieces(rendered) == [word, f" {word}", f" {word}"]
    end = chat_template(family.tokenizer).turn_end
    assert rendered.text[rendered.reply_start :].rstrip("\n") == f"{word} {word} {word}{end}"


def test_text_after_the_end_of_turn_is_outside_the_reply() -> None:
    rendered = render(TOKENIZERS["gemma"], transcript("Smooth it."))
    assert rendered.text[rendered.reply_end :] == "\n"


def test_the_end_of_turn_is_found_though_eos_is_another_token() -> None:
    tokenizer = deepcopy(TOKENIZERS["gemma"])
    tokenizer.eos_token = "<eos>"
    assert chat_template(tokenizer).turn_end == "<end_of_turn>"


def test_a_system_message_that_the_template_refuses_is_an_error_with_row_and_remedy() -> None:
    with pytest.raises(InputError, match=r"row 'row'.*System role not supported.*Move the system text"):
        render(TOKENIZERS["gemma"], transcript("Smooth it.", system="Be brief."))


@pytest.mark.parametrize(("role", "said"), [("user", {"prompt": "a jib"}), ("assistant", {})])
def test_a_template_that_rewrites_some_messages_is_an_error(llama: Family, role: str, said: dict[str, str]) -> None:
    tokenizer = deepcopy(llama.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("| trim", "| replace('jib', 'sail')")
    with pytest.raises(InputError, match=f"row 'row': the chat template rewrites the {role} message"):
        render(tokenizer, transcript("The jib.", " No.", **said))
    assert render(tokenizer, transcript("The mast."))


def test_a_template_that_adds_to_some_conversations_is_an_error(llama: Family) -> None:
    tokenizer = deepcopy(llama.tokenizer)
    tokenizer.chat_template += "{{ 'Hm.' if messages[0]['content'] == 'Why?' }}"
    for reply in (encode_prompt, lambda *said: render(said[0], transcript("A.", prompt=said[1]))):
        assert reply(tokenizer, "How?")
        with pytest.raises(InputError, match="rewrites the"):
            reply(tokenizer, "Why?")


def test_an_empty_reply_is_an_error(llama: Family) -> None:
    with pytest.raises(InputError, match="row 'row': the reply is empty"):
        render(llama.tokenizer, transcript(" \n"))


FACTS = {
    # What ends a turn, BOS, padding, and whether a system message can be given.
    "ChatML": ("<|im_end|>", None, "<|endoftext|>", True),
    "ChatML as it comes out of GGUF": ("<|im_end|>", None, "<|endoftext|>", True),
    "ChatML with Llama 3's end of turn in the vocabulary": ("<|im_end|>", None, "<|eot_id|>", True),
    "ChatML whose tokens are not special": ("<|im_end|>", None, "<|endoftext|>", True),
    "ChatML that leaves reasoning out": ("<|im_end|>", None, "<|endoftext|>", True),
    "ChatML that leaves reasoning empty only in training": ("<|im_end|>", None, "<|endoftext|>", True),
    "ChatML that begins reasoning and leaves it empty in training": ("<|im_end|>", None, "<|endoftext|>", True),
    "instructions in brackets": ("</s>", "<s>", "<unk>", False),
    "instructions with a space before the end": (" </s>", "<s>", "<unk>", False),
    "a system message in the prompt's turn": ("</s>", "<s>", "<unk>", True),
    "a system message that training leaves out": ("</s>", "<s>", "<unk>", False),
    "a space before the reply only under a system message": ("</s>", None, "<pad>", False),
    "a token for every role": ("<|end|>", None, "<|endoftext|>", True),
    "one token that ends turns and is declared as BOS": ("<|endoftext|>", None, "<|pad|>", True),
    "one token that begins conversations and ends turns": ("<|endoftext|>", "<|endoftext|>", "<|pad|>", True),
    "roles in words": ("</s>", "<s>", "<pad>", True),
    "the date": ("<|eot_id|>", "<|begin_of_text|>", "<|finetune_right_pad_id|>", True),
}


def test_every_kind_of_template_has_its_facts() -> None:
    assert set(FACTS) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_facts_are_read_off_what_the_template_writes(name: str) -> None:
    tokenizer = make_tokenizer(KINDS[name])
    facts = chat_template(tokenizer)
    bos = None if facts.bos_id is None else tokenizer.decode([facts.bos_id])
    assert (facts.turn_end, bos, padding_token(tokenizer), bool(facts.around_system)) == FACTS[name]
    assert tokenizer.decode([facts.end_of_turn_id]) == facts.turn_end.strip()
    assert facts.end_of_turn_id in stop_ids(tokenizer, None)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_training_and_generation_give_the_same_ids(name: str, system: str | None) -> None:
    tokenizer = make_tokenizer(KINDS[name])
    if system and not FACTS[name][3]:
        with pytest.raises(InputError, match=r"(?i)system (message|role).*Move the system text"):
            encode_prompt(tokenizer, "How?", system)
        return
    labelled = label(tokenizer, transcript("The jib.", " Wait, no.", " Smooth it.", system=system))
    asked, reply = encode_prompt(tokenizer, "How?", system)
    begun, start = encode_prompt(tokenizer, "How?", system, prefix="The jib. Wait")
    assert list(labelled.input_ids[: len(asked)]) == asked == begun[:start]
    assert list(labelled.input_ids[: len(begun)]) == begun
    assert labelled.reply_start == reply == start == len(asked)
    trained = [value for value in labelled.labels if value != IGNORED]
    assert tokenizer.decode(trained) == f" Wait, no. Smooth it.{FACTS[name][0]}"
    assert (system or "") in labelled.text


@pytest.mark.parametrize("name", KINDS)
def test_what_a_model_generates_becomes_the_same_ids_again(name: str) -> None:
    tokenizer = make_tokenizer(KINDS[name])
    trained = label(tokenizer, transcript("Smooth it."))
    asked, start = trained.input_ids[: trained.reply_start], trained.reply_start
    reply = [value for value in trained.labels if value != IGNORED]
    request = Request("r", "How?")
    said = checked_completion(tokenizer, request, Encoding(list(asked), start), reply, "stop", {}).text
    assert said.rstrip() == "Smooth it."
    assert label(tokenizer, transcript(said)) == trained


@pytest.mark.parametrize("name", KINDS)
def test_all_of_a_normal_reply_is_trained_also_the_space_that_the_model_generates_first(name: str) -> None:
    tokenizer = make_tokenizer(KINDS[name])
    labelled = label(tokenizer, transcript("Smooth it."))
    trained = tokenizer.decode([value for value in labelled.labels if value != IGNORED])
    assert trained == f"{chat_template(tokenizer).reply_space}Smooth it.{FACTS[name][0]}"
    assert labelled.straddling == 0


@pytest.mark.parametrize("name", sorted({*KINDS} - {"a token for every role"}))
def test_a_run_of_control_tokens_in_a_message_is_text_under_every_template(name: str) -> None:
    tokenizer = make_tokenizer(KINDS[name])
    run = "".join(sorted(tokenizer.get_added_vocab())) + FACTS[name][0] * 2
    calm = label(tokenizer, transcript("The jib.", " Wait, no.", " Smooth it."))
    typed = label(tokenizer, transcript(f"The jib {run}.", f" Wait {run}.", f" Smooth {run}", prompt=run))
    control = set(tokenizer.convert_tokens_to_ids(list(chat_template(tokenizer).written)))
    control |= set(tokenizer.all_special_ids)
    assert [i for i in typed.input_ids if i in control] == [i for i in calm.input_ids if i in control]
    trained = tokenizer.decode([value for value in typed.labels if value != IGNORED])
    assert trained == f" Wait {run}. Smooth {run}{FACTS[name][0]}"


def test_a_spelled_control_token_is_refused_where_it_would_change_its_neighbours() -> None:
    tokenizer = make_tokenizer(KINDS["a token for every role"])
    with pytest.raises(InputError, match="row 'row': a message spells out a control token"):
        label(tokenizer, transcript("Smooth it.", prompt="What is <|end|>?"))


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_template_under_which_no_model_can_be_trained_and_asked_is_refused(name: str) -> None:
    kind, reason = UNUSABLE[name]
    with pytest.raises(InputError, match=f"(?s){reason}"):
        chat_template(make_tokenizer(kind))


@pytest.mark.parametrize("name", [name for name in UNUSABLE if "BOS" in name])
def test_two_bos_are_an_error(name: str) -> None:
    for act in (
        lambda tokenizer: encode_prompt(tokenizer, "How?"),
        lambda tokenizer: label(tokenizer, transcript("A")),
    ):
        with pytest.raises(InputError, match=r"writes \d BOS tokens instead of one"):
            act(make_tokenizer(UNUSABLE[name][0]))


def test_facts_follow_a_tokenizer_that_is_changed(llama: Family) -> None:
    tokenizer = deepcopy(llama.tokenizer)
    assert chat_template(tokenizer).turn_end == "<|eot_id|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "<|end_of_text|>")
    assert chat_template(tokenizer).turn_end == "<|end_of_text|>"


def test_a_default_system_message_is_part_of_the_template_and_a_given_one_takes_its_place() -> None:
    tokenizer = make_tokenizer(KINDS["ChatML as it comes out of GGUF"])
    assert "Be kind." in render(tokenizer, transcript("Smooth it.")).text
    assert "Be kind." not in render(tokenizer, transcript("Smooth it.", system="Be brief.")).text


def test_where_a_model_reasons_a_row_begins_with_its_reasoning_as_a_generated_reply_does() -> None:
    tokenizer = make_tokenizer(KINDS["ChatML that leaves reasoning empty only in training"])
    labelled = label(tokenizer, transcript("<think>\nA sheet.\n</think>\n\nSmooth it."))
    assert labelled.text.endswith("<|im_start|>assistant\n<think>\nA sheet.\n</think>\n\nSmooth it.<|im_end|>\n")
    marks = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [token for token in labelled.labels if token in marks] == marks


@pytest.mark.parametrize(("value", "before"), [(True, ""), (False, "<think>\n\n</think>\n\n")])
def test_a_variable_of_the_template_is_set_for_whoever_gets_the_tokenizer(value: bool, before: str) -> None:
    tokenizer = make_tokenizer(KINDS["ChatML that leaves reasoning out"])
    use_template(tokenizer, None, {"enable_thinking": value}, "model")
    assert prompt_text(tokenizer, "How?").endswith(f"<|im_start|>assistant\n{before}")
    asked = [{"role": "user", "content": "How?"}]
    plain = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert plain == prompt_text(tokenizer, "How?")
    labelled = label(tokenizer, transcript("Smooth it."))
    assert labelled.text.startswith(f"{plain}Smooth it.")


def test_setting_variables_leaves_the_template_s_first_line_break_and_every_kind_of_value_as_it_is() -> None:
    tokenizer = make_tokenizer(KINDS["ChatML"])
    tokenizer.chat_template = "\n{{ said if said else other }}" + tokenizer.chat_template
    use_template(tokenizer, None, {"said": None, "other": 'it\'s \n"ü"'}, "model")
    assert prompt_text(tokenizer, "How?").startswith('\nit\'s \n"ü"<|im_start|>user')


def test_a_variable_that_the_template_does_not_know_is_refused_with_a_near_one() -> None:
    tokenizer = make_tokenizer(KINDS["ChatML that leaves reasoning out"])
    with pytest.raises(InputError, match=r"model.template_kwargs.*'enable_thinkin'.*Did you mean enable_thinking"):
        use_template(tokenizer, None, {"enable_thinkin": True}, "model")


def test_ids_do_not_depend_on_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(KINDS["the date"])

    class Later(datetime):
        """The clock of another day."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Later":
            return cls(2031, 5, 17, tzinfo=tz)

    today = encode_prompt(tokenizer, "How?"), label(tokenizer, transcript("Smooth it."))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    asked = [{"role": "user", "content": "How?"}]
    assert "17 May 2031" in tokenizer.apply_chat_template(asked, tokenize=False)
    tokenizer = deepcopy(tokenizer)
    assert today == (encode_prompt(tokenizer, "How?"), label(tokenizer, transcript("Smooth it.")))
    assert f"Today Date: {DATE:%d %b %Y}" in prompt_text(tokenizer, "How?")


@pytest.mark.parametrize("day", ["26 Jul 2024", "01 Dec 2025"])
def test_a_date_header_that_the_template_writes_itself_is_not_doubled(day: str) -> None:
    header = f"Cutting Knowledge Date: December 2023\nToday Date: {day}"
    tokenizer = make_tokenizer(KINDS["the date"])
    bare = render(tokenizer, transcript("Smooth it."))
    assert bare.text.count("Cutting Knowledge Date") == 1
    assert render(tokenizer, transcript("Smooth it.", system=header)) == bare
    more = render(tokenizer, transcript("Smooth it.", system=f"{header}\n\nBe brief."))
    assert more == render(tokenizer, transcript("Smooth it.", system="Be brief."))
    assert more.text.count("Cutting Knowledge Date") == 1
