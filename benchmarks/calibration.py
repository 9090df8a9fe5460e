"""What a threshold costs: error and interval against responses, on latents whose thresholds are known.

    python benchmarks/calibration.py > benchmarks/results/calibration.md

A simulated latent's mean score falls along a logistic curve that crosses the target at its threshold; single
responses are drawn from a beta distribution around it, mostly near 0 or 100. Thresholds and slopes differ.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

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


def main() -> int:
    """Print a table of plans in every world."""
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
