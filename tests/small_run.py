"""A cut-down quickstart in a process of its own, which may be killed at any moment at which it writes."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from esr_train.files import write_jsonl
from esr_train.steering.latent_labels import read_labels
from eval.cells import read_prompts
from tests.conftest import ROOT

CONDITIONS = ("steered", "unsteered", "steered_recalibrated")
TOPICS, TRIALS = 12, 12
DYING = """
import os, sys
folder, left, how, seen = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 0

def watch(event, arguments):
    # Every file opened for writing and every rename in the run's folder is a moment at which the run may die.
    global seen
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if (writes or event == "os.rename") and folder in str(arguments[0]):
        seen += 1
        if seen == left:
            os.kill(os.getpid(), how)

sys.addaudithook(watch)
from recipes.cli import main
code = main(sys.argv[4:])
print(f"moments: {seen}")
sys.exit(code)
"""


@dataclass(frozen=True)
class Run:
    """A run directory, the words that make it, and how many moments it had at which it could have died."""

    folder: Path
    words: list[str]
    moments: int = 0


def command(assets: Path, runs: Path, prompts: Path) -> list[str]:
    """`esr run` on the quickstart, as small as every stage allows."""
    changes = {
        "runs": runs,
        "model.path": assets / "llama",
        "sae.release": assets,
        "sae.labels": assets / "llama-sae" / "labels.jsonl",
        "judge.vocabulary": assets / "vocabulary.json",
        "prompts.path": prompts,
        "prompts.splits.validation": 0.2,
        "engine.batch_rows": 24,
        "sampling.max_new_tokens": 48,
        "calibration": "{rounds: 3, prompts: 2, bounds: [0.1, 2.0], max_new_tokens: 32, verify: 0}",
        "data": "{steered: {rows: 6}, normal: {rows: 6}, max_detour_score: 90, min_answer_score: 0}",
        "train.args.max_steps": 6,
        "train.args.per_device_train_batch_size": 4,
        "train.args.save_steps": 2,
        "train.lora.r": 4,
        "eval": f"{{trials: {TRIALS}, conditions: [{', '.join(CONDITIONS)}], bootstrap: 50}}",
    }
    recipe = str(ROOT / "recipes" / "tiny" / "quickstart.yaml")
    return ["run", recipe, *(f"{key}={value}" for key, value in changes.items())]


def dying(run: Run, moment: int, how: signal.Signals = signal.SIGKILL) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own that gets a signal at a moment (0: never)."""
    words = [sys.executable, "-c", DYING, str(run.folder), str(moment), str(int(how)), *run.words]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


def new_run(folder: Path, assets: Path) -> Run:
    labels = read_labels(assets / "llama-sae" / "labels.jsonl")
    topics = sorted(set(labels.values()))[:TOPICS]
    rows = [each for each in read_prompts(assets / "prompts.jsonl") if each.topic in topics]
    write_jsonl(folder / "prompts.jsonl", ({"prompt": each.text, "topic": each.topic} for each in rows))
    return Run(folder / "quickstart", command(assets, folder, folder / "prompts.jsonl"))
