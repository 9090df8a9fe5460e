"""LoRA, QLoRA and steered generation at the shapes of Llama-3.1-8B and Gemma-2-9B, with random weights, on one GPU.

    bash benchmarks/gpu.sh                       writes results/gpu.md
    bash benchmarks/gpu.sh --small               small shapes on the CPU: shows that it runs, writes nothing

MFU = real tokens/s x 4 x parameters / peak bf16 operations/s. LoRA costs 4 operations for every parameter and token:
2 forward, 2 to carry the gradient back; the frozen weights' own gradients are not computed. Attention scores and what
gradient checkpointing computes twice are not counted.

In generation every row is steered along a direction of its own, and none stops early. The limit is what reading the
weights once a step would allow at the bandwidth of a copy on the same device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "gpu.md"
ROWS, STEPS, LATENTS = 256, 16, 8
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "gemma-2-9b": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
    },
}
SMALL = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 32}
LAYERS = {"llama-3.1-8b": 19, "gemma-2-9b": 20}
"""Where the recipes steer."""
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, live injection": {"live": {}},
    "LoRA, live injection, packed": {"live": {}, "args": {"packing": True, "per_device_train_batch_size": 2}},
    "LoRA, live injection, gradient checkpointing": {"live": {}, "args": {"gradient_checkpointing": True}},
    "QLoRA (NF4), live injection, gradient checkpointing": {
        "live": {},
        "quantization": "nf4",
        "args": {"gradient_checkpointing": True, "optim": "paged_adamw_8bit"},
    },
}


GENERATION = "generation"
DECODED, ROUNDS = 32, 1
ROWS_OF_A_BATCH = (32, 256)


def main() -> None:
    """Measure every shape and variant, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes on the CPU; writes nothing")
    parser.add_argument("--attention", default=None, help="eager, sdpa or flash_attention_2; the recipes' unless given")
    parser.add_argument("--folder", default=None, help="where models are written: a place with 20 GB, best in memory")
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, options)))
        return
    import torch

    if not options.small and not torch.cuda.is_available():
        sys.exit("There is no GPU here. `--small` runs small shapes on the CPU.")
    training: list[str] = []
    generation: list[str] = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            options.folder = folder
            in_process(shape, "model", options)
            for variant in (GENERATION, *VARIANTS):
                if variant == GENERATION:
                    generation += generation_lines(shape, options)
                else:
                    training.append(training_line(shape, variant, options))
                if not options.small:
                    RESULTS.write_text(page(training, generation), encoding="utf-8")
            options.folder = str(Path(folder).parent)
    print(page(training, generation))


def one(shape: str, variant: str, options: argparse.Namespace) -> Any:
    """What a process of its own does: write the model, or measure one variant."""
    os.chdir(options.folder)
    if variant == "model":
        return write_model(shape, options.small)
    if variant == GENERATION:
        return measure_generation(shape, options.small, options.attention)
    return measure(shape, variant, options.small, options.attention)


