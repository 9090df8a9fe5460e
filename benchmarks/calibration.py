"""What early stopping saves in calibration: error against responses, on latents whose thresholds are known.

    python benchmarks/calibration.py > benchmarks/results/calibration.md

A simulated latent's mean score falls along a logistic curve that crosses the target at its threshold; single
responses are drawn from a beta distribution around it, mostly near 0 or 100. Thresholds and slopes differ.
"""

import sys

import numpy as np

from eval.calibration import GRID_POINTS, PRIOR_WIDTH, quantile, still_wide, updated

LATENTS, PROMPTS, TARGET, BOUNDS = 1000, 4, 30.0, (0.1, 2.0)
FIXED = (6, 8, 10, 12, 15, 20)
STOPPED = ((10, 0.4), (10, 0.3), (15, 0.4), (15, 0.3), (20, 0.4), (20, 0.3))


def world(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds 0.4-1.3 and slopes 0.02-0.2 residual norms (log-uniform), [latents] each."""
    return rng.uniform(0.4, 1.3, LATENTS), np.exp(rng.uniform(np.log(0.02), np.log(0.2), LATENTS))


def calibrated(rounds: int, stop_width: float | None, seed: int) -> tuple[float, np.ndarray]:
    """Responses per latent and the relative errors of the thresholds, [latents]."""
    rng = np.random.default_rng(seed)
    thresholds, slopes = world(np.random.default_rng(0))
    grid = np.linspace(*BOUNDS, GRID_POINTS)
    prior = np.exp(-0.5 * ((grid - sum(BOUNDS) / 2) / (PRIOR_WIDTH * (BOUNDS[1] - BOUNDS[0]))) ** 2)
    posterior = np.tile(prior / prior.sum(), (LATENTS, 1))
    asked = 0
    for _ in range(rounds):
        at = quantile(posterior, grid, 0.5)
        for place in still_wide(posterior, grid, stop_width):
            push = (at[place] - thresholds[place]) / slopes[place] + np.log((100 - TARGET) / TARGET)
            mean = 1 / (1 + np.exp(np.clip(push, -30, 30)))
            scores = 100 * rng.beta(2 * mean + 1e-9, 2 * (1 - mean) + 1e-9, PROMPTS)
            posterior[place] = updated(posterior[place], grid, at[place], scores.tolist(), TARGET)
            asked += PROMPTS
    return asked / LATENTS, np.abs(quantile(posterior, grid, 0.5) / thresholds - 1)


def main() -> int:
    """Print a table of fixed budgets and of early stopping, with what each saves at equal error."""
    rows = [(f"{rounds} rounds", *calibrated(rounds, None, 1)) for rounds in FIXED]
    spent = [responses for _, responses, _ in rows]
    fixed = {"mean": [e.mean() for *_, e in rows], "rms": [np.sqrt((e**2).mean()) for *_, e in rows]}
    rows += [(f"at most {rounds}, stop at {stop}", *calibrated(rounds, stop, 1)) for rounds, stop in STOPPED]
    print("# Early stopping in calibration\n\n`python benchmarks/calibration.py`; simulated responses.\n")
    print("| rounds | responses per latent | mean error | rms error | saved at equal mean | saved at equal rms |")
    print("|---|---|---|---|---|---|")
    for number, (name, responses, errors) in enumerate(rows):
        found = {"mean": errors.mean(), "rms": np.sqrt((errors**2).mean())}
        saved = ["" if number < len(FIXED) else _saved(found[k], responses, fixed[k], spent) for k in found]
        print(f"| {name} | {responses:.1f} | {found['mean']:.2%} | {found['rms']:.2%} | {saved[0]} | {saved[1]} |")
    return 0


def _saved(error: float, responses: float, errors: list[float], spent: list[float]) -> str:
    """Share of responses saved against the fixed budget that reaches the same error (log-linear in between)."""
    if error < min(errors):
        return f"more than {1 - responses / spent[-1]:.0%}"
    needed = np.exp(np.interp(-np.log(error), -np.log(errors), np.log(spent)))
    return f"{1 - responses / needed:.0%}"


if __name__ == "__main__":
    sys.exit(main())
