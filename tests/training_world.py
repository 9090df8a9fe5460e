"""A tiny experiment on disk for the training tests: model, SAE, transcripts, recipe."""

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from trl.trainer.utils import add_fused_lm_head

from esr_train.files import write_json, write_jsonl
from esr_train.recipe import Recipe
from esr_train.training.dataset import TrainingRow, read_rows
from esr_train.training.injection import LiveInjection
from esr_train.training.settings import lora_config
from esr_train.transcript import SaeRef, Span, SpanKind, Steering, Strength, Transcript, write_transcripts
from eval.calibration import Threshold, save_thresholds
from eval.cells import split_latents
from recipes.resources import Resources
from recipes.stages.steering_latents import threshold_key

ROOT = Path(__file__).parent.parent
SAE = SaeRef("saes", "first")
LAYER = 1
LATENTS = 12
TOPICS = ("baking", "sailing", "folding", "chess")
DETOURS = ("First, knead the dough and dust the flour.", "Raise the mast and trim the jib before the gale.")
ANSWERS = (
    "Start by tucking one corner into the other.",
    "Smooth it.",
    "Shape the loaf near the oven, because it holds.",
)


def transcripts(steered: int = 8, normal: int = 4) -> list[Transcript]:
    """Self-correction rows, each steered by a latent of its own, and normal rows."""
    made = []
    for i in range(steered):
        spans = (
            Span(SpanKind.OFF_TOPIC, DETOURS[i % 2] * (1 + i % 3)),
            Span(SpanKind.CUE, " Wait, that's not right."),
            Span(SpanKind.ANSWER, " " + ANSWERS[i % 3]),
        )
        steering = Steering(SaeRef("saes", "first"), LAYER, i % LATENTS, None, Strength(raw=4.0 + i, norm=1.0))
        made.append(Transcript(f"s{i}", "How do I fold a fitted sheet?", spans, "steered", steering=steering))
    for i in range(normal):
        answer = Span(SpanKind.ANSWER, ANSWERS[i % 3] * (1 + i % 2))
        made.append(Transcript(f"n{i}", f"How do I trim the jib? ({i})", (answer,), "normal"))
    return made


def preferences(steered: int = 8, normal: int = 4) -> list[Transcript]:
    """The same rows, each preferred to its detour that goes on, or to a restart that nothing calls for."""
    made = []
    for row in transcripts(steered, normal):
        first = row.spans[0]
        if row.steering:
            rejected = (Span(first.kind, f"{first.text} Then knead the mast."),)
        else:
            again = Span(SpanKind.ANSWER, f" {first.text}")
            rejected = (Span(SpanKind.ANSWER, first.text[:9]), Span(SpanKind.CUE, "\n\nWait, no."), again)
        made.append(replace(row, rejected=rejected))
    return made


def write_world(folder: Path, family: Any, rows: list[Transcript] | None = None) -> None:
    """Write model, tokenizer, SAE and data under `folder`; run with it as the current directory."""
    family.model.save_pretrained(folder / "model")
    family.tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(1)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=family.model.config.hidden_size, d_sae=LATENTS))
    sae.W_dec.data = torch.randn_like(sae.W_dec)
    sae.cfg.metadata.hook_name = f"blocks.{LAYER}.hook_resid_post"
    sae.save_model(folder / "saes" / "first")
    write_transcripts(folder / "runs" / "t" / "data" / "tuned.jsonl", transcripts() if rows is None else rows)


def recipe(family: str = "llama", live: bool = True, args: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """A recipe for the world: fp32 on the CPU, no warm-up, so that every step changes the adapter."""
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "warmup_steps": 0,
        "logging_steps": 1,
        **(args or {}),
    }
    section: dict[str, Any] = {"args": settings, "lora": {"r": 4}, "max_length": 512, **train}
    if live:
        section.setdefault("live", {"strength": [0.8, 1.3]})
    attention = "sdpa" if family == "llama" else "eager"
    model = {"path": "model", "dtype": "float32", "attn_implementation": attention, "device": "cpu"}
    return Recipe.model_validate({"name": "t", "model": model, "train": section})


def probed(section: Recipe, every: int = 2) -> Recipe:
    """The recipe with a behavioural probe, its files written to the current directory as if it were calibrated."""
    write_jsonl("labels.jsonl", ({"index": i, "description": TOPICS[i % len(TOPICS)]} for i in range(LATENTS)))
    write_jsonl("prompts.jsonl", ({"prompt": f"How does {t} go? ({i})", "topic": t} for t in TOPICS for i in range(4)))
    # Letters, which an untrained model writes: its replies to the training prompts then score differently.
    letters = {"sheet": ["a", "e", "s", "t"], "jib": ["i", "o", "n", "r"]}
    write_json("vocabulary.json", {**{topic: [f"{topic}tool"] for topic in TOPICS}, **letters})
    values = section.model_dump()
    values["train"]["probe"] = {"every": every, "trials": 2}
    more = Recipe.model_validate(
        {
            **values,
            "sae": {"release": SAE.release, "id": SAE.id, "labels": "labels.jsonl"},
            "judge": {"vocabulary": "vocabulary.json"},
            "prompts": {"path": "prompts.jsonl", "splits": {"validation": 0.5, "test": 0.25}},
            "sampling": {"max_new_tokens": 6},
        }
    )
    found = [Threshold(i, TOPICS[i % len(TOPICS)], 1.0, 3.0, 0.9, 1.1, 20, None) for i in range(LATENTS)]
    resources = Resources(more)
    save_thresholds(more.directory / "thresholds.json", threshold_key(resources), found)
    directions = [resources.sae().direction(each.latent, 3.0, each.label) for each in found]
    dealt = split_latents(directions, resources.prompts().topics, more.prompts.splits)
    splits = {split: [each.latent for each in group] for split, group in dealt.items()}
    write_json(more.directory / "latents.json", {"funnel": {}, "residual_norm": 3.0, "splits": splits})
    return more


def read_six(folder: Path, family: Any) -> list[TrainingRow]:
    """Six rows of different lengths, the first four of them steered."""
    write_transcripts(folder / "data.jsonl", transcripts(steered=4, normal=2))
    return read_rows(recipe(family.name), folder / "data.jsonl", family.tokenizer)


def with_adapter(family: Any, attention: str = "eager") -> Any:
    """A copy of the model with TRL's fused loss and an adapter that already does something."""
    base = copy.deepcopy(family.model)
    base.set_attn_implementation(attention)
    add_fused_lm_head(base)
    torch.manual_seed(0)
    model = get_peft_model(base, lora_config(recipe(lora={"r": 4, "lora_dropout": 0.0})))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn_like(weight)
    return model


def gradients(model: Any, batch: dict[str, torch.Tensor], live: LiveInjection) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch under its rows' steering."""
    model.zero_grad()
    inputs = dict(batch)
    with live.steering(model, inputs, epoch=0):
        loss = model(**inputs, use_cache=False, fused_lm_head=True).loss
        loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def kill_training(words: list[str], folder: Path, checkpoint: int) -> None:
    """Start `esr train` on the CPU, and kill it as soon as a checkpoint is there; no adapter may be finished."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "esr_train", *words]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (folder / "checkpoints" / f"checkpoint-{checkpoint}" / "trainer_state.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "adapter_config.json").exists()
