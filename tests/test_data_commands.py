"""`esr data` and the trainer's token dump, run as a user runs them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data_gen.__main__ import main as data
from esr_train.__main__ import main as train
from esr_train.masking import IGNORED
from esr_train.transcript import Span, SpanKind, Transcript, read_transcripts, write_transcripts
from tests.conftest import Family

OFF, CUE, ANSWER = SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER
SEGMENTS_FILE, NORMAL_FILE = "dataset_masked_ratio_50pct_train.jsonl", "dataset_normal_responses.json"


def correction(number: int, cue: str = " Wait, that's not right.") -> Transcript:
    spans = (Span(OFF, "Trim the jib."), Span(CUE, cue), Span(ANSWER, " Knead the dough."))
    return Transcript(f"c{number}", f"How do I bake? ({number})", spans, "prompted", meta={"topic": "baking"})


def plain(number: int) -> Transcript:
    return Transcript(f"n{number}", f"How do I sail? ({number})", (Span(ANSWER, "Raise the mast."),), "normal")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve self-correction rows and eight normal ones, a file each."""
    corrections, normals = tmp_path / "corrections.jsonl", tmp_path / "normals.jsonl"
    write_transcripts(corrections, [correction(number) for number in range(12)])
    write_transcripts(normals, [plain(number) for number in range(8)])
    return corrections, normals


@pytest.fixture
def recipe_file(tmp_path: Path, llama: Family) -> Path:
    """A recipe whose model folder holds a Llama-3-style tokenizer and a configuration, but no weights."""
    llama.tokenizer.save_pretrained(tmp_path / "model")
    llama.model.config.save_pretrained(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    values = {"name": "t", "runs": str(tmp_path), "model": {"path": str(tmp_path / "model"), "device": "cpu"}}
    path.write_text(yaml.safe_dump(values))
    return path


def words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


def test_the_paper_s_file_is_imported_labelled_and_given_back(paper, recipe_file, tmp_path, capsys):
    source, rows, tokens, back = paper / SEGMENTS_FILE, *(tmp_path / name for name in ("rows", "tokens", "back"))
    assert data(words("import", source, "--format", "segments", "--out", rows)) == 0
    said = capsys.readouterr().out
    assert "918 rows: 459 with a detour, 459 normal" in said
    assert "middle of a word: line 429" in said

    assert train(words(recipe_file, f"train.data={rows}", "--dump-tokens", tokens)) == 0
    assert "918 rows" in capsys.readouterr().out
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe_file.parent / "model")
    dumped = [json.loads(line) for line in tokens.read_text().splitlines()]
    wanted = [json.loads(line)["segments"] for line in source.read_text().splitlines()]
    assert len(dumped) == len(wanted) == 918
    for number, (row, segments) in enumerate(zip(dumped, wanted, strict=True), start=1):
        trained = "".join(part["text"] for part in segments if part["label"])
        kept = [value for value in row["labels"] if value != IGNORED]
        assert tokenizer.decode(kept) == trained or (number == 429 and trained.endswith(tokenizer.decode(kept)))
        assert all(value in (IGNORED, token) for value, token in zip(row["labels"], row["input_ids"], strict=True))

    assert data(words("export", rows, "--format", "segments", "--out", back)) == 0
    assert back.read_bytes() == source.read_bytes()


def test_a_mixture_has_the_share_asked_for_to_the_row_and_is_seeded(files, tmp_path):
    def mixed(name: str, seed: int) -> list[Transcript]:
        out = tmp_path / name
        assert data(words("mix", *files, "--self-correction", 0.6, "--seed", seed, "--out", out)) == 0
        return read_transcripts(out)

    first = mixed("a", 3)
    assert (sum(row.corrects for row in first), len(first)) == (12, 20)
    assert mixed("b", 3) == first
    assert [row.id for row in mixed("c", 4)] != [row.id for row in first]


def test_a_sweep_writes_the_paper_s_nine_shares(files, tmp_path):
    assert data(words("mix", *files, "--sweep", "--out", tmp_path / "sweep")) == 0
    made = sorted((tmp_path / "sweep").iterdir())
    assert [path.name for path in made] == [f"{percent}.jsonl" for percent in range(10, 100, 10)]
    for path in made:
        rows = read_transcripts(path)
        corrections, share = sum(row.corrects for row in rows), int(path.stem) / 100
        assert corrections == 12 or len(rows) - corrections == 8
        assert abs(corrections - share * len(rows)) < 1


