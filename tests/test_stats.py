"""What a file holds, counted by hand and by the code; drawn so that nothing in a row can act on the page."""

import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from data_gen.description import Description, describe
from data_gen.pages import BINS, MOST_BARS, description_figures, funnel_figures, stats_page
from esr_train.transcript import SaeRef, Span, SpanKind, Steering, Strength, Transcript
from eval.report.drawing import Figure
from tests.conftest import Family

OFF, CUE, ANSWER = SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & 🧺\x1b\u2028"
)


def row(
    number: int, latent: int | None = 7, label: str = "owls", topic: str = "bread", cue: str = "Wait, no."
) -> Transcript:
    spans = (Span(OFF, "Trim the jib."), Span(CUE, f" {cue}"), Span(ANSWER, " Knead it."))
    sae = SaeRef("r", "i")
    steering = None if latent is None else Steering(sae, 3, latent, label, Strength(4.0, 0.5))
    meta = {"topic": topic, "scores": {"off_topic": 10.0 * number, "answer": 90}}
    return Transcript(f"s{number}", "How?", spans, "steered", steering=steering, meta=meta)


def plain(number: int) -> Transcript:
    return Transcript(f"n{number}", "How?", (Span(ANSWER, "Knead it."),), "normal")


def drawn(description: Description) -> dict[str, Figure]:
    return {figure.name: figure for figure in description_figures(description)}


def test_every_count_stands_in_the_figures_tables() -> None:
    rows = [row(0), row(1, latent=8, label="kites", cue="Sorry, I erred."), row(2, topic="tea"), plain(0)]
    figures = drawn(describe(rows))
    assert figures["sources"].table[1:] == [("normal", 1), ("steered, self-correction", 3)]
    assert figures["topics"].table[1:] == [("bread", 2), ("tea", 1)]
    assert figures["latents"].table[1:] == [("7 owls", 2), ("8 kites", 1)]
    assert figures["cues"].table[1:] == [("wait, no.", 2), ("sorry, i erred.", 1)]
    assert "2 distinct openings, entropy 0.92 of at most 1.00 bits" in figures["cues"].caption
    header, *bins = figures["scores"].table
    assert header == ("from", "off-topic", "answer")
    assert {start: count for start, count, _ in bins if count} == {0.0: 1, 8.0: 1, 20.0: 1}
    assert {start: count for start, _, count in bins if count} == {88.0: 3}
    assert len(bins) == BINS
    # Without a tokenizer nothing is known of tokens.
    assert "trained" not in figures
    lengths = {start: count for start, count in figures["length-answer"].table[1:] if count}
    assert lengths == {len("Knead it."): 1, len(" Knead it."): 3}


def test_lengths_are_tokens_and_those_of_the_spans_make_up_the_reply(family: Family) -> None:
    rows = [row(0), plain(0)]
    found = describe(rows, family.tokenizer)
    assert found.unit == "tokens"
    off, cue, answers = (found.lengths[kind] for kind in ("off_topic", "cue", "answer"))
    assert list(found.lengths["reply"]) == [off[0] + cue[0] + answers[0], answers[1]]
    wanted = family.tokenizer("Knead it.", add_special_tokens=False)["input_ids"]
    assert answers[1] == len(wanted)
    # The end of turn is trained, too, and belongs to no span.
    assert found.tokens is not None
    assert [trained for _, trained in found.tokens] == [cue[0] + answers[0] + 1, answers[1] + 1]
    share = sum(trained for _, trained in found.tokens) / sum(total for total, _ in found.tokens)
    assert f"{share:.1%} of all tokens" in drawn(found)["trained"].caption


def test_a_long_list_shows_its_commonest_and_says_so() -> None:
    rows = [row(number, topic=f"topic {number}") for number in range(MOST_BARS + 5)] + [row(99, topic="topic 3")]
    figure = drawn(describe(rows))["topics"]
    assert len(figure.table) == MOST_BARS + 6
    assert figure.caption == "25 topics, 1 to 2 rows each, half of them 1 or more. Shown: the 20 commonest."
    assert ("topic 3" in figure.svg, "topic 24" in figure.svg) == (True, False)


def test_a_funnel_begins_with_what_was_kept() -> None:
    (figure,) = funnel_figures({"steered-ab12": {"detour on-topic": 5, "kept": 4, "judge failed": 11}, "empty": {}})
    assert figure.table[1:] == [("kept", 4), ("judge failed", 11), ("detour on-topic", 5)]
    assert figure.caption == "20 candidates; 20.0% were kept. Source ab12."


def test_files_without_detours_scores_or_topics_are_drawn_as_far_as_they_go() -> None:
    assert set(drawn(describe([plain(0)]))) == {"sources", "length-answer", "length-reply"}


def test_nothing_in_a_row_acts_on_the_page(tmp_path: Path, family: Family) -> None:
    rows = [row(0, label=HOSTILE, topic=HOSTILE, cue=HOSTILE), row(1, label="日本語", topic="🧺" * 50, cue="")]
    description = describe(rows, family.tokenizer)
    page = stats_page(HOSTILE, {Path(HOSTILE.replace("/", "")): description}, {HOSTILE: {HOSTILE: 3}}, {})
    assert "<script" not in page
    assert not re.search(r"<img|<link[^>]+stylesheet|https?://(?!www\.w3\.org)", page)
    for figure in drawn(description).values():
        ElementTree.fromstring(figure.svg)
    if CHROMIUM is None:
        pytest.skip("Chromium is missing: the page was NOT opened (apt-get install chromium)")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        "--enable-logging=stderr",
        "--v=0",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>&lt;/script&gt;" in done.stdout
    assert "CONSOLE" not in done.stderr
