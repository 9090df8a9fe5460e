"""`esr data generate` killed at random moments, against the file of a run that nobody killed.

    esr data generate RECIPE [key=value …] name=whole
    python benchmarks/killed.py runs/whole RECIPE [key=value …] --kills 10 --within 8

Every process is killed (SIGKILL) a random time after it has written its first responses or candidates; what it left on
disk is printed. The last one is left alone.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Kill, go on, compare; returns 1 if the files differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("whole", type=Path, help="run directory of the run that nobody killed")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--within", type=float, default=8, help="seconds in which a process is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    run = options.whole.with_name("killed")
    words = [sys.executable, "-m", "data_gen", "generate", options.recipe, *options.overrides]
    words += [f"name={run.name}", f"runs={run.parent}"]
    rng = random.Random(options.seed)
    print("| killed after its first write | calibration's responses | candidates | torn lines |\n|---|---|---|---|")
    for _ in range(options.kills):
        seconds = rng.uniform(0, options.within)
        if not killed(words, run, seconds):
            print("| not killed: it had finished | | | |")
            break
        print(f"| {seconds:.1f} s | {' | '.join(map(str, (*on_disk(run), torn(run))))} |", flush=True)
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    pairs = [(file, run / file.relative_to(options.whole)) for file in sorted(options.whole.glob("data/*.jsonl"))]
    for one, other in pairs:
        same = one.read_bytes() == other.read_bytes()
        print(f"\n{one.name}: {lines(one.parent, one.name)} rows, {'byte-equal' if same else 'NOT THE SAME'}")
    return 0 if all(one.read_bytes() == other.read_bytes() for one, other in pairs) else 1


def killed(words: Sequence[str], run: Path, seconds: float) -> bool:
    """Kill a process so many seconds after its first write; False if it finished before."""
    before = on_disk(run)
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and on_disk(run) == before:
        time.sleep(0.05)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() != 0


def on_disk(run: Path) -> tuple[int, int]:
    """Responses of the calibration, and candidates."""
    return lines(run, "calibration/*.jsonl"), lines(run, "data/sources/*.candidates.jsonl")


def torn(run: Path) -> int:
    """Files whose last line was not finished."""
    files = [*run.glob("calibration/*.jsonl"), *run.glob("data/sources/*.candidates.jsonl")]
    return sum(not path.read_bytes().endswith(b"\n") for path in files if path.stat().st_size)


def lines(folder: Path, pattern: str) -> int:
    """Whole lines of some files."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern))


if __name__ == "__main__":
    sys.exit(main())
