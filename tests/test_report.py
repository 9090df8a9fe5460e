"""The report page, as a reader meets it: in a browser, on paper, with hostile text in it."""

import csv
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree

import pytest

from eval.calibration import Threshold
from eval.course import TokenSums
from eval.judging.agreement import agreement
from eval.metrics import headline
from eval.report.arm_figures import prompting_and_tuning
from eval.report.drawing import save_for_print
from eval.report.figures import Material, draw_figures
from eval.report.findings import headline_arm, opening, story
from eval.report.page import embedded, script_json, write_report
from eval.report.story import tables as terminal_tables
from eval.resistance import Resistance
from eval.retention import Retention
from eval.store import Trial
from eval.summary import summarise
from tests.trial_maker import made

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FORMS = ("csv", "md", "tex")
HOSTILE = "<script>document.title='owned'</script> </script><!-- <b>bold</b> & \u2028 🧺 done."


def trial(arm: str, latent: int | None, *scores: float, response: str = "", **changes: Any) -> Trial:
    response = response or " ".join(f"Attempt {i} about topic {latent}." for i in range(len(scores)))
    width = len(response) // max(len(scores), 1)
    ends = [width * (i + 1) for i in range(len(scores) - 1)] + [len(response)]
    strength = None if latent is None else {"raw": 200.0 + latent, "norm": 0.5 + latent / 100}
    seed = changes.pop("cell_seed", 0)
    given = {
        "key": f"{latent}-{seed}-{changes.get('condition')}",
        "arm": arm,
        "condition": "unsteered" if latent is None else "steered",
        "cell": {
            "prompt": f"How do you do task {latent}?",
            "topic": "task",
            "latent": latent,
            "label": None if latent is None else f"label {latent} <i>slanted</i>",
            "strength": strength,
            "seed": seed,
        },
        "response": response,
        "tokens": len(response) // 4,
        "attempts": [
            {"start": end - width if i else 0, "end": end, "score": score}
            for i, (end, score) in enumerate(zip(ends, scores, strict=False))
        ],
        "cue": len(scores) > 1,
        "flags": {"degenerate": False, "hijacked": latent == 1, "silent_recovery": False},
    }
    return made(**given | changes)


def arms() -> dict[str, list[Trial]]:
    base = [trial("base", i, 30 + i) for i in range(12)]
    base += [trial("base", None, 98, cell_seed=i) for i in range(4)]
    tuned = [trial("tuned", i, 20 + i, 90) for i in range(8)]
    tuned += [trial("tuned", 8, 20, 40, 95), trial("tuned", 9, 70), trial("tuned", 10, 45, response=HOSTILE)]
    tuned += [trial("tuned", 11, attempts=[], flags={}, error="the judge timed out", response="Hm.")]
    tuned += [trial("tuned", None, 97, cell_seed=i) for i in range(4)]
    return {"base": base, "tuned": tuned}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = arms()
    notes = {"held_out": ["30 topics"], "model": "a <tiny> model"}
    folder = tmp_path_factory.mktemp("run")
    return write_report(folder, "Coming back & <more>", Material(summarise(rows, 200), rows), notes)


def browse(page: Path, profile: Path, **wanted: str) -> tuple[str, str]:
    """The page's document after its scripts ran, and what the browser's console said."""
    if CHROMIUM is None:
        pytest.skip("Chromium is missing: the page's scripts were NOT tested (apt-get install chromium)")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --dump-dom"
    flags += " --disable-background-networking --disable-component-update --enable-logging=stderr --v=0"
    address = page.as_uri() + ("#" + urlencode(wanted) if wanted else "")
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console


def cards(document: str) -> list[tuple[str, str]]:
    """Arm and number of attempts of each transcript on the page."""
    return re.findall(r'<article class="card" data-arm="([^"]*)" data-attempts="(\d+)"', document)


