"""What `esr plan` says of experiments nobody has run here: 9B on one, four and eight GPUs, 70B on two nodes.

    python benchmarks/plans.py            prints a table, in Markdown

Nothing is loaded: a configuration of each shape and a small tokenizer are written to a folder for the time.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BIG = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
"""Llama-3.3-70B."""
RECIPE = ROOT / "recipes" / "gemma-2-9b-it" / "live.yaml"
CASES = (
    ("gemma-2-9b", 1, "vllm", 1),
    ("gemma-2-9b", 1, "transformers", 1),
    ("gemma-2-9b", 4, "vllm", 1),
    ("gemma-2-9b", 8, "vllm", 1),
    ("llama-3.3-70b", 16, "vllm", 8),
)
"""Shape, H100s, engine, and how many of them share a copy."""
LABELS = 400


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100")
    parser.add_argument("--rows", type=int, default=256, help="requests at once, on each copy of the model")
    options = parser.parse_args()
    print(
        "| shape | GPUs | engine | latents, calibration | rows | training | trials (two arms) | all | tokens "
        "| GPU hours |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for shape, count, kind, shared in CASES:
            print(line(shape, plan_of(Path(folder), shape, count, kind, shared, options), count, kind, shared))


def plan_of(folder: Path, shape: str, count: int, kind: str, shared: int, options: argparse.Namespace) -> Any:
    """The plan of `RECIPE` with the model of a shape, judged by that model itself."""
    from recipes.experiment import read_recipe
    from recipes.planning.plan import make_plan

    write_shape(folder / shape, shape)
    labels = folder / "labels.jsonl"
    rows = [{"index": number, "description": f"topic {number}"} for number in range(LABELS)]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [f"model.path={folder / shape}", f"runs={folder / 'runs'}", "judge={kind: likelihood}"]
    words += [f"sae.labels={labels}", f"engine={{kind: {kind}, batch_rows: {options.rows}, tensor_parallel: {shared}}}"]
    return make_plan(read_recipe(RECIPE, words), options.device, count)


def write_shape(folder: Path, shape: str) -> None:
    """A configuration and a tokenizer of the family's."""
    import shutil

    from transformers import Gemma2Config, LlamaConfig

    from benchmarks.gpu import SHAPES

    family = shape.partition("-")[0]
    shutil.copytree(ROOT / "recipes" / "tiny" / "assets" / family, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    config = Gemma2Config if family == "gemma" else LlamaConfig
    config(**SHAPES.get(shape, BIG)).save_pretrained(folder)


def line(shape: str, plan: Any, count: int, kind: str, shared: int) -> str:
    """A plan as a row of the table."""
    from recipes.planning.plan import duration

    groups: dict[str, float] = dict.fromkeys(("latents calibrate", "rows", "train", "trials"), 0.0)
    for each in plan.lines:
        group = next((name for name in groups if set(name.split()) & set(each.name.split())), "trials")
        groups[group] += each.seconds
    tokens = sum(each.tokens for each in plan.lines)
    engine = f"{kind}, {shared} GPUs a copy" if shared > 1 else kind
    cells = [duration(seconds) for seconds in (*groups.values(), plan.seconds)]
    hours = count * plan.seconds / 3600
    return f"| {shape} | {count} | {engine} | {' | '.join(cells)} | {tokens / 1e6:.1f} M | {hours:.1f} |"


if __name__ == "__main__":
    main()