@pytest.mark.parametrize("extra", [("--self-correction", "1.2"), ("--sweep", "10,much"), ("--sweep", "10,120")])
def test_a_share_that_is_none_is_refused_and_nothing_is_written(files, tmp_path, capsys, extra):
    before = sorted(tmp_path.iterdir())
    assert data(words("mix", *files, *extra, "--out", tmp_path / "out")) == 2
    assert capsys.readouterr().err.startswith(f"error: {extra[0]}: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_row_that_two_files_share_is_mixed_once(files, tmp_path, capsys):
    assert data(words("mix", files[0], files[0], "--out", tmp_path / "out")) == 0
    assert "12 rows left out: an earlier file holds them, too" in capsys.readouterr().out
    assert len(read_transcripts(tmp_path / "out")) == 12


def test_the_paper_s_nine_mixtures_have_its_sizes(paper, tmp_path, capsys):
    imported = tmp_path / "detours.jsonl", tmp_path / "normal.jsonl"
    assert data(words("import", paper / SEGMENTS_FILE, "--format", "segments", "--out", imported[0])) == 0
    assert data(words("import", paper / NORMAL_FILE, "--format", "normal", "--out", imported[1])) == 0
    sweep = words("mix", *imported, "--sweep", "--rows", 918, "--out", tmp_path / "sweep")
    capsys.readouterr()

    # The files hold 459 of the self-correction rows; what the paper had beyond them was not released.
    assert data(sweep) == 2
    assert "60% of 918 rows are 550 self-correction rows, and there are 459 (91 too few)" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()

    assert data([*sweep, "--repeat"]) == 0
    assert "459 rows left out: an earlier file holds them, too" in capsys.readouterr().out
    found = {}
    for path in sorted((tmp_path / "sweep").iterdir()):
        rows = read_transcripts(path)
        found[int(path.stem)] = (sum(row.corrects for row in rows), sum(not row.corrects for row in rows))
        assert len({row.id for row in rows}) == len(rows)
    assert found == {
        10: (91, 760),
        20: (183, 734),
        30: (275, 642),
        40: (367, 550),
        50: (459, 459),
        60: (550, 367),
        70: (642, 275),
        80: (734, 183),
        90: (826, 91),
    }


def test_a_share_can_count_trained_tokens(files, recipe_file, llama, tmp_path):
    from esr_train.masking import trained_tokens

    out, tokenizer = tmp_path / "out", recipe_file.parent / "model"
    for policy in ("masked", "answer_only"):
        share = words("--self-correction", 0.3, "--tokenizer", tokenizer, "--loss", policy)
        assert data(words("mix", *files, *share, "--out", out)) == 0
        rows = read_transcripts(out)
        weights = [trained_tokens(llama.tokenizer, row, policy) for row in rows]
        corrected = sum(weight for weight, row in zip(weights, rows, strict=True) if row.corrects)
        assert sum(not row.corrects for row in rows) == 8
        assert abs(corrected - 0.3 * sum(weights)) <= max(weights) / 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--rows", "0", "--sweep"), "error: --rows: 0 is no number of them"),
        (("--rows", "9"), "error: --rows: a number of rows needs a share"),
        (("--repeat",), "error: --repeat: "),
        (("--rows", "9", "--sweep", "--tokenizer", "x"), "error: --rows: a number of rows and a share of tokens"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(files, tmp_path, capsys, extra, message):
    assert data(words("mix", *files, *extra, "--out", tmp_path / "out")) == 2
    assert capsys.readouterr().err.startswith(message)


def test_rows_are_exported_in_the_style_of_the_model_that_made_them_and_in_no_other(recipe_file, tmp_path, capsys):
    rows, out, model = tmp_path / "rows.jsonl", tmp_path / "out.jsonl", str(recipe_file.parent / "model")
    write_transcripts(rows, [replace(correction(0), meta={"model": model})])
    export = ("export", rows, "--format", "segments", "--out", out)
    assert data(words(*export)) == 0
    assert "<|start_header_id|>" in out.read_text()
    out.unlink()
    capsys.readouterr()
    assert data(words(*export, "--style", "chatml")) == 2
    said = capsys.readouterr().err
    assert f"--style: the rows were made by {model}, whose chat template is not of the style chatml" in said
    assert "Take --style llama3" in said
    assert not out.exists()
    write_transcripts(rows, [replace(correction(0), meta={"model": "./gone"})])
    assert data(words(*export, "--style", "chatml")) == 0
    assert "not checked against the chat template of ./gone" in capsys.readouterr().out
    assert "<|im_start|>assistant" in out.read_text()


def test_an_export_says_what_it_loses(files, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert data(words("export", files[0], "--format", "normal", "--out", out)) == 0
    assert "12 rows with a detour" in capsys.readouterr().out
    assert json.loads(out.read_text()) == []


def test_stats_count_rows_cues_topics_and_trained_tokens(tmp_path, recipe_file, capsys):
    path = tmp_path / "rows.jsonl"
    cues = [" Wait, that's not it.", " Wait, that's  NOT right.", " Oops, I drifted.", " Hold on, wrong topic."]
    write_transcripts(path, [*(correction(number, cue) for number, cue in enumerate(cues)), plain(0)])
    (tmp_path / "rows.funnel.json").write_text('{"kept": 5, "detour on-topic": 3, "judge failed": 2}')
    assert data(words("stats", path, "--tokenizer", recipe_file.parent / "model")) == 0
    out = capsys.readouterr().out
    assert "rows: 5 (normal 1, prompted 4)" in out
    assert "self-correction: 4 (80.0%)" in out
    assert "topics: 1\n  latents: 0\n" in out
    # Openings of three words: two alike and two others, so 1/2 + 1/4 * 2 + 1/4 * 2 bits.
    assert (
        'cues: 4, 3 distinct openings of three words, entropy 1.50 bits; commonest "wait, that\'s not" (50.0%)' in out
    )
    assert "trained tokens: " in out
    assert "rows: 5 of 10 candidates passed (50.0%)\n  detour on-topic: 3\n  judge failed: 2" in out


def test_the_trained_share_of_stats_is_that_of_the_labels(tmp_path, recipe_file, llama, capsys):
    from esr_train.masking import label

    path = tmp_path / "rows.jsonl"
    write_transcripts(path, [correction(0)])
    for policy in ("masked", "unmasked"):
        labels = label(llama.tokenizer, correction(0), policy).labels
        share = sum(value != IGNORED for value in labels) / len(labels)
        data(words("stats", path, "--tokenizer", recipe_file.parent / "model", "--loss", policy))
        assert f"trained tokens: {share:.1%}" in capsys.readouterr().out


def test_stats_of_a_run_directory_count_every_arm_s_file(tmp_path, capsys):
    folder = tmp_path / "run" / "data"
    write_transcripts(folder / "tuned.jsonl", [correction(0)])
    write_transcripts(folder / "normal.jsonl", [plain(0)])
    (folder / "tuned.candidates.jsonl").write_text("not a transcript\n")
    (folder / "sources").mkdir()
    (folder / "sources" / "steered-1.funnel.json").write_text('{"kept": 1}')
    assert data(words("stats", tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith(".jsonl:")] == [
        f"{folder / 'normal.jsonl'}:",
        f"{folder / 'tuned.jsonl'}:",
    ]
    assert "steered-1: 1 of 1 candidates passed" in out


def test_the_page_of_stats_draws_every_file_and_funnel_and_asks_for_nothing(tmp_path, recipe_file, capsys):
    folder, out = tmp_path / "run" / "data", tmp_path / "stats.html"
    write_transcripts(folder / "tuned.jsonl", [correction(number) for number in range(3)])
    write_transcripts(folder / "normal.jsonl", [plain(0)])
    (folder / "sources").mkdir()
    (folder / "sources" / "steered-1.funnel.json").write_text('{"kept": 3, "detour on-topic": 7}')
    (folder / "sources" / "prompted-2.requests.json").write_text('{"asked": 12}')
    tokenizer = recipe_file.parent / "model"
    assert data(words("stats", folder.parent, "--html", out, "--tokenizer", tokenizer)) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text()
    assert [f"<h2>{name}</h2>" in page for name in ("tuned.jsonl", "normal.jsonl")] == [True, True]
    assert "10 candidates; 30.0% were kept" in page
    assert "12 asked" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|@import|url\(\s*['"]?http|<script""", page)
    assert "default-src 'none'" in page


def test_a_preview_is_printed_or_written_as_a_page(files, recipe_file, tmp_path, capsys):
    assert data(words("preview", files[0], "--rows", 2)) == 0
    out = capsys.readouterr().out
    assert ("c1 (prompted)" in out, "c2 (prompted)" in out) == (True, False), "the first two rows"
    page = tmp_path / "page.html"
    tokenizer = recipe_file.parent / "model"
    assert data(words("preview", files[0], "--rows", 1, "--html", page, "--tokenizer", tokenizer)) == 0
    assert "tokens trained" in page.read_text()


READ_ONE = (
    ("preview", "{}"),
    ("stats", "{}"),
    ("card", "{}", "--out", "card.md"),
    ("mix", "{}", "--out", "out"),
    ("export", "{}", "--format", "normal", "--out", "out"),
    ("import", "{}", "--format", "messages", "--out", "out"),
)
FILES = {
    "nowhere.jsonl": None,
    "empty.jsonl": "",
    "blank.jsonl": "\n \n",
    "cut.jsonl": '{"id": "a", "prom',
    "list.jsonl": "[1]\n",
    "span.jsonl": '{"id": "a", "prompt": "p", "spans": [{"kind": "answr", "text": "x"}], "source": "normal"}\n',
    "infinite.jsonl": '{"id": "a", "prompt": "p", "spans": [], "source": "normal", "meta": {"x": Infinity}}\n',
    "binary.jsonl": "\ud800",
    "folder.jsonl": "/",
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("command", READ_ONE, ids=[command[0] for command in READ_ONE])
def test_a_file_without_rows_is_one_paragraph_and_nothing_is_written(tmp_path, monkeypatch, capsys, command, file):
    monkeypatch.chdir(tmp_path)
    content = FILES[file]
    if content == "/":
        Path(file).mkdir()
    elif content is not None:
        Path(file).write_bytes(content.encode("utf-8", "surrogatepass"))
    said = refused(capsys, *(word.format(file) for word in command))
    assert file in said
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else [file])


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("preview rows.jsonl --rows 0", "--rows"),
        ("preview rows.jsonl --rows -3", "--rows"),
        ("mix rows.jsonl --out out --self-correction 0.5 --rows -1", "--rows"),
        ("mix rows.jsonl --out out --self-correction nan", "--self-correction"),
        ("mix rows.jsonl --out out --self-correction -0.1", "--self-correction"),
        ("mix rows.jsonl --out out --self-correction 0.5", "normal"),
        ("mix rows.jsonl --out out --sweep=-10,50", "--sweep"),
        ("mix rows.jsonl --out out --sweep=", "--sweep"),
        ("mix rows.jsonl rows.jsonl nowhere.jsonl --out out", "nowhere.jsonl"),
        ("mix rows.jsonl --out folder", "folder"),
        ("mix rows.jsonl --sweep 100 --out rows.jsonl", "rows.jsonl"),
        ("export rows.jsonl --format normal --out folder", "folder"),
        ("preview rows.jsonl --html folder", "folder"),
        ("stats rows.jsonl --html folder", "folder"),
        ("stats rows.jsonl --tokenizer folder", "folder"),
        ("preview rows.jsonl --tokenizer nowhere", "nowhere"),
        ("stats folder", "folder"),
        ("card folder", "folder"),
        ("card rows.jsonl --out rows.jsonl", "rows.jsonl"),
        ("labels recipe.yaml --texts rows.jsonl --out labels.txt", "--out"),
        ("labels recipe.yaml --texts rows.jsonl --out labels.jsonl --latents -1", "--latents"),
        ("labels recipe.yaml --texts rows.jsonl --out labels.jsonl --concreteness 101", "--concreteness"),
        ("labels recipe.yaml --texts rows.jsonl --out labels.jsonl --concreteness nan", "--concreteness"),
        ("labels folder --texts rows.jsonl --out labels.jsonl", "folder"),
        ("preview rows.jsonl --tokenizer ./nowhere", "error: --tokenizer ./nowhere: the folder"),
        ("generate nowhere.yaml", "nowhere.yaml"),
        ("generate folder", "folder"),
        ("generate recipe.yaml --arm other", "--arm"),
        ("generate recipe.yaml data.normal.rows=-1", "data.normal.rows"),
        ("generate recipe.yaml data.normal.rows=many", "data.normal.rows"),
    ],
)
def test_a_command_that_cannot_be_carried_out_is_one_paragraph(files, tmp_path, monkeypatch, capsys, words, flag):
    monkeypatch.chdir(tmp_path)
    files[0].rename("rows.jsonl")
    Path("folder").mkdir()
    Path("recipe.yaml").write_text("name: a\nmodel: {path: nowhere}\n")
    before = sorted(tmp_path.rglob("*"))
    assert flag in refused(capsys, *words.split(" "))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["[]", '{"kept": "many"}', "{", '{"kept": 1e999}'])
@pytest.mark.parametrize("kind", ["funnel", "requests"])
def test_counts_beside_a_file_that_are_none_are_named(files, tmp_path, capsys, kind, content):
    (tmp_path / f"rows.{kind}.json").write_text(content)
    assert f"rows.{kind}.json" in refused(capsys, "stats", str(files[0]))


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Run a command that must end as bad input; its one paragraph."""
    capsys.readouterr()
    assert data(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said