def found(document: str) -> int:
    match = re.search(r'data-found="(\d+)"', document)
    assert match
    return int(match[1])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, 12),
        ({"arm": "tuned", "attempts": "2"}, 8),
        ({"arm": "base", "attempts": "1", "condition": "unsteered"}, 4),
        ({"arm": "tuned", "min": "91", "max": "96"}, 1),
        ({"q": "LABEL 11"}, 2),
    ],
)
def test_filters_in_the_address_choose_transcripts(
    report: Path, tmp_path: Path, wanted: dict[str, str], expected: int
) -> None:
    document, console = browse(report, tmp_path, **wanted)
    assert console == ""
    shown = cards(document)
    assert found(document) == len(shown) == expected
    if "arm" in wanted:
        assert {arm for arm, _ in shown} == {wanted["arm"]}
    if wanted.get("attempts") in ("1", "2"):
        assert {tries for _, tries in shown} == {wanted["attempts"]}


def test_hostile_text_is_text_and_base_stands_beside_it(report: Path, tmp_path: Path) -> None:
    document, console = browse(report, tmp_path, arm="tuned", q="document.title")
    assert console == ""
    assert found(document) == 1
    assert "<title>Coming back &amp; &lt;more&gt;</title>" in document
    article = document[document.index("<article") : document.index("</article>")]
    assert "&lt;script&gt;document.title='owned'&lt;/script&gt;" in article
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; \u2028 🧺 done." in article
    assert article.index("</span>base") < article.index("</span>tuned")
    assert "Attempt 0 about topic 10." in article
    assert "label 10 &lt;i&gt;slanted&lt;/i&gt;" in article
    assert "0.60 × residual norm" in article


def test_attempts_are_cut_by_characters_even_after_an_emoji(tmp_path: Path) -> None:
    text = "🧺🧺 first. Wait, second."
    ranges = [{"start": 0, "end": 10, "score": 10.0}, {"start": 10, "end": 23, "score": 90.0}]
    rows = {"base": [trial("base", 1, 30)], "tuned": [trial("tuned", 1, response=text, attempts=ranges)]}
    assert embedded(rows)[1]["parts"] == [["🧺🧺 first. ", 10.0, True], ["Wait, second.", 90.0, True]]
    page = write_report(tmp_path, "Emoji", Material(summarise(rows, 50), rows), {})
    document, _ = browse(page, tmp_path / "profile", arm="tuned")
    assert '<span class="badge">90</span>Wait, second.</mark>' in document


