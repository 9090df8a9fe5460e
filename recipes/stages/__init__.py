"""The stages of a run: latents and thresholds, rows, weights, trials, results."""
