"""What a person is shown: spans in colour, the mask token by token, and nothing that acts."""

import re
from html.parser import HTMLParser

import pytest

from data_gen.description import shown
from data_gen.pages import preview_page
from esr_train.errors import InputError
from esr_train.masking import IGNORED, label
from esr_train.transcript import Span, SpanKind, Transcript
from tests.conftest import Family

ROW = Transcript(
    "s1",
    "How?",
    (
        Span(SpanKind.OFF_TOPIC, "Trim the [bold]jib[/bold]."),
        Span(SpanKind.CUE, " Wait, <b>no</b>."),
        Span(SpanKind.ANSWER, " Smooth it 😀."),
    ),
    "prompted",
)


class Page(HTMLParser):
    """Text by class, and every tag that was seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "span":
            self._open.append(dict(attrs)["class"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.append((self._open[-1], data))

    def of(self, *kinds: str) -> str:
        return "".join(text for kind, text in self.texts if kind in kinds)


def test_each_span_has_its_colour_and_markup_in_a_reply_is_shown_as_it_is() -> None:
    text = shown(ROW, colour=True)
    assert "\x1b[31mTrim the [bold]jib[/bold].\x1b[0m" in text
    assert "\x1b[1;33m Wait, <b>no</b>.\x1b[0m" in text
    assert "\x1b[32m Smooth it 😀.\x1b[0m" in text


def test_trained_and_masked_tokens_are_told_apart(family: Family) -> None:
    text = shown(ROW, colour=True, tokenizer=family.tokenizer)
    mask = text[text.index("tokens trained") :]
    trained = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", mask, re.DOTALL))
    assert trained == " Wait, <b>no</b>. Smooth it 😀." + family.tokenizer.eos_token


def test_the_policy_decides_what_is_shown_as_trained(family: Family) -> None:
    text = shown(ROW, tokenizer=family.tokenizer, policy="answer_only")
    labels = label(family.tokenizer, ROW, "answer_only").labels
    assert f"{sum(value != IGNORED for value in labels)} of {len(labels)} tokens trained" in text


def test_terminal_escapes_in_a_reply_do_not_act() -> None:
    spans = (Span(SpanKind.ANSWER, "a\x1b[2Jb\x9bc"),)
    assert "\x1b" not in shown(Transcript("x", "p\x1b[2J", spans, "normal"))
    assert "a\ufffd[2Jb\ufffdc" in shown(Transcript("x", "p", spans, "normal"))


def test_the_page_holds_spans_and_tokens_and_asks_for_nothing(family: Family) -> None:
    text = preview_page([ROW], 1, family.tokenizer)
    read = Page(text)
    assert read.of("off_topic").startswith("off_topic")
    assert "Trim the [bold]jib[/bold]." in read.of("off_topic")
    assert read.of("trained") == " Wait, <b>no</b>. Smooth it 😀." + family.tokenizer.eos_token
    assert read.of("trained", "masked") == label(family.tokenizer, ROW).text
    assert not read.tags & {"script", "img", "b"}
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//|https?://|url\(|@import""", text)
    assert "default-src 'none'" in text


def test_the_page_says_how_many_rows_there_are() -> None:
    text = preview_page([ROW, ROW], 3)
    assert text.count("<article") == 2
    assert "2 of 3 rows" in text


def test_hostile_ids_and_prompts_are_escaped() -> None:
    hostile = "</pre><script>alert(1)</script>"
    text = preview_page([Transcript(hostile, hostile, (Span(SpanKind.ANSWER, hostile),), "normal")], 1)
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") == 3


def test_a_row_that_cannot_be_labelled_is_named(llama: Family) -> None:
    detour = Transcript("s9", "How?", (Span(SpanKind.OFF_TOPIC, "Jib."),), "prompted")
    with pytest.raises(InputError, match="row 's9'"):
        preview_page([detour], 1, llama.tokenizer)