def test_an_empty_line_in_a_response_is_not_coloured(tmp_path: Path) -> None:
    text = "Begin with\n\nWait, no. Fold it.\n\nDone. "
    ranges = [{"start": 0, "end": 12, "score": 10.0}, {"start": 12, "end": len(text), "score": 90.0}]
    rows = {"base": [trial("base", 1, 30)], "tuned": [trial("tuned", 1, response=text, attempts=ranges)]}
    page = write_report(tmp_path, "Lines", Material(summarise(rows, 50), rows), {})
    document, console = browse(page, tmp_path / "profile", arm="tuned")
    assert console == ""
    marks = re.findall(r'<mark class="(s\d)">(.*?)</mark>(\s*)', document.split("</span>tuned")[-1])
    badge = '<span class="badge">{}</span>'
    assert marks == [
        ("s0", badge.format(10) + "Begin with", "\n\n"),
        ("s4", badge.format(90) + "Wait, no. Fold it.", "\n\n"),
        ("s4", "Done.", " "),
    ]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which two replies of the tuned arm were read token by token, and one that has changed since."""
    rows = arms()
    first, hostile, stale = rows["tuned"][0], rows["tuned"][10], rows["tuned"][1]
    texts = [(first, first.response), (hostile, HOSTILE), (stale, "another")]
    sums = {
        row.key: TokenSums(row.key, tuple(text), tuple(float(n % 5) for n in range(len(text)))) for row, text in texts
    }
    return write_report(
        tmp_path_factory.mktemp("summed"), "Sums", Material(summarise(rows, 50), rows, token_sums={"tuned": sums}), {}
    )


def test_transcripts_are_coloured_token_by_token_where_they_were_read(coloured: Path, tmp_path: Path) -> None:
    document, console = browse(coloured, tmp_path, arm="tuned", colour="sum")
    assert console == ""
    assert found(document) == 2, "a response that has changed since is not coloured"
    shades = re.findall(r'<span title="([\d.]+)" style="background: rgba\(213, 94, 0, ([\d.]+)\);">', document)
    shades += [
        pair[::-1]
        for pair in re.findall(r'<span style="background: rgba\(213, 94, 0, ([\d.]+)\);" title="([\d.]+)">', document)
    ]
    assert {(float(value), float(shade)) for value, shade in shades} == {(0, 0), (1, 0.2), (2, 0.4), (3, 0.6), (4, 0.8)}
    assert document.count("<b>│</b>") == 1, "the bar stands where the second attempt begins"
    assert "<title>Sums</title>" in document


def test_without_a_course_there_is_no_choice_of_colours(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert 'name="colour"' not in page
    assert "detector sum" not in page


def test_controls_filter_as_a_reader_moves_them(report: Path, tmp_path: Path) -> None:
    moves = "const f = document.getElementById('filters'); f.elements.arm.value = 'tuned';"
    moves += " f.elements.condition.value = ''; f.elements.min.value = '94'; f.elements.q.value = 'TASK 8';"
    moves += " f.dispatchEvent(new Event('input'));"
    moved = tmp_path / "moved.html"
    moved.write_text(report.read_text(encoding="utf-8").replace("</body>", f"<script>{moves}</script></body>"))
    document, console = browse(moved, tmp_path / "profile")
    assert console == ""
    assert cards(document) == [("tuned", "3")]


def test_the_browser_itself_refuses_a_request_and_would_say_so(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "leak.html"
    leak = '<img src="http://127.0.0.1:9/x.png"></body>'
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", leak))
    _, console = browse(page, tmp_path / "profile")
    assert "Content Security Policy" in console


def test_nothing_is_fetched_from_anywhere(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"url\(\s*['\"]?(?:https?:)?//|@import|fetch\(|XMLHttpRequest|<link[^>]+stylesheet", page)
    assert set(re.findall(r'href="([^"#]+)"', page)) <= {"data:,"}


def test_the_page_opens_with_what_was_done_and_then_names_the_main_effect(report: Path) -> None:
    page, rows = report.read_text(encoding="utf-8"), arms()
    done = opening(Material(summarise(rows, 200), rows), held_out=True)
    assert "answered 12 questions that training had not seen while it was steered" in done[0]
    assert "along one of 12 equally unseen latents (a latent is" in done[0]
    assert "training" not in " ".join(opening(Material(summarise(rows, 50), rows), held_out=False))
    assert "here base, tuned" in done[1]
    told = story(summarise(rows, 200))
    assert told[0].startswith("No clear change: steered, answers of tuned score 85 of 100 on average where those of")
    assert page.index(done[0]) < page.index(done[1]) < page.index(told[0]) < page.index('id="headline"')


@pytest.mark.parametrize(
    ("scores", "effect"),
    [
        (
            (94.0,),
            "Silent resistance: steered, answers of tuned score 94 of 100 on average where those of base",
        ),
        ((22.0, 90.0), "Recovery: steered, answers of tuned score 90"),
        ((60.0, 95.0), "Silent resistance and recovery: steered, answers of tuned score 95"),
        ((20.0,), "No clear change: steered, answers of tuned score 20"),
        ((2.0,), "Harm: steered, answers of tuned score 2 "),
    ],
)
def test_the_headline_names_the_effect_that_there_is(scores: tuple[float, ...], effect: str) -> None:
    rows = {
        "base": [trial("base", i, 20) for i in range(12)],
        "tuned": [trial("tuned", i, *scores) for i in range(12)],
    }
    assert story(summarise(rows, 50))[0].startswith(effect)


def test_the_story_says_where_second_attempts_went() -> None:
    rows = {"base": [trial("base", i, 20, tokens=40) for i in range(20)]}
    shown = {"tokens": 40, "restart_token": 9}
    rows["tuned"] = [trial("tuned", i, 10, 90, **shown) for i in range(4)]
    rows["tuned"] += [trial("tuned", i, 10, 90, tokens=40, restart_token=3) for i in range(4, 10)]
    rows["tuned"] += [trial("tuned", i, 95, 95, **shown) for i in range(10, 18)]
    rows["tuned"] += [trial("tuned", 18, 95, 20, **shown), trial("tuned", 19, 10, tokens=40)]
    told = " ".join(story(summarise(rows, 50))).replace("\u202f", " ")
    assert "In 95 % of its steered responses tuned restarts" in told
    assert "50 % end better than they began (ESR), 5.0 % worse, and 40 % score the same" in told
    assert "79 % of the second attempts began before anything had gone wrong" in told
    assert "20 % of responses recover from a detour that can be seen" in told
    assert "of the 5 responses that show one; base: 0 % of 20" in told


def test_unscored_shares_stand_beside_the_rates(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    headline = page[page.index('id="headline"') : page.index('id="paired"')]
    assert headline.count("8.3\u202f% unscored") == 6
    assert "a &lt;tiny&gt; model" in page
    assert "30 topics" in page


def test_every_figure_is_on_the_page_as_svg_and_as_csv(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    names = {path.stem for path in (report.parent / "figures").glob("*.svg")}
    scores = {"first_scores", "last_scores", "first_vs_last", "unsteered_scores"}
    assert names == {"rates", "restart_position", "thresholds", *scores}
    for name in names:
        assert f'<figure id="{name}">' in page
        ElementTree.parse(report.parent / "figures" / f"{name}.svg")
        table = list(csv.reader((report.parent / "figures" / f"{name}.csv").open(encoding="utf-8")))
        assert len(table) >= 2
        assert {len(row) for row in table} == {len(table[0])}


def test_the_csv_beside_the_rates_figure_holds_the_metrics(report: Path) -> None:
    metrics = summarise(arms(), 200).to_json()
    with (report.parent / "figures" / "rates.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    for row in rows:
        estimate = metrics["arms"][row["arm"]][row["condition"]][row["metric"]]
        assert {key: float(row[key]) for key in estimate} == estimate


def everything() -> Material:
    """Trials of every kind of arm and condition, their metrics, two judges' agreement, and a sweep over mixtures."""
    rows = arms()
    for strength in ("x0.5", "x1.5"):
        rows["base"] += [trial("base", i, 40 + i, condition=f"boost_{strength}") for i in range(12)]
    asked = {"prompt": "{prompt} Look again.", "ablate": [], "clamp": {}}
    ablated = {"prompt": None, "ablate": [7, 9], "clamp": {}}
    rows["asked"] = [trial("asked", i, 20, 60, variant=asked) for i in range(12)]
    rows["ablated"] = [trial("ablated", i, 20, variant=ablated) for i in range(12)]
    for share in (10, 90):
        rows[f"mixed-{share}"] = [trial(f"mixed-{share}", i, 20, 20 + share) for i in range(12)]
    stern = {arm: [replace(row, attempts=row.attempts[:1]) for row in trials] for arm, trials in rows.items()}
    judges = agreement({"mild": rows, "stern": stern}, 50, 0)
    sweeps = {"mixed": {"mixed-10": 0.1, "mixed-90": 0.9}}
    losses = {"tuned": [[(10.0, 2.0), (20.0, 1.0)], [(10.0, 1.9), (20.0, 1.1)]]}
    panel = {"mild": rows, "stern": stern}
    return Material(summarise(rows, 50), rows, agreement=judges, mixtures=sweeps, panel=panel, losses=losses)


