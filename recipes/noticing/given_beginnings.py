"""Reads what the detectors of a run see in the beginnings that an arm's replies go on from."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from esr_train.provenance import digest
from esr_train.steering.token_reading import Reader
from eval.arms import Arm
from eval.beginnings import SQUARE, Noticed, noticed_store, sums_of
from eval.detectors import Detectors
from eval.trials import Plan, cell_request, trial_key
from recipes.experiment import Experiment
from recipes.stages.stage_cache import Stage

FOLDER = "beginnings"
"""In a run directory; a file for each arm."""


def read_beginnings(
    experiment: Experiment,
    name: str,
    arm: Callable[[], Arm],
    plans: Mapping[str, Plan],
    detectors: Detectors,
    inputs: Mapping[str, Any],
) -> None:
    """Read every beginning of an arm's square of conditions under its own push, if all four were measured.

    Args:
        inputs: what decides the arm's activations.
    """
    if not plans.keys() >= SQUARE.keys() or not any(each.chosen for each in detectors.sets):
        return
    given = [
        (trial_key(name, condition, cell), condition, cell, text, plans[condition])
        for condition in SQUARE
        for cell in plans[condition].cells
        if (text := plans[condition].prefixes[cell.key]).strip()
    ]
    file = f"{FOLDER}/{name}.jsonl"

    def work() -> None:
        loaded, store = arm(), noticed_store(experiment.directory / file)
        store.touch()
        if not isinstance(loaded.engine, Reader):
            return
        requests = [cell_request(cell, key, plan.steerer, loaded.variant) for key, _, cell, _, plan in given]
        sae, texts = experiment.resources.read_sae(), [text for *_, text, _ in given]
        found = sums_of(loaded.engine, sae, detectors, requests, texts)
        known = store.keys()
        rows = [Noticed(*each[:2], each[2].latent, sums) for each, sums in zip(given, found, strict=True)]
        store.append((row.key, row) for row in rows if row.key not in known)

    texts = digest([[key, text, plan.steerer.off] for key, *_, text, plan in given])
    decide = {**inputs, "texts": texts, "detectors": digest(asdict(detectors))}
    makers = ("recipes.noticing.given_beginnings", "eval.beginnings")
    experiment.cache.do(Stage(f"{FOLDER}/{name}", decide, (file,), makers), work)
