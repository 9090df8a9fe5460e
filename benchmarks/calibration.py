"""What a threshold costs: error and interval against responses, on latents whose thresholds are known.

    python benchmarks/calibration.py                        simulated: a table, printed
    python benchmarks/calibration.py --recipe RECIPE --long FILE.jsonl RUN ...
                                     RUNs' calibrations after each round, from the scores that they kept, against a long
                                     calibration of the recipe's base model (without --recipe: one that is there)

A simulated latent's mean score falls along a logistic curve that crosses the target at its threshold; single
responses are drawn from a beta distribution around it, mostly near 0 or 100. Thresholds and slopes differ.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.calibration import GRID_POINTS, flat_prior, pooled_prior, quantile, still_wide, updated, weighted

LATENTS, TARGET, SEEDS = 96, 30.0, 8
World = Callable[[np.random.Generator], np.ndarray]
WORLDS: dict[str, tuple[World, tuple[float, float]]] = {
    "alike: 0.36, log spread 0.17 (as on SmolLM2)": (
        lambda rng: np.exp(rng.normal(np.log(0.36), 0.17, LATENTS)),
        (0.1, 1.5),
    ),
    "wide: 0.4 to 1.3": (lambda rng: rng.uniform(0.4, 1.3, LATENTS), (0.1, 2.0)),
    "two kinds: 0.35 or 0.9": (
        lambda rng: rng.choice([0.35, 0.9], LATENTS) * np.exp(rng.normal(0, 0.1, LATENTS)),
        (0.1, 1.5),
    ),
}


@dataclass(frozen=True)
class Plan:
    """A way to calibrate: rounds, responses in each, and whether latents share a fitted prior."""

    pooled: bool
    rounds: int
    prompts: int
    stop_width: float | None = None


PLANS = (
    Plan(False, 4, 2),
    Plan(False, 6, 3),
    Plan(False, 12, 3),
    Plan(True, 4, 2),
    Plan(True, 5, 2),
    Plan(True, 6, 3),
    Plan(True, 12, 3),
    Plan(True, 12, 3, 0.4),
)


def calibrated(
    world: World, bounds: tuple[float, float], plan: Plan, seed: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Responses a latent, relative errors, and widths of 90 % intervals, negative where they miss; [latents] each."""
    rng, made = np.random.default_rng(seed), np.random.default_rng(1000 + seed)
    thresholds, slopes = world(made), np.exp(made.uniform(np.log(0.02), np.log(0.15), LATENTS))
    grid = np.linspace(*bounds, GRID_POINTS)
    flat, evidence = flat_prior(grid), np.ones((LATENTS, GRID_POINTS))
    posterior, asked = weighted(flat, evidence), 0
    for _ in range(plan.rounds):
        at = quantile(posterior, grid, 0.5)
        for place in still_wide(posterior, grid, plan.stop_width):
            push = (at[place] - thresholds[place]) / slopes[place] + np.log((100 - TARGET) / TARGET)
            mean = 1 / (1 + np.exp(np.clip(push, -30, 30)))
            scores = 100 * rng.beta(2 * mean + 1e-9, 2 * (1 - mean) + 1e-9, plan.prompts)
            evidence[place] = updated(evidence[place], grid, at[place], scores.tolist(), TARGET)
            asked += plan.prompts
        posterior = weighted(pooled_prior(evidence, grid, flat) if plan.pooled else flat, evidence)
    low, median, high = (quantile(posterior, grid, share) for share in (0.05, 0.5, 0.95))
    inside = (low <= thresholds) & (thresholds <= high)
    return asked / LATENTS, np.abs(median / thresholds - 1), np.where(inside, 1, -1) * (high - low) / median


LONG, LONG_SEED, VECTORS = Plan(False, 18, 3), 100, 32
"""What thresholds of a real model are held against: many rounds, no shared prior, other prompts and tokens."""


def measure_long(path: str, file: Path) -> None:
    """Calibrate the first vectors of a recipe as `LONG` says; scores are kept in a file, from which it goes on."""
    import eval.calibration
    from eval.arms import Arm
    from eval.calibration import CalibrationPrompts, calibrate, score_store
    from recipes.experiment import read_recipe
    from recipes.resources import open_resources

    with open_resources(read_recipe(path)) as resources:
        vectors, norm, pools = resources.vectors(), resources.residual_norm(), resources.prompts()
        chosen = [vectors.direction(index, norm) for index in list(vectors.labels)[:VECTORS]]
        asked = {"rounds": LONG.rounds, "prompts": LONG.prompts, "verify": 0}
        eval.calibration.POOLED_FROM = len(chosen) + 1
        calibrate(
            Arm(resources.base(), resources.judge(), resources.sampling()),
            chosen,
            CalibrationPrompts(pools.validation or pools.train, pools.train),
            resources.recipe.calibration.model_copy(update=asked),
            seed=LONG_SEED,
            store=score_store(file),
        )


