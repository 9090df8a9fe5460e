"""The behavioural probe of a training: validation cells, steered at the base model's thresholds."""

import os
from collections.abc import Sequence

from data_gen.sources import SteerableLatent
from esr_train.errors import InputError
from esr_train.recipe import Recipe
from eval.behaviour import MakeProbe, probing
from eval.calibration import load_thresholds
from eval.cells import make_cells
from eval.trials import Steerer
from recipes.resources import World, present
from recipes.steering_latents import frozen_directions, load_splits, steerable, threshold_key


def probe(recipe: Recipe, world: World, latents: Sequence[SteerableLatent]) -> MakeProbe:
    """The probe that an arm's `train.probe` asks for.

    Args:
        recipe: as the arm sees it.
        world: its prompts and judge.
        latents: of the validation split.
    """
    section = present(recipe.train.probe, "train.probe")
    directions = {each.direction.latent: each.direction for each in latents}
    cells = make_cells(world.pools.validation, list(directions.values()), section.trials, recipe.seed)
    norms = {each.direction.latent: each.threshold for each in latents}
    steerer = Steerer(directions, norms, recipe.engine.positions)
    return probing(world.judge, cells, steerer, world.sampling(), recipe.engine.batch_rows)


def calibrated_probe(recipe: Recipe) -> MakeProbe:
    """The same from the run directory's frozen thresholds, without loading a model.

    Every process of a launched training calls it, and before anything of DeepSpeed's is set up: ZeRO-3 changes how
    modules are made, which sae-lens does not survive.

    Raises:
        InputError: if the run has not been calibrated, or a judge would have to be loaded beside sharded weights.
    """
    if recipe.judge.kind == "local" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "the probe's judge cannot be loaded into one of several training processes",
            "train.probe",
            "Take judge.kind lexical or model, or set train.probe=null.",
        )
    world, path = World(recipe), recipe.directory / "thresholds.json"
    if not path.is_file():
        raise InputError(
            "train.probe steers at the base model's thresholds, which are not there",
            str(path),
            "Run `esr eval calibrate` with this recipe first, or set train.probe=null.",
        )
    thresholds = load_thresholds(path, threshold_key(recipe, world))
    latents = steerable(load_splits(recipe.directory), frozen_directions(world, thresholds), thresholds)
    return probe(recipe, world, latents["validation"])
