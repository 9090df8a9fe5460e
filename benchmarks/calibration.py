"""What a threshold costs: error and interval against responses, on latents whose thresholds are known.

    python benchmarks/calibration.py                        simulated: a table, printed
    python benchmarks/calibration.py RECIPE --keep FOLDER    on the recipe's base model, against a long calibration

A simulated latent's mean score falls along a logistic curve that crosses the target at its threshold; single
responses are drawn from a beta distribution around it, mostly near 0 or 100. Thresholds and slopes differ.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import eval.calibration
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


REFERENCE, REFERENCE_SEED, VECTORS = Plan(False, 20, 3), 100, 32
"""What thresholds of a real model are held against: long, no prior shared, other prompts and tokens."""
ON_A_MODEL = (Plan(False, 6, 3), Plan(True, 4, 2), Plan(True, 5, 2), Plan(True, 6, 3, 0.5), Plan(True, 6, 3))


def on_a_model(path: str, keep: Path, seeds: int) -> str:
    """Thresholds of a recipe's base model by every plan, against `REFERENCE`'s, as a Markdown table.

    Args:
        path: of the recipe; with vectors.
        keep: where scores are kept, so that it goes on where it was stopped.
        seeds: how often each plan is tried.
    """
    from esr_train.recipe import load_recipe
    from recipes.resources import open_resources

    lines = [
        "| prior | rounds x responses | responses a vector | tokens generated | width | error against the long one "
        "| within its 90 % | it within theirs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with open_resources(load_recipe(path)) as resources:
        vectors, norm = resources.vectors(), resources.residual_norm()
        chosen = [vectors.direction(index, norm) for index in list(vectors.labels)[:VECTORS]]
        made = [(plan, seed) for seed in range(seeds) for plan in ON_A_MODEL]
        found = {each: thresholds(resources, chosen, *each, keep) for each in [(REFERENCE, REFERENCE_SEED), *made]}
    reference = found[REFERENCE, REFERENCE_SEED]
    for plan in (REFERENCE, *ON_A_MODEL):
        runs = [each for (made_by, _), each in found.items() if made_by == plan]
        lines.append(model_row(plan, runs, reference))
    return "\n".join(lines)


def thresholds(resources: Any, chosen: Sequence[Any], plan: Plan, seed: int, keep: Path) -> tuple[np.ndarray, int]:
    """[latents, 4]: threshold, both ends of its interval, responses; and generated tokens."""
    from eval.arms import Arm
    from eval.calibration import CalibrationPrompts, calibrate, score_store

    section = resources.recipe.calibration.model_copy(
        update={"rounds": plan.rounds, "prompts": plan.prompts, "stop_width": plan.stop_width, "verify": 0}
    )
    arm = Arm(resources.base(), resources.judge(), resources.sampling())
    pools, file = resources.prompts(), keep / f"{plan.pooled}-{plan.rounds}x{plan.prompts}-{plan.stop_width}-{seed}"
    counted, shared_from = file.with_suffix(".tokens"), eval.calibration.POOLED_FROM
    if not plan.pooled:
        eval.calibration.POOLED_FROM = len(chosen) + 1
    before, known = resources.tally.tokens, int(counted.read_text()) if counted.exists() else 0
    try:
        made = calibrate(
            arm,
            chosen,
            CalibrationPrompts(pools.validation or pools.train, pools.train),
            section,
            seed=seed,
            store=score_store(file.with_suffix(".jsonl")),
        )
    finally:
        eval.calibration.POOLED_FROM = shared_from
        known += resources.tally.tokens - before
        counted.write_text(str(known))
    print(plan, seed, known, [round(each.norm, 3) for each in made[:8]], file=sys.stderr, flush=True)
    return np.array([[each.norm, each.low, each.high, each.n] for each in made]), known


def model_row(plan: Plan, runs: Sequence[tuple[np.ndarray, int]], reference: tuple[np.ndarray, int]) -> str:
    """A plan's line: means over latents and seeds."""
    values, tokens = np.concatenate([each for each, _ in runs]), np.mean([count for _, count in runs])
    long = np.concatenate([reference[0]] * len(runs))
    norm, low, high, responses = values.T
    inside = (long[:, 1] <= norm) & (norm <= long[:, 2])
    covers = (low <= long[:, 0]) & (long[:, 0] <= high)
    stop = "" if plan.stop_width is None else f", stop at {plan.stop_width}"
    own = plan == REFERENCE
    error = np.abs(norm / long[:, 0] - 1).mean()
    compared = "| | | |" if own else f"| {error:.1%} | {inside.mean():.0%} | {covers.mean():.0%} |"
    return (
        f"| {'pooled' if plan.pooled else 'own'} | {plan.rounds} x {plan.prompts}{stop}{', the long one' * own} "
        f"| {responses.mean():.1f} | {tokens:,.0f} | {((high - low) / norm).mean():.2f} {compared}"
    )


def main() -> int:
    """Print a table of plans: simulated, or on a recipe's base model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="whose base model is calibrated, along its vectors")
    parser.add_argument("--keep", type=Path, default=Path("runs/calibration"), help="folder for its scores")
    parser.add_argument("--seeds", type=int, default=2, help="with a recipe: how often each plan is tried")
    options = parser.parse_args()
    if options.recipe:
        options.keep.mkdir(parents=True, exist_ok=True)
        print(on_a_model(options.recipe, options.keep, options.seeds))
        return 0
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
