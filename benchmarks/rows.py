"""Whether a run's generated rows are what they should be: scores, cues, coverage, and nothing of the test split.

    esr data generate recipes/tiny/quickstart.yaml name=rows-llama data.steered.rows=2000 data.cues=null \
        data.normal.rows=0
    python benchmarks/rows.py runs/rows-llama

Prints one line a check, in Markdown, and ends with exit code 1 if one fails.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Print the checks; returns 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--arm", default="tuned")
    parser.add_argument("--rows", type=int, default=2000, help="self-correction rows at least")
    options = parser.parse_args()
    checks = of_scores(options) + of_splits(options)
    print("| | found | wanted | |\n|---|---|---|---|")
    for name, found, wanted, good in checks:
        print(f"| {name} | {found} | {wanted} | {'yes' if good else 'NO'} |")
    return 0 if all(good for *_, good in checks) else 1


Check = tuple[str, str, str, bool]


def of_scores(options: argparse.Namespace) -> list[Check]:
    """How many rows there are, how they were scored, and how they turn back."""
    from data_gen.description import cue_openings, entropy
    from esr_train.transcript import read_transcripts

    rows = [row for row in read_transcripts(options.run / "data" / f"{options.arm}.jsonl") if row.corrects]
    detours, answers = ([row.meta["scores"][kind] for row in rows] for kind in ("off_topic", "answer"))
    bits = entropy(cue_openings(rows))
    return [
        ("self-correction rows", str(len(rows)), f"{options.rows}", len(rows) >= options.rows),
        ("detours: highest score", f"{max(detours):.1f}", "below 50", max(detours) < 50),
        ("answers: lowest score", f"{min(answers):.1f}", "80", min(answers) >= 80),
        ("cues: entropy of their first three words", f"{bits:.2f} bits", "4 bits", bits >= 4),
    ]


def of_splits(options: argparse.Namespace) -> list[Check]:
    """What the rows cover, and what of it belongs to the test split."""
    from esr_train.files import read_json
    from esr_train.transcript import read_transcripts
    from eval.cells import fingerprint
    from recipes.experiment import read_recipe
    from recipes.resources import Resources

    test = Resources(read_recipe(options.run / "recipe.yaml")).prompts().test
    rows = [row for row in read_transcripts(options.run / "data" / f"{options.arm}.jsonl") if row.steering]
    steered = [row.steering for row in rows if row.steering]
    subjects = {each.label for each in steered if each.label}
    topics = {row.meta["topic"] for row in rows}
    latents, held_out = {each.latent for each in steered}, {*read_json(options.run / "latents.json")["splits"]["test"]}
    shared = {
        "prompts": ({fingerprint(row.prompt) for row in rows}, {fingerprint(each.text) for each in test}),
        "latents": (latents, held_out),
        "topics, of prompts or latents,": (topics | subjects, {each.topic for each in test}),
    }
    return [
        ("topics of the steering latents", str(len(subjects)), "12", len(subjects) >= 12),
        ("latents; prompts", f"{len(latents)}; {len({row.prompt for row in rows})}", "", True),
        *(
            (f"{name} of the test split, which has {len(theirs)}", str(len(ours & theirs)), "0", not ours & theirs)
            for name, (ours, theirs) in shared.items()
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
