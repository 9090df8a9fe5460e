"""Rebuild the tiny world's shipped assets from scratch: `python -m tools.tiny_world.build`.

Writes, under `recipes/tiny/assets/`: for each family a model folder (`llama`, `gemma`), its SAE (`llama-sae`,
`gemma-sae`: sae-lens inference format) with `labels.jsonl`, and for both `prompts.jsonl` and `vocabulary.json`; beside
it, under `tasks/`, the questions of the task `tiny_naming`.
The same seed gives the same files on the same machine and library versions.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from esr_train.files import write_json, write_jsonl
from esr_train.models import ROOT
from tools.tiny_world.language import how_to, lessons, naming_task, reserved_questions, topics, vocabulary
from tools.tiny_world.pretrain import encode_exchanges, train_model
from tools.tiny_world.sae_training import explained_variance, label_latents, residuals, save_sae, train_sae
from tools.tiny_world.tokenizer import build_tokenizer

ASSETS = ROOT / "recipes" / "tiny" / "assets"
EXCHANGES = {"llama": 45_000, "gemma": 45_000}
"""Training exchanges of each family's model."""
VOCABULARY_SIZE = 3072
PROMPTS_PER_TOPIC = 14
NAMING = 416, 8
"""Texts of the task `tiny_naming`, and subjects to choose from."""


def main() -> None:
    """The command line: each family in a process of its own, with one thread."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_world.build", description=__doc__)
    parser.add_argument("--family", choices=EXCHANGES, action="append", help="build only this one (default: both)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        building = [pool.submit(build, each, options.seed, options.out) for each in options.family or EXCHANGES]
        for future in building:
            print(future.result())
    build_shared(options.out, options.seed)


def build(family: str, seed: int, out: Path) -> str:
    """Train one family's tokenizer, model and SAE and put their folders into `out`; returns a line about them."""
    torch.set_num_threads(1)
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    made = lessons(EXCHANGES[family], seed)
    texts = (text for lesson in made for each in lesson for text in (each.prompt, each.reply))
    tokenizer = build_tokenizer(texts, family, VOCABULARY_SIZE)
    model = train_model(family, tokenizer, [encode_exchanges(tokenizer, lesson) for lesson in made], seed)
    with tempfile.TemporaryDirectory(dir=out) as aside:
        _save_model(model, tokenizer, Path(aside) / family)
        facts = _build_sae(model, tokenizer, Path(aside) / f"{family}-sae", family, seed)
        for name in (family, f"{family}-sae"):
            shutil.rmtree(out / name, ignore_errors=True)
            (Path(aside) / name).rename(out / name)
    return f"{family}: {facts} in {(time.monotonic() - started) / 60:.1f} minutes"


def build_shared(out: Path, seed: int) -> None:
    """Write the prompts (none of which the models were trained on) and the judge's vocabulary."""
    rows = ({"prompt": each.prompt, "topic": each.topic} for each in reserved_questions(PROMPTS_PER_TOPIC, seed))
    write_jsonl(out / "prompts.jsonl", rows)
    write_json(out / "vocabulary.json", vocabulary())
    write_jsonl(out.parent / "tasks" / "tiny_naming.jsonl", naming_task(*NAMING, seed + 1000))


def _save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()


def _build_sae(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, family: str, seed: int) -> str:
    """Train the SAE on replies about every topic; returns what it explains and covers, in words."""
    rng = Random(seed + 1)
    answers = [how_to(topic, rng) for _ in range(40) for topic in topics()]
    rows = encode_exchanges(tokenizer, answers)
    states = residuals(model, rows, f"{family} activations")
    ends = [row.index(tokenizer.eos_token_id) for row in rows]
    sae = save_sae(
        train_sae([each[end:] for each, end in zip(states, ends, strict=True)], seed, f"tiny-{family}"), folder
    )
    held_out = len(topics()) * 10
    labels = label_latents(sae, states[:held_out], [each.topic for each in answers[:held_out]])
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels), encoding="utf-8")
    explained = explained_variance(sae, torch.cat(states[-200:]))
    covered = len({row["description"] for row in labels})
    return f"explained variance {explained:.3f}, {len(labels)} labelled latents for {covered} topics"


if __name__ == "__main__":
    main()