def test_sweeps_variants_and_judges_have_figures_where_there_are_data(tmp_path: Path) -> None:
    write_report(tmp_path, "All", everything(), {})
    tables = {
        path.stem: list(csv.DictReader(path.open(encoding="utf-8"))) for path in (tmp_path / "figures").glob("*.csv")
    }
    boosts = [row for row in tables["boost_sweep"] if row["line"] == "base" and row["metric"] == "first_score"]
    assert [float(row["strength / threshold"]) for row in boosts] == [0.5, 1.0, 1.5]
    assert [float(row["value"]) for row in boosts] == [45.5, 35.5, 45.5]
    assert {row["line"] for row in tables["boost_sweep"]} == {"base"}
    mixed = [row for row in tables["mixture_sweep"] if row["metric"] == "multi_attempt_rate"]
    assert [(row["% self-correction rows in the mixture"], float(row["value"])) for row in mixed] == [
        ("0.0", 0), ("10.0", 1), ("90.0", 1)
    ]  # fmt: skip
    assert {row["arm"] for row in tables["prompt_variants"]} == {"base", "tuned", "mixed-10", "mixed-90", "asked"}
    assert {row["ablate"] for row in tables["ablations"]} == {"", "[7, 9]"}
    found = {(row["arm"], row["judge"]): float(row["value"]) for row in tables["judge_rates"]}
    assert (found["asked", "mild"], found["asked", "stern"]) == (1, 0)
    assert [(row["judge"], row["other"]) for row in tables["judge_agreement"]] == [("mild", "stern")]
    scatter = {(row["score"], row["other's"]) for row in tables["judge_scatter"]}
    assert ("60.0", "20.0") in scatter
    assert [(row["run"], row["loss"]) for row in tables["training_loss"]] == [
        ("0", "2.0"), ("0", "1.0"), ("1", "1.9"), ("1", "1.1")
    ]  # fmt: skip


