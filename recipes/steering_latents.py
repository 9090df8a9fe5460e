"""Which latents may steer, and how far: chosen from the labelled ones, split, and those whose threshold was found."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_gen.collect import KEPT
from data_gen.latent_choice import choose
from data_gen.sources import SteerableLatent
from esr_train.files import read_json, write_json
from esr_train.recipe import Recipe
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Direction
from esr_train.steering.readout import active_latents
from eval.calibration import Threshold, calibration_key
from eval.cells import SPLITS, Split
from recipes.resources import World

FILE = "latents.json"
"""In a run directory: the chosen latents of each split, and what became of the others."""
NO_TOPIC, LATER, ZEROS = "label is no topic of the prompts", "beyond latents.per_label", "decoder row of zeros"


def choose_latents(recipe: Recipe, world: World) -> dict[str, Any]:
    """Choose among all labelled latents: JSON values of `latents.json`.

    Raises:
        InputError: if none is left, or a label is of a latent that the SAE does not have.
    """
    topics = set(world.pools.topics)
    chosen, left_out = first_of_each(world.labels, topics, recipe.latents.per_label)
    directions = [world.direction(latent) for latent in chosen if world.sae.row(latent).any()]
    if zeros := len(chosen) - len(directions):
        left_out[ZEROS] = zeros
    splits = world.required_prompts.splits
    # A latent whose label is a topic is active on that topic's prompts; it never steers those.
    active = frozenset[int]() if topics & {*world.labels.values()} else _active(recipe, world)
    found = choose(directions, active, world.pools.topics, splits, recipe.latents.limit)
    kept = sum(map(len, found.splits.values()))
    return {
        "funnel": {KEPT: kept, **left_out, **found.left_out},
        "splits": {split: [each.latent for each in group] for split, group in found.splits.items()},
    }


def _active(recipe: Recipe, world: World) -> frozenset[int]:
    texts = world.rendered(world.pools.all_prompts)
    found = active_latents(world.open_model(), world.tokenizer, world.sae, texts, recipe.engine.batch_rows)
    return frozenset(found.nonzero().flatten().tolist())


def first_of_each(labels: Mapping[int, str], topics: set[str], count: int) -> tuple[list[int], dict[str, int]]:
    """The first `count` latents with each label, in the order of the labels, and how many others were left out.

    The order is by preference: purest first in shipped files. Where labels are topics of the prompts, those that are
    none are left out; labels of another kind are all taken.
    """
    are_topics = not topics.isdisjoint(labels.values())
    taken: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    chosen = []
    for latent, label in labels.items():
        if are_topics and label not in topics:
            left_out[NO_TOPIC] += 1
        elif taken[label] >= count:
            left_out[LATER] += 1
        else:
            taken[label] += 1
            chosen.append(latent)
    return chosen, dict(left_out)


def save_chosen(directory: Path, chosen: Mapping[str, Any]) -> None:
    """Write `latents.json`, and its funnel where `esr data stats` finds it."""
    write_json(directory / "data" / "latents.funnel.json", chosen["funnel"])
    write_json(directory / FILE, chosen)


def load_splits(directory: Path) -> dict[Split, list[int]]:
    """The chosen latents of each split, by index."""
    found = read_json(directory / FILE)["splits"]
    return {split: found[split] for split in SPLITS}


def steerable(
    splits: Mapping[Split, Sequence[int]], directions: Sequence[Direction], thresholds: Sequence[Threshold]
) -> dict[Split, list[SteerableLatent]]:
    """The steerable latents of each split; those whose threshold lies at a bound are left out."""
    norms = {each.latent: each.norm for each in thresholds if each.bound is None}
    by_index = {each.latent: each for each in directions}
    return {
        split: [SteerableLatent(by_index[latent], norms[latent]) for latent in latents if latent in norms]
        for split, latents in splits.items()
    }


def gate_funnel(thresholds: Sequence[Threshold]) -> dict[str, int]:
    """How many latents have a threshold, and how many have none because steering broke them at once, or never."""
    bounds = Counter(each.bound for each in thresholds if each.bound)
    kept = len(thresholds) - bounds.total()
    return {KEPT: kept, **{f"threshold at the {bound} bound": n for bound, n in sorted(bounds.items())}}


def facts(directory: Path) -> list[str]:
    """What the report says about a run's latents: how many are in play, and why the others are not."""
    said = []
    for name, what in (("latents", "labelled latents are in play"), ("thresholds", "of those can be steered with")):
        path = directory / "data" / f"{name}.funnel.json"
        if path.is_file():
            funnel = read_json(path)
            lost = ", ".join(f"{reason}: {n}" for reason, n in funnel.items() if reason != KEPT)
            said.append(f"{funnel[KEPT]} of {sum(funnel.values())} {what}" + (f" (left out: {lost})" if lost else ""))
    return said


def frozen_directions(world: World, thresholds: Sequence[Threshold]) -> list[Direction]:
    """The directions that thresholds were measured on; the model, whose residual norm they hold, is not loaded."""
    sae = load_sae(world.sae_ref)
    norms = sae.decoder_norms()
    return [
        sae.direction(each.latent, each.raw * float(norms[each.latent]) / each.norm, each.label) for each in thresholds
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
