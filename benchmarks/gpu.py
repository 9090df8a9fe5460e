"""LoRA and QLoRA at the shapes of Llama-3.1-8B and Gemma-2-9B, with random weights, on one GPU.

    bash benchmarks/gpu.sh                       writes results/gpu.md
    bash benchmarks/gpu.sh --small               small shapes on the CPU: shows that it runs, writes nothing

MFU = real tokens/s x 4 x parameters / peak bf16 operations/s. LoRA costs 4 operations for every parameter and token:
2 forward, 2 to carry the gradient back; the frozen weights' own gradients are not computed. Attention scores and what
gradient checkpointing computes twice are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "gpu.md"
ROWS, STEPS, LATENTS = 256, 30, 8
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


def main() -> None:
    """Measure every shape and variant, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes on the CPU; writes nothing")
    parser.add_argument("--attention", default=None, help="eager, sdpa or flash_attention_2; the recipes' unless given")
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.small, options.attention)))
        return
    import torch

    if not options.small and not torch.cuda.is_available():
        sys.exit("There is no GPU here. `--small` runs small shapes on the CPU.")
    lines = [line(shape, variant, options) for shape in SHAPES for variant in VARIANTS]
    text = page(lines)
    print(text)
    if not options.small:
        RESULTS.write_text(text, encoding="utf-8")


def line(shape: str, variant: str, options: argparse.Namespace) -> str:
    """One row of the table; a variant that fails says why."""
    command = [sys.executable, __file__, "--one", shape, variant, *(["--small"] if options.small else [])]
    command += ["--attention", options.attention] if options.attention else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1][:120]
        return f"| {shape} | {variant} | failed: {reason} | | | | |"
    found = json.loads(done.stdout.splitlines()[-1])
    mfu = f"{found['mfu']:.1%}" if found.get("mfu") else "-"
    return (
        f"| {shape} | {variant} | {found['tokens_per_second']:,.0f} | {mfu} | {found['peak_memory_gib']:.1f} "
        f"| {found['mean']:.0f} / {found['longest']} | {found['attention']} |"
    )


def measure(shape: str, variant: str, small: bool, attention: str | None) -> dict[str, Any]:
    """Train some steps; figures of the log's later half, when everything is warm."""
    from benchmarks.train import transcripts
    from esr_train.models import load_model, load_tokenizer
    from esr_train.recipe import Recipe
    from esr_train.training.dataset import read_rows, table
    from esr_train.training.injection import LiveInjection
    from esr_train.training.settings import trainer_config
    from esr_train.training.trainer import build_trainer
    from esr_train.transcript import write_transcripts

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        made = transcripts(24 if small else ROWS)
        write_model(shape, small, [row.content for row in made])
        write_transcripts(Path("data.jsonl"), made)
        section = Recipe.model_validate(recipe(shape, variant, small, attention))
        args = trainer_config(section, Path(folder) / "checkpoints")
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
        "logging_steps": 1 if small else 5,
        "save_strategy": "no",
        **given.pop("args", {}),
    }
    return {"name": "gpu", "model": model, "train": {"args": args, "lora": {"r": 32}, "max_length": 2048, **given}}


def directions(latents: list[Any], shape: str, small: bool) -> Any:
    """Random vectors in place of an SAE's decoder rows, [latents, d_model]."""
    import torch

    width = (SMALL if small else SHAPES[shape])["hidden_size"]
    return torch.randn(len(latents), width, generator=torch.Generator().manual_seed(0)) * 0.1


def write_model(shape: str, small: bool, texts: list[str]) -> None:
    """Random weights at the shape, and a tokenizer with the family's special tokens, in the folder `model`."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    from tools.tiny_world.tokenizer import build_tokenizer

    gemma = shape.startswith("gemma")
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
    del model
    if not small:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def page(lines: list[str]) -> str:
    """The table as Markdown."""
    import torch

    from esr_train.provenance import versions

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU, small shapes"
    kinds = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    head = "| shape | variant | real tokens/s | MFU | peak memory (GiB) | row: mean / longest | attention |"
    return "\n".join(
        [
            "# Training at 8B and 9B",
            "",
            f"`bash benchmarks/gpu.sh` on {device}. {kinds}.",
            "",
            "MFU = real tokens/s x 4 x parameters / peak bf16 operations/s; see `benchmarks/gpu.py`.",
            "",
            head,
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