def in_process(shape: str, variant: str, options: argparse.Namespace) -> Any:
    """What `one` returns in a process of its own, or the reason why it failed."""
    command = [sys.executable, __file__, "--one", shape, variant, "--folder", options.folder]
    command += ["--small"] if options.small else []
    command += ["--attention", options.attention] if options.attention else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return (done.stderr.strip().splitlines() or ["killed"])[-1][:120]
    print(f"{shape}, {variant}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def training_line(shape: str, variant: str, options: argparse.Namespace) -> str:
    """One row of the table of training; a variant that fails says why."""
    found = in_process(shape, variant, options)
    if isinstance(found, str):
        return f"| {shape} | {variant} | failed: {found} | | | | |"
    mfu = f"{found['mfu']:.1%}" if found.get("mfu") else "-"
    return (
        f"| {shape} | {variant} | {found['tokens_per_second']:,.0f} | {mfu} | {found['peak_memory_gib']:.1f} "
        f"| {found['mean']:.0f} / {found['longest']} | {found['attention']} |"
    )


def generation_lines(shape: str, options: argparse.Namespace) -> list[str]:
    """Rows of the table of generation."""
    found = in_process(shape, GENERATION, options)
    if isinstance(found, str):
        return [f"| {shape} | failed: {found} | | | | |"]
    limit = found.pop("limit")
    memory = found.pop("peak_memory_gib")
    return [
        f"| {shape} | {name} | {rate:,.0f} | {rate / limit[name.split(' ')[0]]:.0%} | {memory:.1f} |"
        for name, rate in found.items()
    ]


def measure(shape: str, variant: str, small: bool, attention: str | None) -> dict[str, Any]:
    """Train some steps of the folder's model; figures of the log's later half, when everything is warm."""
    from benchmarks.train import transcripts
    from esr_train.models import load_model, load_tokenizer
    from esr_train.recipe import Recipe
    from esr_train.training.dataset import read_rows, table
    from esr_train.training.injection import LiveInjection
    from esr_train.training.settings import trainer_config
    from esr_train.training.trainer import build_trainer
    from esr_train.transcript import write_transcripts

    write_transcripts(Path("data.jsonl"), transcripts(24 if small else ROWS))
    section = Recipe.model_validate(recipe(shape, variant, small, attention))
    args = trainer_config(section, Path("checkpoints"))
    rows = read_rows(section, Path("data.jsonl"), load_tokenizer(section.model))
    live = section.train.live and LiveInjection(
        section.train.live, directions(table(rows), shape, small), 1 if small else LAYERS[shape], seed=0
    )
    model = load_model(section.model, quantization=section.train.quantization, for_training=True)
    trainer = build_trainer(section, args, model, load_tokenizer(section.model), rows, live)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry]
    warm = log[len(log) // 2 :]
    found = {key: sum(e[key] for e in warm) / len(warm) for key in ("tokens_per_second", "mfu") if key in warm[0]}
    counts = [len(row.labelled.input_ids) for row in rows]
    more = {"mean": sum(counts) / len(counts), "longest": max(counts), "attention": section.model.attn_implementation}
    return {**found, "peak_memory_gib": log[-1]["peak_memory_gib"], **more}


def measure_generation(shape: str, small: bool, attention: str | None) -> dict[str, Any]:
    """Tokens a second of the engine and of transformers' own `generate`, and what the weights' bytes would allow."""
    import torch

    from benchmarks.decode import generated
    from esr_train.models import load_model, load_tokenizer
    from esr_train.recipe import Recipe
    from esr_train.steering.batch_size import choose_rows
    from esr_train.steering.transformers_engine import TransformersEngine

    section = Recipe.model_validate(recipe(shape, "LoRA", small, attention)).model
    model, tokenizer = load_model(section), load_tokenizer(section)
    step = sum(p.numel() * p.element_size() for p in model.parameters()) / copied_bytes_a_second(model.device)
    sizes, count = ROWS_OF_A_BATCH, 8 if small else DECODED
    chosen = choose_rows(model, 128)
    found: dict[str, Any] = {"limit": {str(rows): rows / step for rows in {*sizes, chosen}}}
    for rows in sorted({*sizes, chosen}):
        engine = TransformersEngine(model, tokenizer, batch_rows=rows)
        engine._stop_ids = frozenset()
        name = f"{rows} rows{', chosen by itself' if rows == chosen else ''}, "
        for temperature, how in ((0.0, "greedy"), (0.6, "sampled")):
            for steered in (False, True):
                asked = {"rows": rows, "tokens": count, "temperature": temperature, "steered": steered}
                said = f"{name}{how}{', steered per row' if steered else ''}"
                found[said] = rate(partial(generated, engine, asked))
    prompts = torch.full((sizes[0], 48), 100, device=model.device)
    plain = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    found[f"{sizes[0]} rows, greedy, transformers' `generate`"] = rate(
        lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **plain)[:, 48:].tolist()
    )
    peak = 0.0 if small else torch.cuda.max_memory_allocated() / 2**30
    return {**found, "peak_memory_gib": peak}


