"""A whole experiment from one recipe: every stage of every seed, then the report."""

from pathlib import Path

from esr_train.recipe import Recipe
from recipes.pipeline import begun
from recipes.results import reports
from recipes.weights import needs_frequency
from recipes.workers import measure_in_processes


def run(recipe: Recipe) -> Path:
    """Run everything that is not done yet; returns the report's path.

    Several seeds become `seed-<n>/` run directories under one combined `metrics.json` and report; they share
    thresholds and generated rows, and differ in mixture, training and trials.
    """
    top, parts = begun(recipe)
    if parts != [top]:
        for arm in recipe.trained_arms:
            top.sources(recipe.for_arm(arm).data)
        # What all parts share is made before they run beside each other.
        top.calibrated  # noqa: B018
        if needs_frequency(recipe):
            top.frequency  # noqa: B018
    if recipe.workers > 1 and len(parts) > 1:
        measure_in_processes(recipe, len(parts))
    else:
        for part in parts:
            part.measure()
    return reports(top, parts)
