"""The behavioural probe of a training: validation cells, steered at the base model's thresholds."""

import os
from pathlib import Path

from esr_train.errors import InputError
from esr_train.recipe import Recipe
from eval.behaviour import MakeProbe, probing
from eval.calibration import load_thresholds
from eval.cells import make_cells
from eval.trials import Steerer
from recipes.resources import Resources, present
from recipes.steering_latents import THRESHOLDS, read_latents, steerable, threshold_key


def calibrated_probe(recipe: Recipe, directory: Path) -> MakeProbe:
    """The probe that an arm's `train.probe` asks for, from a run's frozen thresholds, without loading a model.

    Every process of a launched training calls it, and before anything of DeepSpeed's is set up: ZeRO-3 changes how
    modules are made, which sae-lens does not survive.

    Args:
        recipe: as the arm sees it.
        directory: of the run.

    Raises:
        InputError: if the run has not been calibrated, or a judge would have to be loaded beside sharded weights.
    """
    section = present(recipe.train.probe, "train.probe")
    if recipe.judge.kind == "local" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "the probe's judge cannot be loaded into one of several training processes",
            "train.probe",
            "Take judge.kind lexical or model, or set train.probe=null.",
        )
    if not (directory / THRESHOLDS).is_file():
        raise InputError(
            "train.probe steers at the base model's thresholds, which are not there",
            str(directory / THRESHOLDS),
            "Run `esr eval calibrate` with this recipe first, or set train.probe=null.",
        )
    resources = Resources(recipe)
    thresholds = load_thresholds(directory / THRESHOLDS, threshold_key(resources))
    latents = steerable(read_latents(directory, resources.sae(), resources.labels()), thresholds)["validation"]
    directions = {latent.direction.latent: latent.direction for latent in latents}
    cells = make_cells(resources.prompts().validation, list(directions.values()), section.trials, recipe.seed)
    norms = {latent.direction.latent: latent.threshold for latent in latents}
    steerer = Steerer(directions, norms, recipe.engine.positions)
    return probing(resources.judge(), cells, steerer, resources.sampling(), recipe.engine.batch_rows)