@dataclass(frozen=True)
class Found:
    """Thresholds after some rounds: latent -> threshold and the ends of its 90 % interval; responses a latent."""

    rounds: int
    responses: float
    ends: dict[int, tuple[float, float, float]]


def replayed(file: Path, bounds: tuple[float, float], pooled: bool) -> list[Found]:
    """What a calibration knew after each of its rounds, from the scores that it kept."""
    scores: dict[int, dict[int, list[float]]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        place, latent = (int(part.split()[1]) for part in row["key"].split(" / ")[:2])
        scores.setdefault(place, {})[latent] = row["scores"]
    latents, grid = sorted(scores[0]), np.linspace(*bounds, GRID_POINTS)
    flat, evidence = flat_prior(grid), np.ones((len(latents), GRID_POINTS))
    posterior, seen, found = weighted(flat, evidence), 0, []
    for place in range(len(scores)):
        at = quantile(posterior, grid, 0.5)
        for index, latent in enumerate(latents):
            new = scores[place][latent]
            evidence[index], seen = updated(evidence[index], grid, at[index], new, TARGET), seen + len(new)
        posterior = weighted(pooled_prior(evidence, grid, flat) if pooled else flat, evidence)
        ends = zip(*(quantile(posterior, grid, share).tolist() for share in (0.5, 0.05, 0.95)), strict=True)
        found.append(Found(place + 1, seen / len(latents), dict(zip(latents, ends, strict=True))))
    return found


def on_a_model(long: Path, runs: Sequence[Path], bounds: tuple[float, float]) -> str:
    """Runs' calibrations after each round, against a long one without a shared prior, as a Markdown table."""
    alone = replayed(long, bounds, pooled=False)
    last = alone[-1]
    lines = [
        "| prior | latents | rounds | responses a latent | width | compared | mean error | rms error "
        "| within the long one's 90 % | it within theirs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [model_row("own (the long one itself)", each, last) for each in (alone[3], alone[5], last)]
    for run in runs:
        [file] = (run / "calibration").glob("base-*.jsonl")
        lines += [model_row("pooled", each, last) for each in replayed(file, bounds, pooled=True)[1:]]
    return "\n".join(lines)


def model_row(prior: str, found: Found, long: Found) -> str:
    """A line of the table: widths of all its latents, errors of those that the long calibration has, too."""
    shared = sorted(set(found.ends) & set(long.ends))
    norm, low, high = np.array(list(found.ends.values())).T
    wanted, least, most = np.array([long.ends[latent] for latent in shared]).T
    mine = np.array([found.ends[latent][0] for latent in shared])
    error, inside = np.abs(mine / wanted - 1), (least <= mine) & (mine <= most)
    covers = np.mean([found.ends[latent][1] <= long.ends[latent][0] <= found.ends[latent][2] for latent in shared])
    agrees = f"{inside.mean():.0%} | {covers:.0%}"
    return (
        f"| {prior} | {len(norm)} | {found.rounds} | {found.responses:.0f} | {((high - low) / norm).mean():.2f} "
        f"| {len(shared)} | {error.mean():.1%} | {np.sqrt((error**2).mean()):.1%} | {agrees} |"
    )


def main() -> int:
    """Print a table of plans: simulated, or on a real model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories whose calibrations are replayed")
    parser.add_argument("--long", type=Path, help="file of the long calibration's scores")
    parser.add_argument("--recipe", help="measure the long calibration on this recipe's base model first")
    parser.add_argument("--bounds", nargs=2, type=float, default=(0.1, 1.5), help="of the runs' recipes")
    options = parser.parse_args()
    if options.recipe:
        measure_long(options.recipe, options.long)
    if options.long:
        print(on_a_model(options.long, options.runs, tuple(options.bounds)))
    else:
        simulated()
    return 0


def simulated() -> None:
    """Print a table of plans in every simulated world."""
    print("# What a threshold costs\n\n`python benchmarks/calibration.py`; simulated responses, target 30,")
    print(f"{LATENTS} latents, {SEEDS} seeds. Errors and widths of the 90 % interval are shares of the threshold.\n")
    print(
        "| thresholds | prior | rounds x responses | responses per latent | mean error | rms error | width | covers |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (world, bounds) in WORLDS.items():
        for plan in PLANS:
            asked, errors, widths = zip(*(calibrated(world, bounds, plan, seed) for seed in range(SEEDS)), strict=True)
            error, width = np.concatenate(errors), np.concatenate(widths)
            stop = "" if plan.stop_width is None else f", stop at {plan.stop_width}"
            print(
                f"| {name} | {'pooled' if plan.pooled else 'own'} | {plan.rounds} x {plan.prompts}{stop} "
                f"| {np.mean(asked):.1f} | {error.mean():.1%} | {np.sqrt((error**2).mean()):.1%} "
                f"| {np.abs(width).mean():.2f} | {(width > 0).mean():.1%} |"
            )


if __name__ == "__main__":
    sys.exit(main())
