"""Where an arm's weights come from, and what it changes beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esr_train.adapter_scale import scale_adapter
from esr_train.adapters import adapter_source, check_adapter, is_complete, merge
from esr_train.errors import InputError
from esr_train.files import read_json, write_json
from esr_train.provenance import digest, folder_hashes, training_settings
from esr_train.ranks import alone
from esr_train.recipe import DETECTORS, EditSection, ModelSection, Recipe
from esr_train.steering.directions import LoadedSae
from esr_train.steering.engine import Request
from esr_train.steering.interventions import Ablate, Amplify, Clamp, Intervention
from esr_train.steering.readout import activation_frequency
from esr_train.transcript import SaeRef
from eval.arms import PLAIN, Variant, matched_latents, prompt_text
from eval.conditions import CONDITIONS
from recipes.experiment import Experiment, base_inputs, hashed, judge_inputs, sae_inputs, source_inputs
from recipes.stages.rows import Rows
from recipes.stages.stage_cache import Stage
from recipes.stages.steering_latents import Latents, Shared
from recipes.stages.training_probe import calibrated_probe
from recipes.stages.training_reward import recipe_reward

MATCH_TEXTS = 48
"""Unsteered answers of the base model on which activation frequencies are measured."""
FREQUENCY = "frequency.json"


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


BASE = Weights("base")


def given_weights(experiment: Experiment, arm: str) -> Weights | None:
    """The weights that an arm names, to be measured or to begin with; None for one that names none.

    Raises:
        InputError: for an adapter or a model that does not exist.
    """
    section = experiment.recipe.arms[arm]
    if section.model:
        model = experiment.recipe.model.model_copy(update={"path": section.model, "revision": None})
        return Weights(digest(["model", section.model, hashed(experiment.resources, model)]), model=section.model)
    if not section.adapter:
        return None
    folder = adapter_folder(section.adapter, f"arms.{arm}.adapter", experiment.recipe.model)
    return Weights(digest(["adapter", folder_hashes(folder)]), folder)


def adapter_folder(path: str, where: str, base: ModelSection) -> Path:
    """The folder of a finished adapter of a model, given by its folder or hub id.

    Raises:
        InputError: if there is none, or it was made for another model.
    """
    folder = adapter_source(path)
    if folder is None or not is_complete(folder):
        raise InputError("there is no finished adapter here", f"{where}={path}", "Train one, or check the path.")
    check_adapter(folder, base)
    return folder


def train_arm(experiment: Experiment, arm: str, rows: Rows, start: Weights | None = None) -> Weights:
    """Train an arm's adapter on its rows, on from those weights if any are given, unless that is done."""
    recipe, adapter = experiment.recipe.for_arm(arm), f"adapter/{arm}"
    inputs = {
        "data": rows.fingerprint,
        "recipe": training_settings(recipe),
        "model": hashed(experiment.resources, recipe.model),
        **(source_inputs(experiment) if recipe.train.live else {"sae": {}}),
        **({"start": start.fingerprint} if start else {}),
        **({"judge": judge_inputs(experiment)} if recipe.train.method == "grpo" else {}),
    }

    def work() -> None:
        experiment.say(f"train {arm}")
        experiment.resources.free_all()
        arguments = (experiment.recipe, experiment.directory, arm)
        if experiment.ranks.count > 1:
            alone(train_from_files, *arguments)
        else:
            train_from_files(*arguments)

    stage = Stage(f"train/{arm}", inputs, (adapter,), ("esr_train.training.trainer",))
    return Weights(experiment.cache.do(stage, work), experiment.directory / adapter)


def train_from_files(recipe: Recipe, directory: Path, arm: str) -> None:
    """Train an arm on the files of a run directory in this process."""
    from esr_train.training.trainer import train

    section = recipe.for_arm(arm)
    probe = calibrated_probe(section, directory) if section.train.probe else None
    train(recipe, arm, directory, probe, recipe_reward(section))