def test_prompting_stands_beside_fine_tuning_only_where_a_run_has_both() -> None:
    both = everything()
    drawn = prompting_and_tuning(both)
    assert drawn is not None
    head, *rows = drawn.table
    values = {row[:4]: row[4] for row in rows}
    assert head[:5] == ("arm", "prompted", "condition", "metric", "value")
    assert values["asked", True, "steered", "multi_attempt_rate"] == 1
    assert values["asked", True, "steered", "esr_rate"] == 1
    assert values["mixed-10", False, "steered", "esr_rate"] == 1
    assert "ablated" not in {row[0] for row in rows}
    assert b"asked (prompt)" in drawn.svg()
    for left_out in ("asked",), ("tuned", "mixed-10", "mixed-90"):
        kept = {arm: rows for arm, rows in both.rows_by_arm.items() if arm not in left_out}
        assert prompting_and_tuning(replace(both, rows_by_arm=kept)) is None


def test_the_likelihood_of_restarts_has_levels_and_differences_from_base(tmp_path: Path) -> None:
    rows = {
        arm: [trial(arm, i, 30, restart_logprobs=[[9, at - i], [20, at + i]]) for i in range(12)]
        for arm, at in (("base", -20.0), ("tuned", -2.0))
    }
    metrics = summarise(rows, 50)
    write_report(tmp_path, "Likely", Material(metrics, rows), {})
    found = list(csv.DictReader((tmp_path / "figures" / "restart_likelihood.csv").open(encoding="utf-8")))
    assert [(row["of"], row["condition"], row["arm"], float(row["value"]), row["n"]) for row in found] == [
        ("arm", "steered", "base", -20.0, "12"),
        ("arm", "steered", "tuned", -2.0, "12"),
        ("arm minus base", "steered", "tuned", 18.0, "12"),
    ]
    assert metrics.paired["tuned-base"]["steered"]["restart_logprob"].value == 18.0
    svg = (tmp_path / "figures" / "restart_likelihood.svg").read_text(encoding="utf-8")
    assert len(set(re.findall(r'<g id="(axes_\d+)"', svg))) == 2


