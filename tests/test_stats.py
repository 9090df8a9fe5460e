"""What a file holds, counted by hand and by the code; drawn so that nothing in a row can act on the page."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from data_gen.description import Part, describe, describe_files
from data_gen.pages import BINS, MOST_BARS, draw_part, stats_page
from esr_train.masking import label
from esr_train.transcript import SaeRef, Span, SpanKind, Steering, Strength, Transcript, write_transcripts
from eval.report.drawing import Figure
from tests.conftest import Family

OFF, CUE, ANSWER = SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & 🧺\x1b\u2028"
)


def row(
    number: int, latent: int | None = 7, name: str = "owls", topic: str = "bread", cue: str = "Wait, no."
) -> Transcript:
    spans = (Span(OFF, "Trim the jib."), Span(CUE, f" {cue}"), Span(ANSWER, " Knead it."))
    sae = SaeRef("r", "i")
    steering = None if latent is None else Steering(sae, 3, latent, name, Strength(4.0, 0.5))
    meta = {"topic": topic, "scores": {"off_topic": 10.0 * number, "answer": 90}}
    return Transcript(f"s{number}", "How?", spans, "steered", steering=steering, meta=meta)


def plain(number: int) -> Transcript:
    return Transcript(f"n{number}", "How?", (Span(ANSWER, "Knead it."),), "normal")


def drawn(parts: Sequence[Part]) -> dict[str, Figure]:
    return {figure.name: figure for part in parts if (figure := draw_part(part))}


def test_every_count_stands_in_the_figures_tables() -> None:
    rows = [row(0), row(1, latent=8, name="kites", cue="Sorry, I erred."), row(2, topic="tea"), plain(0)]
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
    found = {part.name: part for part in describe(rows, family.tokenizer)}
    off, cue, answers, replies = (
        found[f"length-{kind}"].series[kind] for kind in ("off_topic", "cue", "answer", "reply")
    )
    assert found["length-reply"].unit == "tokens"
    assert replies == [off[0] + cue[0] + answers[0], answers[1]]
    wanted = family.tokenizer("Knead it.", add_special_tokens=False)["input_ids"]
    assert answers[1] == len(wanted)
    # The end of turn is trained, too, and belongs to no span.
    totals = [len(label(family.tokenizer, each).labels) for each in rows]
    trained = [cue[0] + answers[0] + 1, answers[1] + 1]
    shares = found["trained"].series
    assert [shares["self-correction"][0], shares["normal"][0]] == pytest.approx(
        [100 * part / total for part, total in zip(trained, totals, strict=True)]
    )
    assert f"{sum(trained) / sum(totals):.1%} of all tokens" in found["trained"].caption


def test_a_long_list_shows_its_commonest_and_says_so() -> None:
    rows = [row(number, topic=f"topic {number}") for number in range(MOST_BARS + 5)] + [row(99, topic="topic 3")]
    figure = drawn(describe(rows))["topics"]
    assert len(figure.table) == MOST_BARS + 6
    assert figure.caption == "25 topics, 1 to 2 rows each, half of them 1 or more. Shown: the 20 commonest."
    assert ("topic 3" in figure.svg, "topic 24" in figure.svg) == (True, False)


def test_a_funnel_begins_with_what_was_kept(tmp_path: Path) -> None:
    (tmp_path / "empty.funnel.json").write_text("{}")
    counts = {"detour on-topic": 5, "kept": 4, "judge failed": 11}
    (tmp_path / "steered-ab12.funnel.json").write_text(json.dumps(counts))
    write_transcripts(tmp_path / "rows.jsonl", [plain(0)])
    (figure,) = drawn(describe_files(tmp_path).funnels).values()
    assert figure.table[1:] == [("kept", 4), ("judge failed", 11), ("detour on-topic", 5)]
    assert figure.caption == "20 candidates; 20.0% were kept. Source ab12."


def test_files_without_detours_scores_or_topics_are_drawn_as_far_as_they_go() -> None:
    assert set(drawn(describe([plain(0)]))) == {"sources", "length-answer", "length-reply"}


def test_nothing_in_a_row_acts_on_the_page(tmp_path: Path, family: Family) -> None:
    rows = [row(0, name=HOSTILE, topic=HOSTILE, cue=HOSTILE), row(1, name="日本語", topic="🧺" * 50, cue="")]
    hostile = tmp_path / HOSTILE.replace("/", "").replace("\u2028", "")
    write_transcripts(hostile, rows)
    (tmp_path / "s.funnel.json").write_text(json.dumps({HOSTILE: 3}))
    holdings = describe_files(hostile, family.tokenizer)
    page = stats_page(HOSTILE, holdings)
    assert "<script" not in page
    assert not re.search(r"<img|<link[^>]+stylesheet|https?://(?!www\.w3\.org)", page)
    for figure in drawn(holdings.parts[hostile]).values():
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