def rate(work: Callable[[], list[list[int]]]) -> float:
    """Tokens a second, of work that returns each row's tokens: the best of some rounds behind a warm one."""
    seconds = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        count = sum(map(len, work()))
        seconds.append((time.perf_counter() - start) / count)
    return 1 / min(seconds[1:])


def copied_bytes_a_second(device: Any) -> float:
    """Bytes read and written in a second by a copy on the device."""
    import torch

    source = torch.empty(2**26 if device.type == "cpu" else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for the device
        best = max(best, 2 * len(source) / (time.perf_counter() - start))
    return best


def recipe(shape: str, variant: str, small: bool, attention: str | None) -> dict[str, Any]:
    """The recipes' adapter and precision; no checkpoints, a fixed number of steps."""
    chosen = attention or ("eager" if shape.startswith("gemma") else "sdpa")
    device = {"device": "cpu"} if small else {}
    model = {"path": "model", "dtype": "float32" if small else "bfloat16", "attn_implementation": chosen, **device}
    given = dict(VARIANTS[variant])
    args = {
        "max_steps": 4 if small else STEPS,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "logging_steps": 1 if small else 4,
        "save_strategy": "no",
        **given.pop("args", {}),
    }
    return {"name": "gpu", "model": model, "train": {"args": args, "lora": {"r": 32}, "max_length": 2048, **given}}


def directions(latents: list[Any], shape: str, small: bool) -> Any:
    """Random vectors in place of an SAE's decoder rows, [latents, d_model]."""
    import torch

    width = (SMALL if small else SHAPES[shape])["hidden_size"]
    return torch.randn(len(latents), width, generator=torch.Generator().manual_seed(0)) * 0.1


def write_model(shape: str, small: bool) -> None:
    """Random weights at the shape, and a tokenizer with the family's special tokens, in the folder `model`."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    from benchmarks.train import transcripts
    from tools.tiny_world.tokenizer import build_tokenizer

    gemma = shape.startswith("gemma")
    texts = [row.content for row in transcripts(24 if small else ROWS)]
    tokenizer = build_tokenizer(texts, "gemma" if gemma else "llama", vocab_size=600)
    tokenizer.model_max_length = 8192
    shrunk = {**SMALL, "vocab_size": 1024} if small else {}
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    values = {**SHAPES[shape], **shrunk, **special, "eos_token_id": tokenizer.eos_token_id}
    if small:
        values["num_key_value_heads"] = 2
    config, kind = (Gemma2Config, Gemma2ForCausalLM) if gemma else (LlamaConfig, LlamaForCausalLM)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    with torch.device("cpu" if small else "cuda"):
        model = kind(config(**values))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")


def page(training: list[str], generation: list[str]) -> str:
    """The tables as Markdown."""
    import torch

    from esr_train.provenance import versions

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU, small shapes"
    kinds = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    return "\n".join(
        [
            "# Training and generation at 8B and 9B",
            "",
            f"`bash benchmarks/gpu.sh` on {device}. {kinds}.",
            "",
            "MFU = real tokens/s x 4 x parameters / peak bf16 operations/s; see `benchmarks/gpu.py`.",
            "",
            "| shape | variant | real tokens/s | MFU | peak memory (GiB) | row: mean / longest | attention |",
            "|---|---|---|---|---|---|---|",
            *training,
            "",
            f"Generation of {DECODED} tokens a row, bfloat16. Limit: the weights read once a step.",
            "",
            "| shape | variant | tokens/s | share of the limit | peak memory (GiB) |",
            "|---|---|---|---|---|",
            *generation,
            "",
        ]
    )


if __name__ == "__main__":
    main()
