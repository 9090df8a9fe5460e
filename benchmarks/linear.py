"""Whether time grows as trials, latents and rows do: each over a decade, on the tiny world.

    python benchmarks/linear.py             prints a table, in Markdown

Every point is a command in a process of its own, measured in processor time, which other work disturbs least. Linear:
what one more costs is the same between the first two sizes and the last two.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = (60, 190, 600)
LATENTS = (19, 60, 190)
BASE = "calibrated"
COMMON = (
    "engine.batch_rows=32",
    "arms={tuned: {}}",
    "calibration.rounds=2",
    "calibration.prompts=2",
    "data.normal.rows=0",
    "data.cues=null",
)
KINDS: dict[str, tuple[tuple[str, str], str, tuple[int, ...], tuple[str, ...]]] = {
    "latents, 10 responses each": (
        ("eval", "calibrate"),
        "latents.limit",
        LATENTS,
        ("calibration.rounds=5",),
    ),
    "rows kept": (("data", "generate"), "data.steered.rows", SIZES, ()),
    "trials": (("eval", "run"), "eval.trials", SIZES, ("arms={}", "eval.conditions=[steered]")),
}
"""What grows: the command, the key, its values, and further settings."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[name.partition(",")[0].partition(" ")[0] for name in KINDS])
    options = parser.parse_args()
    print("| what grows | from | to | processor seconds | one more costs (ms): lower part | upper part | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        if options.only != "latents":
            spent(runs, BASE, ("eval", "calibrate"), COMMON)
        for name, (command, key, sizes, more) in KINDS.items():
            if options.only is None or name.startswith(options.only):
                print(line(runs, name, command, key, sizes, more), flush=True)


def line(
    runs: Path, name: str, command: tuple[str, str], key: str, sizes: tuple[int, ...], more: tuple[str, ...]
) -> str:
    """A row of the table."""
    found = []
    for size in sizes:
        run = f"{key}-{size}"
        if command != ("eval", "calibrate"):
            shutil.copytree(runs / BASE, runs / run)
        found.append(spent(runs, run, command, (*COMMON, *more, f"{key}={size}")))
        print(name, size, f"{found[-1]:.1f} s", file=sys.stderr, flush=True)
    lower, upper = (
        1000 * (found[number + 1] - found[number]) / (sizes[number + 1] - sizes[number]) for number in (0, 1)
    )
    seconds = ", ".join(f"{each:.1f}" for each in found)
    return f"| {name} | {sizes[0]} | {sizes[-1]} | {seconds} | {lower:.0f} | {upper:.0f} | {upper / lower:.2f} |"


def spent(runs: Path, run: str, command: tuple[str, str], words: tuple[str, ...]) -> float:
    """Processor seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    asked = [sys.executable, "-m", "recipes.cli", *command, "tiny/quickstart", f"runs={runs}", f"name={run}", *words]
    done = subprocess.run(asked, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
