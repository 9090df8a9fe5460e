"""Training rows of one's own that share something with the evaluation are refused, whatever file they come in."""

import json
from pathlib import Path

import pytest

from data_gen.__main__ import main as data
from esr_train.errors import InputError
from esr_train.recipe import Recipe
from esr_train.transcript import SaeRef, Span, SpanKind, Steering, Strength, Transcript, write_transcripts
from eval.cells import Side
from recipes.experiment import open_experiment
from recipes.stages.rows import mix_rows
from recipes.stages.steering_latents import NO_LATENTS, NOT_CALIBRATED, Shared

EVALUATION = Side(frozenset(["How do I fold a sheet?"]), frozenset([7]), frozenset(["owls"]))
SPANS = (Span(SpanKind.OFF_TOPIC, "The owl sleeps."), Span(SpanKind.CUE, " Wait, no."), Span(SpanKind.ANSWER, " Fold."))


def row(prompt: str = "How do I bake?", latent: int = 1, label: str = "kites") -> Transcript:
    steering = Steering(SaeRef("r", "i"), 3, latent, label, Strength(4.0, 0.5))
    return Transcript("s1", prompt, SPANS, "steered", steering=steering)


def trained_on(file: Path, tmp_path: Path) -> str:
    """The fingerprint of an experiment's training file, whose evaluation uses `EVALUATION`."""
    values = {"name": "t", "runs": str(tmp_path), "model": {"path": "none"}, "train": {"data": str(file)}}
    recipe = Recipe.model_validate(values)
    with pytest.MonkeyPatch.context() as patch, open_experiment(recipe) as experiment:
        patch.setattr("recipes.stages.rows.held_out", lambda *_: EVALUATION)
        return mix_rows(experiment, "tuned", {}, Shared(NO_LATENTS, NOT_CALIBRATED)).fingerprint


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (row(prompt="how do I FOLD a\tsheet"), r"share 1 prompt \('How do I fold a sheet\?'\)"),
        (row(latent=7), r"share 1 latent \(7\)"),
        (row(label="Owls!"), r"share 1 off-topic subject \('owls'\)"),
    ],
)
def test_a_transcript_file_of_one_s_own_is_refused_by_name(tmp_path: Path, shared: Transcript, message: str) -> None:
    file = tmp_path / "own.jsonl"
    write_transcripts(file, [row(), shared])
    with pytest.raises(InputError, match=rf"own\.jsonl: training and evaluation {message}\. Remove them"):
        trained_on(file, tmp_path)
    write_transcripts(file, [row()])
    assert len(trained_on(file, tmp_path)) == 64


@pytest.mark.parametrize("format", ["segments", "axolotl", "messages", "normal"])
def test_so_is_every_format_that_can_be_imported(tmp_path: Path, format: str) -> None:
    theirs, ours = tmp_path / f"theirs-{format}", tmp_path / "ours.jsonl"
    prompt = "How do I FOLD a sheet ?"
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Fold."}]
    head = f"<bos><start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n"
    segments = [{"label": False, "text": head}, {"label": True, "text": "Fold.<end_of_turn>"}]
    value = {"segments": segments} if format in ("segments", "axolotl") else {"messages": said}
    theirs.write_text(json.dumps([value] if format == "normal" else value))
    assert data(["import", str(theirs), "--format", format, "--out", str(ours)]) == 0
    with pytest.raises(InputError, match=r"ours\.jsonl: training and evaluation share 1 prompt"):
        trained_on(ours, tmp_path)
    if format == "segments":
        with pytest.raises(InputError, match="theirs-segments: training and evaluation share 1 prompt"):
            trained_on(theirs, tmp_path)