def scale_arm(experiment: Experiment, name: str, weights: Weights, scale: float) -> Weights:
    """An arm's adapter at a share of its strength, unless that is done; at 0 the base model.

    Raises:
        InputError: if the arm has no adapter, or one that is more than LoRA.
    """
    if scale == 1:
        return weights
    if scale == 0:
        return BASE
    adapter, folder = weights.adapter, experiment.directory / "scaled" / name
    if adapter is None:
        raise InputError("there is no adapter to scale", f"arms.{name}")

    def work() -> None:
        # A scaled adapter is moved into its folder whole.
        if not folder.exists():
            scale_adapter(adapter, scale, folder)

    inputs = {"adapter": weights.fingerprint, "scale": scale}
    stage = Stage(f"scale/{name}", inputs, (f"scaled/{name}",), ("esr_train.adapter_scale",))
    return Weights(experiment.cache.do(stage, work), folder)


def merge_arm(experiment: Experiment, name: str, weights: Weights) -> Weights:
    """Merge an arm's adapter into the model, unless that is done.

    Raises:
        InputError: if the arm has no adapter.
    """
    adapter = weights.adapter
    if adapter is None:
        raise InputError("there is no adapter to merge", f"arms.{name}")
    folder = experiment.directory / "merged" / name

    def work() -> None:
        # A merge is moved into its folder whole, so a folder that is there is a finished one.
        if not folder.exists():
            merged = merge(experiment.recipe.model, adapter, folder)
            experiment.say(f"merged {name}: logits differ by {merged.largest_difference:.2g} at most")

    inputs = {"adapter": weights.fingerprint, "model": hashed(experiment.resources, experiment.recipe.model)}
    stage = Stage(f"merge/{name}", inputs, (f"merged/{name}",), ("esr_train.adapters",))
    return Weights(experiment.cache.do(stage, work), model=str(folder))


def form(recipe: Recipe, arm: str) -> str:
    """What an arm is, in words: its weights, prompt variant and changed latents."""
    if arm == "base":
        return "the model as it is"
    section = recipe.arms[arm]
    if section.is_trained and (origin := section.of or section.adapter):
        parts = [f"adapter, trained on from {origin}" + ", merged into the weights" * section.merged]
    elif section.of and not section.merged:
        parts = [f"the weights of {section.of}"]
    elif section.model:
        parts = [f"the model {section.model}"]
    else:
        parts = ["adapter, merged into the weights" if section.merged else "adapter, not merged"]
    if section.scale != 1:
        parts.append(f"the adapter at {section.scale:g} of its strength")
    if section.prompt:
        parts.append(f"prompt variant: {' '.join(section.prompt.split())}")
    parts += _edits_in_words(section.edit) if section.edit else []
    if section.monitor:
        parts.append(f"where a monitor ({Path(section.monitor.file).stem}) sounds: {section.monitor.action}")
    return "; ".join(parts)


def _edits_in_words(edit: EditSection) -> list[str]:
    kind = "random latents matched to " if edit.matched_random else "latents "
    edits = {"ablated": edit.ablate, "clamped": tuple(edit.clamp), "amplified": tuple(edit.amplify)}
    return [f"{kind}{_some(latents)} {what}" for what, latents in edits.items() if latents]


def _some(latents: Sequence[int | str]) -> str:
    return ", ".join(map(str, latents[:5])) + (f" and {len(latents) - 5} more" if len(latents) > 5 else "")


def arm_variant(experiment: Experiment, arm: str, shared: Shared) -> Variant:
    """What the arm does to every request.

    Raises:
        InputError: for a prompt variant or a latent that does not exist, or detectors where none was found.
    """
    if arm == "base":
        return PLAIN
    section = experiment.recipe.arms[arm]
    prompt = prompt_text(section.prompt, f"arms.{arm}.prompt")
    action = section.monitor.action if section.monitor else None
    if section.edit is None:
        return Variant(prompt, monitor=action)
    edit, positions = section.edit, experiment.recipe.engine.positions
    sae = experiment.resources.read_sae() if edit.takes_detectors else experiment.resources.sae()
    latents_of = _edited(experiment, f"arms.{arm}.edit", edit, shared, sae)
    ablated = tuple(k for named in edit.ablate for k in latents_of[named])
    clamped = {k: value for named, value in edit.clamp.items() for k in latents_of[named]}
    amplified = {k: factor for named, factor in edit.amplify.items() for k in latents_of[named]}
    edits: list[Intervention] = [Ablate(sae, ablated, positions)] if ablated else []
    edits += [Clamp(sae, latent, value, positions) for latent, value in clamped.items()]
    edits += [
        Amplify(sae, tuple(k for k, each in amplified.items() if each == factor), factor, positions)
        for factor in dict.fromkeys(amplified.values())
    ]
    said = {"ablate": list(ablated), "clamp": _by_name(clamped)}
    return Variant(prompt, tuple(edits), said | ({"amplify": _by_name(amplified)} if amplified else {}), action)