def test_controls_stand_behind_the_figures_and_are_opened_on_paper(tmp_path: Path) -> None:
    page = write_report(tmp_path, "All", everything(), {}).read_text(encoding="utf-8")
    headline, controls = (page[page.index(f'id="{name}"') :].split("</table>")[0] for name in ("headline", "controls"))
    assert "Steered at 0.5 × the threshold" in controls
    assert "Steered at 0.5" not in headline
    assert page.index('id="headline"') < page.index('id="rates"') < page.index('id="controls"')
    printed = tmp_path / "printed.html"
    printed.write_text(page.replace("</body>", "<script>dispatchEvent(new Event('beforeprint'))</script></body>"))
    document, console = browse(printed, tmp_path / "profile")
    assert console == ""
    assert document.count('<details class="paper" open="">') == document.count('<details class="paper"') == 1


def test_a_difference_is_bold_only_where_its_interval_leaves_out_zero(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    paired = page[page.index('id="paired"') :].split("</table>")[0]
    names = headline()
    steered = re.findall(r"<td( class=\"unclear\")?><b>(.*?)</b>", paired)[: len(names)]
    found = [summarise(arms(), 200).paired["tuned-base"]["steered"][name] for name in names]
    assert [not unclear for unclear, _ in steered] == [
        each.low is not None and each.low * each.high > 0 for each in found
    ]
    assert {unclear for unclear, _ in steered} == {"", ' class="unclear"'}


def test_a_figure_with_several_panels_has_them_above_each_other() -> None:
    drawn = {figure.name: figure for figure in draw_figures(everything())}
    for name, panels in (("boost_sweep", 5), ("mixture_sweep", 3)):
        assert len(set(re.findall(r'<g id="(axes_\d+)"', drawn[name].svg))) == panels


def test_figures_for_print_have_the_width_and_the_font_that_were_asked_for(tmp_path: Path) -> None:
    rows = arms()
    figures = [each for each in draw_figures(Material(summarise(rows, 50), rows)) if each.name == "rates"]
    save_for_print(tmp_path, figures, width=3.25, font=7)
    assert (tmp_path / "rates.pdf").read_bytes().startswith(b"%PDF")
    box = re.search(rb"/MediaBox \[ ?0 0 ([0-9.]+)", (tmp_path / "rates.pdf").read_bytes())
    assert box
    assert float(box[1]) == pytest.approx(3.25 * 72, abs=1)
    png = (tmp_path / "rates.png").read_bytes()
    assert int.from_bytes(png[16:20], "big") == pytest.approx(3.25 * 300, abs=2)
    assert 'width="234pt"' in (tmp_path / "rates.svg").read_text()
    assert re.search(r"font-size: 7px", (tmp_path / "rates.svg").read_text())


def test_tables_for_a_paper_hold_the_metrics_numbers_and_stand_as_latex(report: Path) -> None:
    metrics, folder = summarise(arms(), 200).to_json(), report.parent / "tables"
    files = {f"{name}.{form}" for name in ("headline", "paired", "conditions", "not_degenerate") for form in FORMS}
    assert {path.name for path in folder.iterdir()} == files
    for row in csv.DictReader((folder / "paired.csv").open(encoding="utf-8")):
        estimate = metrics["paired"][row["arm"]][row["condition"]][row["metric"]]
        assert {key: row[key] for key in estimate} == {key: "" if v is None else str(v) for key, v in estimate.items()}
    latex = (folder / "headline.tex").read_text(encoding="utf-8")
    lines = [line for line in latex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count("&") - line.count(r"\&") for line in lines} == {len(headline()) + 1}
    assert not re.search(r"(?<!\\)[%_#]", "\n".join(lines))
    assert "82\\,\\% [" in latex
    markdown = (folder / "headline.md").read_text(encoding="utf-8").splitlines()
    assert {line.count("|") for line in markdown if line.startswith("|")} == {len(headline()) + 3}


def test_ratios_have_a_table_on_the_page_and_a_file(tmp_path: Path) -> None:
    rows = arms()
    found = replace(
        summarise(rows, 50),
        resistance={"tuned": Resistance(2.5, 2.1, 3.0, 2.4, 9, 2, 0)},
        retention={"base": Retention(1.0, 1.0, 1.0, 9, 90, 4.0), "tuned": Retention(1.02, 1.01, 1.03, 9, 90, 4.1)},
    )
    page = write_report(tmp_path, "Ratios", Material(found, rows), {}).read_text(encoding="utf-8")
    table = page[page.index('id="ratios"') :].split("</table>")[0]
    assert all(text in table for text in ("≥ 2.50", "2.10 to 3.00", "of 9, 2 at the highest strength", "1.020"))
    told = " ".join(story(found))
    assert "It takes at least 2.50 × the strength (2.10 to 3.00) to drag tuned as far off as base" in told
    assert "1.020 × the base's (1.010 to 1.030)" in told
    said = "\n".join(terminal_tables(found))
    assert re.search(r"tuned +≥ 2\.50 \[2\.10 to 3\.00\] \(of 9, 2 at the highest strength\) +1\.020 \[", said)
    assert (tmp_path / "tables" / "ratios.csv").read_text().splitlines()[1] == "resistance,tuned,2.5,2.1,3.0,9"


def test_the_density_in_the_csv_sums_to_one(report: Path) -> None:
    with (report.parent / "figures" / "first_scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for arm in ("base", "tuned"):
        heights = [float(row[arm]) for row in rows]
        assert sum(heights) - (heights[0] + heights[-1]) / 2 == pytest.approx(1, abs=1e-3)


def test_the_same_run_gives_the_same_bytes(report: Path, tmp_path: Path) -> None:
    rows = {arm: list(reversed(trials)) for arm, trials in arms().items()}
    notes = {"held_out": ["30 topics"], "model": "a <tiny> model"}
    once = [write_report(tmp_path / name, "T", Material(summarise(arms(), 200), arms()), notes) for name in "ab"]
    assert once[0].read_bytes() == once[1].read_bytes()
    assert embedded(rows) == embedded(arms())


def test_figures_without_data_are_left_out() -> None:
    rows = {"base": [trial("base", None, 98, cell_seed=i) for i in range(4)]}
    metrics = summarise(rows, 50)
    assert [figure.name for figure in draw_figures(Material(metrics, rows))] == ["rates", "unsteered_scores"]
    assert headline_arm(["base"]) is None


def test_a_page_without_any_trial_can_still_be_written(tmp_path: Path) -> None:
    page = write_report(tmp_path, "Nothing yet", Material(summarise({"base": []}), {"base": []}), {})
    assert "Nothing yet" in page.read_text(encoding="utf-8")
    assert list((tmp_path / "figures").glob("*")) == []


def test_the_threshold_figure_shows_the_frozen_file_without_latents_at_a_bound() -> None:
    bees = Threshold(5, "bees", norm=0.25, raw=2.0, low=0.2, high=0.3, n=9, bound=None)
    frozen = [bees, replace(bees, latent=6, norm=2.0, bound="high")]
    figures = {f.name: f for f in draw_figures(Material(summarise(arms(), 50), arms(), frozen))}
    header = ("latent", "label", "norm", "low", "high")
    assert figures["thresholds"].table == [header, (5, "bees", 0.25, 0.2, 0.3)]
    assert "at a bound: 1." in figures["thresholds"].caption


def test_embedded_trials_are_whole_cells_of_every_condition_and_most_of_them_steered() -> None:
    rows = {
        arm: [trial(arm, i, 30) for i in range(200)] + [trial(arm, None, 99, cell_seed=i) for i in range(50)]
        for arm in ("base", "tuned", "paper")
    }
    chosen = embedded(rows, most=100)
    assert len(chosen) == 99
    assert {arm: sum(entry["arm"] == arm for entry in chosen) for arm in rows} == dict.fromkeys(rows, 33)
    assert sum(entry["condition"] == "steered" for entry in chosen) == pytest.approx(99 * 6 / 8, abs=3)
    assert chosen == embedded({arm: trials[::-1] for arm, trials in rows.items()}, most=100)


def test_json_cannot_leave_its_script_element() -> None:
    text = script_json({"response": "</script><!--\u2028\u2029"})
    assert not set(text) & {"<", ">", "\u2028", "\u2029"}
