"""Which latents may steer, and how far: the splits of those whose threshold was found."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_gen.context import SteerableLatent
from data_gen.latents import deal_latents
from esr_train.recipe import Recipe
from esr_train.steering.sae import Direction, load_sae
from eval.calibration import Threshold, calibration_key
from recipes.world import World


def steerable(
    recipe: Recipe, world: World, directions: Sequence[Direction], thresholds: Sequence[Threshold]
) -> dict[str, list[SteerableLatent]]:
    """The steerable latents of each split; those whose threshold lies at a bound are left out."""
    norms = {each.latent: each.norm for each in thresholds if each.bound is None}
    split = deal_latents(directions, world.pools.topics, world.required_prompts.splits)
    return {
        name: [SteerableLatent(each, norms[each.latent]) for each in group if each.latent in norms]
        for name, group in split.items()
    }


def frozen_directions(world: World, thresholds: Sequence[Threshold]) -> list[Direction]:
    """The directions that thresholds were measured on; the model, whose residual norm they hold, is not loaded."""
    sae = load_sae(world.sae_ref)
    return [
        sae.direction(each.latent, each.raw * float(sae.decoder_norms[each.latent]) / each.norm, each.label)
        for each in thresholds
    ]


def threshold_key(recipe: Recipe, world: World) -> Mapping[str, Any]:
    """What the base model's thresholds depend on (see `eval.calibration.calibration_key`)."""
    return calibration_key(
        recipe.model.path,
        world.sae_ref,
        world.judge.name,
        world.pools.validation or world.pools.train,
        world.sampling(),
        recipe.calibration,
        recipe.engine.positions,
    )
