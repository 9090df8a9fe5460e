"""The models under test: where an arm's weights come from, and what it changes beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esr_train.adapters import check_adapter, is_complete, merge
from esr_train.errors import InputError
from esr_train.models import local_path
from esr_train.provenance import sha256
from esr_train.recipe import ModelSection, Recipe
from esr_train.steering.engine import Engine
from esr_train.steering.interventions import Ablate, Clamp, Intervention
from esr_train.steering.readout import activation_frequency
from eval.matching import matched_latents
from eval.variants import PLAIN, Variant, prompt_text
from recipes.resources import World
from recipes.stage_cache import digest

if TYPE_CHECKING:
    from recipes.pipeline import Experiment

MATCH_TEXTS = 48
"""Unsteered answers of the base model on which activation frequencies are measured."""


@dataclass(frozen=True)
class Weights:
    """Which weights an arm has.

    Args:
        fingerprint: of everything that made them.
        adapter: folder of the adapter on the recipe's model, if there is one.
        model: hub id or folder of a whole model that takes the place of the recipe's, if it is another.
    """

    fingerprint: str
    adapter: Path | None = None
    model: str | None = None

    @property
    def is_base(self) -> bool:
        """Whether these are the recipe's model as it is."""
        return self.adapter is None and self.model is None

    def engine(self, world: World) -> Engine:
        """An engine on these weights; the base model is let go for others: an accelerator may hold one, not two."""
        if self.model:
            world.stop()
            return world.engine(None, instead=self.model)
        if self.adapter is None:
            return world.base
        world.release()
        return world.engine(self.adapter)


BASE = Weights("base")


def weights(experiment: "Experiment", arm: str) -> Weights:
    """An arm's weights, trained or merged first if they are not there yet.

    Raises:
        InputError: for an adapter or a model that does not exist.
    """
    if arm == "base":
        return BASE
    section = experiment.recipe.arms[arm]
    if section.model:
        return Weights(digest(["model", section.model, _hash(section.model)]), model=section.model)
    if section.of:
        found = weights(experiment, section.of)
    elif section.adapter:
        found = _finished(section.adapter, f"arms.{arm}.adapter", experiment.recipe.model)
    else:
        found = experiment.trained(arm)
    return _merged(experiment, section.of or arm, found) if section.merged else found


def _finished(path: str, where: str, base: ModelSection) -> Weights:
    folder = local_path(path)
    if folder is None or not is_complete(folder):
        raise InputError("there is no finished adapter here", f"{where}={path}", "Train one, or check the path.")
    check_adapter(folder, base)
    return Weights(sha256(folder / "adapter_model.safetensors"), folder)


def _hash(path: str) -> str | None:
    folder = local_path(path)
    file = folder / "model.safetensors" if folder else None
    return sha256(file) if file and file.is_file() else None


def _merged(experiment: "Experiment", name: str, found: Weights) -> Weights:
    adapter = found.adapter
    if adapter is None:
        raise InputError("there is no adapter to merge", f"arms.{name}")
    folder = experiment.directory / "merged" / name

    def make() -> None:
        # A merge is moved into place whole, so a folder that is there is a finished one.
        if not folder.exists():
            made = merge(experiment.recipe.model, adapter, folder)
            print(f"merged {name}: logits differ by {made.largest_difference:.2g} at most", flush=True)

    fingerprint = experiment.stages.do(f"merge/{name}", {"adapter": found.fingerprint}, [f"merged/{name}"], make)
    return Weights(fingerprint, model=str(folder))


def form(recipe: Recipe, arm: str) -> str:
    """What an arm is, in words: its weights, prompt variant and changed latents."""
    if arm == "base":
        return "the model as it is"
    section = recipe.arms[arm]
    if section.of and not section.merged:
        parts = [f"the weights of {section.of}"]
    elif section.model:
        parts = [f"the model {section.model}"]
    else:
        parts = ["adapter, merged into the weights" if section.merged else "adapter, not merged"]
    if section.prompt:
        parts.append(f"prompt variant: {' '.join(section.prompt.split())}")
    if section.edit:
        kind = "random latents matched to " if section.edit.matched_random else "latents "
        parts += [f"{kind}{_some(section.edit.ablate)} ablated"] if section.edit.ablate else []
        parts += [f"{kind}{_some(tuple(section.edit.clamp))} clamped"] if section.edit.clamp else []
    return "; ".join(parts)


def _some(latents: Sequence[int]) -> str:
    return ", ".join(map(str, latents[:5])) + (f" and {len(latents) - 5} more" if len(latents) > 5 else "")


def variant(experiment: "Experiment", arm: str) -> Variant:
    """What the arm does to every request.

    Raises:
        InputError: for a prompt variant or a latent that does not exist.
    """
    if arm == "base":
        return PLAIN
    section, world = experiment.recipe.arms[arm], experiment.world
    prompt = prompt_text(section.prompt, f"arms.{arm}.prompt")
    if section.edit is None:
        return Variant(prompt)
    wanted = [*section.edit.ablate, *section.edit.clamp]
    for latent in wanted:
        world.sae.row(latent)
    stand_in = matched(experiment, wanted) if section.edit.matched_random else {latent: latent for latent in wanted}
    ablated = tuple(stand_in[latent] for latent in section.edit.ablate)
    clamped = {stand_in[latent]: value for latent, value in section.edit.clamp.items()}
    positions = experiment.recipe.engine.positions
    edits: list[Intervention] = [Ablate(world.sae, ablated, positions)] if ablated else []
    edits += [Clamp(world.sae, latent, value, positions) for latent, value in clamped.items()]
    names = {str(latent): value for latent, value in clamped.items()}
    return Variant(prompt, tuple(edits), {"ablate": list(ablated), "clamp": names})


def matched(experiment: "Experiment", wanted: Sequence[int]) -> dict[int, int]:
    """Random stand-ins for latents; those in play, and those labelled with a topic, never stand in."""
    world = experiment.world
    in_play = set(experiment.chosen)
    topics = set(world.pools.topics)
    named = {latent for latent, label in world.labels.items() if label in topics}
    norms = world.sae.decoder_norms().double().numpy()
    return matched_latents(wanted, experiment.frequency, norms, in_play | named, experiment.recipe.seed)


def needs_frequency(recipe: Recipe) -> bool:
    """Whether something in the recipe is matched in activation frequency."""
    edits = (arm.edit for arm in recipe.arms.values())
    return "random_latents" in recipe.eval.conditions or any(edit and edit.matched_random for edit in edits)


def frequencies(world: World, seed: int) -> list[float]:
    """How often each latent is active in the base model's own unsteered answers, [n_latents]."""
    from esr_train.steering.engine import Request

    prompts = world.pools.train[:: max(len(world.pools.train) // MATCH_TEXTS, 1)][:MATCH_TEXTS]
    requests = [Request(str(number), prompt.text, seed=seed + number) for number, prompt in enumerate(prompts)]
    answers = world.base.generate(requests, world.sampling())
    texts = [asked + answer.text for asked, answer in zip(world.rendered(prompts), answers, strict=True)]
    return [float(value) for value in activation_frequency(world.open_model(), world.tokenizer, world.sae, texts)]
