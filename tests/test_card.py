"""A dataset card: what the hub reads of it, and what a person does."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard

from data_gen.__main__ import main as data
from esr_train.recipe import Recipe, dump_recipe
from esr_train.transcript import SaeRef, Span, SpanKind, Steering, Strength, Transcript, write_transcripts

OFF, CUE, ANSWER = SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER


def rows() -> list[Transcript]:
    spans = (Span(OFF, "Trim the jib."), Span(CUE, " Wait, no."), Span(ANSWER, " Knead it."))
    steering = Steering(SaeRef("some/release", "layer-3"), 3, 7, "owls", Strength(4.0, 0.5))
    steered = [
        Transcript(f"s{i}", "How?", spans, "steered", steering=steering, meta={"model": "tiny"}) for i in range(3)
    ]
    return [*steered, Transcript("n0", "How?", (Span(ANSWER, "Knead it."),), "normal", meta={"model": "tiny"})]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with two arms' files, recipe, provenance and funnel."""
    folder = tmp_path / "run"
    write_transcripts(folder / "data" / "tuned.jsonl", rows())
    write_transcripts(folder / "data" / "other.jsonl", rows()[:1])
    recipe = {
        "name": "mine",
        "model": {"path": "some/model"},
        "prompts": {"path": "p.txt"},
        "data": {"steered": {"rows": 3}, "prompted": {"rows": 2}},
    }
    (folder / "recipe.yaml").write_text(dump_recipe(Recipe.model_validate(recipe)))
    made = {"versions": {"torch": "9.9", "vllm": None}, "commit": "abc123", "dirty": True}
    other = {"versions": {"torch": "1.0"}, "commit": "fff"}
    stages = {
        "data/sources/steered-1": {"done": True, "made": made},
        "data/tuned": {"done": True, "made": made},
        "trials/tuned": {"done": True, "made": other},
    }
    (folder / "stages.json").write_text(json.dumps(stages))
    (folder / "data" / "sources").mkdir()
    (folder / "data" / "sources" / "steered-1.funnel.json").write_text('{"kept": 3, "detour on-topic": 1}')
    return folder


def test_the_hub_finds_files_size_and_no_licence(run: Path, tmp_path: Path) -> None:
    assert data(["card", str(run)]) == 0
    header = DatasetCard.load(run / "data" / "README.md").data.to_dict()
    assert header["license"] == "unknown"
    assert header["size_categories"] == ["n<1K"]
    assert [each["config_name"] for each in header["configs"]] == ["other", "tuned"]
    from datasets import load_dataset

    loaded = load_dataset(str(run / "data"), "tuned", split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["id"] for row in loaded] == ["s0", "s1", "s2", "n0"]
    assert loaded[0]["spans"][1] == {"kind": "cue", "text": " Wait, no."}


def test_a_reader_learns_what_made_the_rows(run: Path) -> None:
    assert data(["card", str(run)]) == 0
    text = (run / "data" / "README.md").read_text()
    for said in (
        "5 conversations of one prompt and one reply",
        "4 of the replies turn back",
        "`some/release`, `layer-3`, layer 3 (4 rows)",
        "Written by `tiny` (5 rows)",
        "## tuned.jsonl\n\n- rows: 4 (normal 1, steered 3)\n",
        "- Model: `some/model`.",
        "- prompted: a detour",
        "Commit: `abc123` with changes",
        "Versions: torch 9.9.",
        "| steered-1 | 3 of 4 | detour on-topic 1 |",
        "10% of the topics to validation and 30% to test",
        "Not chosen yet: set `license`",
    ):
        assert said in text


def test_a_file_without_a_run_says_what_its_rows_say(tmp_path: Path) -> None:
    write_transcripts(tmp_path / "x.jsonl", rows()[:1])
    assert data(["card", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "card.md")]) == 0
    text = (tmp_path / "card.md").read_text()
    assert "No recipe lies beside the files" in text
    assert "## Splits" not in text
    header = yaml.safe_load(text.split("---")[1])
    assert header["configs"] == [{"config_name": "x", "data_files": [{"split": "train", "path": "x.jsonl"}]}]


def test_a_card_that_somebody_completed_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_transcripts(tmp_path / "x.jsonl", rows()[:1])
    (tmp_path / "README.md").write_text("mine")
    assert data(["card", str(tmp_path / "x.jsonl")]) == 2
    assert "there is a card already" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_beside_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_transcripts(tmp_path / "here" / "x.jsonl", rows()[:1])
    there = tmp_path / "there" / "README.md"
    assert data(["card", str(tmp_path / "here" / "x.jsonl"), "--out", str(there)]) == 2
    assert "Put the card into the files' folder" in capsys.readouterr().err
    assert not there.exists()