def _by_name(values: Mapping[int, float]) -> dict[str, float]:
    return {str(latent): value for latent, value in values.items()}


def _edited(
    experiment: Experiment, where: str, edit: EditSection, shared: Shared, sae: LoadedSae
) -> Mapping[int | str, tuple[int, ...]]:
    """The latents that each name in an edit stands for, or random ones like them."""
    found: dict[int | str, tuple[int, ...]] = {}
    if edit.takes_detectors:
        detectors = shared.detectors
        assert detectors is not None
        if not detectors.chosen:
            what = f"none of the {detectors.latents:,} latents tells off-topic replies from the model's own"
            raise InputError(what, where, "Leave the arm out, read another SAE (read.sae), or give more prompts.")
        found[DETECTORS] = detectors.random_sets[edit.draw] if edit.matched_random else detectors.chosen
    wanted = [latent for latent in (*edit.ablate, *edit.clamp, *edit.amplify) if latent != DETECTORS]
    numbers = [int(latent) for latent in wanted]
    for latent in numbers:
        sae.row(latent)
    stand_in = {latent: latent for latent in numbers}
    if numbers and edit.matched_random:
        stand_in = matched(experiment, numbers, shared.latents, shared.frequency, edit.draw)
    return found | {latent: (other,) for latent, other in stand_in.items()}


def matched(
    experiment: Experiment,
    wanted: Sequence[int],
    latents: Latents,
    frequency: NDArray[np.float64] | None,
    draw: int = 0,
) -> dict[int, int]:
    """Random stand-ins for latents, others for each draw; those in play or labelled with a topic never stand in."""
    assert frequency is not None
    resources = experiment.resources
    in_play = {each.latent for each in latents.in_order() if isinstance(each.source, SaeRef)}
    topics = set(resources.prompts().topics)
    labels = {} if experiment.recipe.vectors else resources.labels()
    named = {latent for latent, label in labels.items() if label in topics}
    norms = resources.sae().decoder_norms().double().numpy()
    return matched_latents(wanted, frequency, norms, in_play | named, experiment.recipe.seed + draw)


def needs_frequency(recipe: Recipe) -> bool:
    """Whether something in the recipe is matched in activation frequency."""
    edits = (arm.edit for arm in recipe.arms.values())
    by_condition = any(CONDITIONS[name].needs_frequency for name in recipe.eval.conditions)
    return by_condition or any(edit and edit.matched_random and not edit.takes_detectors for edit in edits)


def takes_detectors(recipe: Recipe) -> bool:
    """Whether an arm edits the latents that `esr latents search` finds."""
    return any(arm.edit and arm.edit.takes_detectors for arm in recipe.arms.values())


def latent_frequency(experiment: Experiment) -> NDArray[np.float64]:
    """How often each latent is active in the base model's own unsteered answers, [n_latents]."""
    path = experiment.directory / FREQUENCY
    inputs = {"base": base_inputs(experiment), "sae": sae_inputs(experiment), "seed": experiment.recipe.seed}

    def work() -> None:
        write_json(path, _measured_frequency(experiment))

    experiment.cache.do(Stage("frequency", inputs, (FREQUENCY,), ("esr_train.steering.readout",)), work)
    return np.array(read_json(path))


def _measured_frequency(experiment: Experiment) -> list[float]:
    resources, seed = experiment.resources, experiment.recipe.seed
    train = resources.prompts().train
    prompts = train[:: max(len(train) // MATCH_TEXTS, 1)][:MATCH_TEXTS]
    requests = [Request(str(number), prompt.text, seed=seed + number) for number, prompt in enumerate(prompts)]
    answers = resources.base().generate(requests, resources.sampling())
    texts = [asked + answer.text for asked, answer in zip(resources.rendered(prompts), answers, strict=True)]
    frequency = activation_frequency(resources.base_model(), resources.tokenizer(), resources.sae(), texts)
    return [float(value) for value in frequency]
