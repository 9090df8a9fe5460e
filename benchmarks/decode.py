"""Generation on a real vocabulary: this tree against another checkout, sampled against greedy, steered against not.

    python benchmarks/decode.py --model FOLDER                  prints a table for this tree
    python benchmarks/decode.py --model FOLDER --before TREE    the same against another checkout of the project

Each tree runs in a process of its own; one works at a time, and every round runs every variant once, every other round
in reverse order. No row may stop early; each is steered along a random direction of its own at the middle layer.
`--vocabulary 256000` widens the model's vocabulary with random rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("MEASURED_TREE", str(ROOT)))
STRENGTH, NORM = 0.4, 30.0


def main() -> None:
    """Run every variant in every round and print the table, or serve one tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--before", type=Path, help="another checkout of the project")
    parser.add_argument("--rows", type=int, nargs="+", default=[48], help="the other tree takes the first number")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of every row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vocabulary", type=int, help="rows of the embedding, random ones added")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    print(table(options))


def serve(options: argparse.Namespace) -> None:
    """Read what to run from standard input, a JSON line each, and answer with seconds and tokens."""
    from esr_train.models import load_model, load_tokenizer
    from esr_train.recipe import ModelSection
    from esr_train.steering.transformers_engine import TransformersEngine

    section = ModelSection(path=str(options.model), dtype=options.dtype, attn_implementation="eager", device="cpu")
    model, tokenizer = load_model(section), load_tokenizer(section)
    if options.vocabulary:
        model.resize_token_embeddings(options.vocabulary, mean_resizing=False)
    tokens: list[list[int]] = []
    for line in sys.stdin:
        asked = json.loads(line)
        engine = TransformersEngine(model, tokenizer, batch_rows=asked["rows"])
        engine._stop_ids = frozenset()
        clock, processor = time.perf_counter(), time.process_time()
        tokens = generated(engine, asked)
        spent = time.perf_counter() - clock, time.process_time() - processor
        print(json.dumps({"seconds": spent[0], "processor": spent[1], "tokens": tokens}), flush=True)


def generated(engine: Any, asked: dict[str, Any]) -> list[list[int]]:
    """Each row's new tokens."""
    import torch

    from esr_train.files import read_jsonl
    from esr_train.steering.directions import Add
    from esr_train.steering.engine import Request, Sampling

    prompts = read_jsonl(ROOT / "data_gen" / "prompts" / "how-to.jsonl", lambda row: row["prompt"])
    config, requests = engine.model.config, []
    for number in range(asked["rows"]):
        vector = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(number))
        add = Add(config.num_hidden_layers // 2, STRENGTH * NORM * vector / vector.norm())
        push = (add,) if asked["steered"] else ()
        requests.append(Request(str(number), prompts[number % len(prompts)], interventions=push, seed=number))
    sampling = Sampling(temperature=asked["temperature"], max_new_tokens=asked["tokens"])
    return [list(completion.token_ids) for completion in engine.generate(requests, sampling)]


class Tree:
    """A process that measures one checkout."""

    def __init__(self, tree: Path, options: argparse.Namespace) -> None:
        words = [sys.executable, __file__, "--serve", "--model", str(options.model.resolve()), "--dtype", options.dtype]
        words += ["--vocabulary", str(options.vocabulary)] if options.vocabulary else []
        environment = {**os.environ, "MEASURED_TREE": str(tree.resolve()), "PYTHONPATH": str(tree.resolve())}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tree
        )

    def run(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Run one variant."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


def variants(options: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is run: name -> (tree, what is asked of it)."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for rows in options.rows:
        asked = {"rows": rows, "tokens": options.tokens}
        trees = ["now", *(["before"] if options.before and rows == options.rows[0] else [])]
        for tree in trees:
            found[f"{tree}, {rows} rows, sampled, steered"] = tree, {**asked, "temperature": 0.6, "steered": True}
            found[f"{tree}, {rows} rows, greedy, steered"] = tree, {**asked, "temperature": 0.0, "steered": True}
        found[f"now, {rows} rows, sampled, unsteered"] = "now", {**asked, "temperature": 0.6, "steered": False}
    return found


def table(options: argparse.Namespace) -> str:
    """Measure; the result as Markdown."""
    trees = {"now": Tree(ROOT, options)} | ({"before": Tree(options.before, options)} if options.before else {})
    asked = variants(options)
    first = next(iter(asked))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
    made: dict[str, list[list[int]]] = {}
    for number in range(options.rounds + 1):
        for name in [*asked] if number % 2 else [*reversed(asked)]:
            tree, words = asked[name]
            answer = trees[tree].run(words)
            count = sum(map(len, answer["tokens"]))
            made[name] = answer["tokens"]
            if number:
                seconds[name].append((answer["seconds"] / count, answer["processor"] / count))
            print(f"round {number}: {name}: {count / answer['seconds']:,.0f} tok/s", file=sys.stderr)
    lines = [f"| variant | tok/s | speed as a share of {first} | in processor time |", "|---|---|---|---|"]
    for name, spent in seconds.items():
        pairs = list(zip(seconds[first], spent, strict=True))
        shares = [statistics.median(base[clock] / own[clock] for base, own in pairs) for clock in (0, 1)]
        rate = 1 / statistics.median(clock for clock, _ in spent)
        lines.append(f"| {name} | {rate:,.0f} | {shares[0]:.3f} | {shares[1]:.3f} |")
    if options.before:
        name = f"{options.rows[0]} rows, greedy, steered"
        same = sum(a == b for a, b in zip(made[f"now, {name}"], made[f"before, {name}"], strict=True))
        lines.append(f"\n{same} of {options.rows[0]} greedy rows have the tokens that the other tree gives them.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
