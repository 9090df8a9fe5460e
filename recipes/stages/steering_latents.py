"""Which latents may steer, and how far: chosen from the labelled ones, dealt to splits, calibrated on the model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_gen.collect import KEPT
from data_gen.latents.concreteness import rate_labels
from data_gen.latents.latent_choice import Faults, choose
from data_gen.sources import SteerableLatent, sources_steer
from esr_train.errors import InputError
from esr_train.files import read_json, write_json
from esr_train.recipe import Recipe
from esr_train.steering.directions import Direction, DirectionSource, Positions, VectorSet
from esr_train.steering.readout import active_latents
from eval.arms import Arm
from eval.calibration import (
    CalibrationPrompts,
    Threshold,
    calibrate,
    calibration_key,
    load_thresholds,
    response_count,
    save_thresholds,
    score_store,
)
from eval.cells import SPLITS, Side, Split
from eval.detectors import Detectors, DetectorSet
from eval.judging.model_judge import ModelJudge
from eval.report.story import progress_bar
from eval.trials import Steerer
from recipes.experiment import Experiment, base_inputs, judge_inputs, source_inputs
from recipes.resources import Resources
from recipes.stages.stage_cache import Stage, digest

LATENTS, THRESHOLDS = "latents.json", "thresholds.json"
"""In a run directory."""
FUNNELS = {"latents": "data/latents.funnel.json", "thresholds": "data/thresholds.funnel.json"}
"""Where `esr data stats` finds how many latents were left out, and why."""
WIDER = 2.0
"""Upper bound of a recalibration, in multiples of the base model's: a tuned model may resist more."""
ALL_MEASURED = "nothing is trained here on the {}s, so all of them are measured"
MORE = {"vector": "Name a file with more vectors", "latent": "Label more latents"}
ABSTRACT, UNRATED = "label is too abstract", "label got no rating"
NO_TOPIC, LATER, ZEROS = "label is no topic of the prompts", "beyond latents.per_label", "decoder row of zeros"


@dataclass(frozen=True)
class Latents:
    """The latents that may steer.

    Args:
        fingerprint: of everything that decided the choice.
        splits: their directions, by split.
    """

    fingerprint: str
    splits: Mapping[Split, Sequence[Direction]]

    def in_order(self) -> list[Direction]:
        """The latents of every split."""
        return [direction for split in SPLITS for direction in self.splits[split]]


NO_LATENTS = Latents("none", {split: () for split in SPLITS})


@dataclass(frozen=True)
class Calibrated:
    """The base model's thresholds.

    Args:
        thresholds: of every latent in play, those at a bound included.
        steerable: the latents of each split without those at a bound.
    """

    fingerprint: str
    thresholds: Sequence[Threshold]
    steerable: Mapping[Split, Sequence[SteerableLatent]]


NOT_CALIBRATED = Calibrated("none", (), {split: () for split in SPLITS})


@dataclass(frozen=True)
class Shared:
    """What all arms and seeds of a recipe share.

    Args:
        calibrated: their thresholds on the base model.
        frequency: how often each latent of the SAE is active, [n_latents], where something is matched in it.
        detectors: the latents that notice, where an arm edits them.
        found: all that a search in this run has found.
        goals: steers towards styles and refusals that somebody wants, where that is measured.
    """

    latents: Latents
    calibrated: Calibrated
    frequency: NDArray[np.float64] | None = None
    detectors: DetectorSet | None = None
    found: Detectors | None = None
    goals: Steerer | None = None

    def steerer(self, positions: Positions, split: Split = "test") -> Steerer:
        """Steers with the latents of a split at the base model's thresholds."""
        steerable = self.calibrated.steerable[split]
        directions = {latent.direction.latent: latent.direction for latent in steerable}
        return Steerer(directions, {latent.direction.latent: latent.threshold for latent in steerable}, positions)


def choose_latents(experiment: Experiment) -> Latents:
    """Choose among all labelled latents or all vectors; none where the recipe has no SAE, or no labels for it.

    Raises:
        InputError: if none is left, or a label is of a latent that the SAE does not have.
    """
    recipe, resources = experiment.recipe, experiment.resources
    if not recipe.vectors and (recipe.sae is None or recipe.sae.labels is None):
        return NO_LATENTS
    inputs = {
        "base": base_inputs(experiment),
        **source_inputs(experiment),
        "latents": recipe.latents.model_dump(exclude={"concreteness"}),
        "splits": resources.prompt_section().splits.model_dump(),
    }
    if recipe.latents.concreteness is not None:
        inputs["concreteness"] = [recipe.latents.concreteness, resources.judge().name]
    stage = Stage("latents", inputs, (LATENTS, FUNNELS["latents"]), ("recipes.stages.steering_latents",))

    def work() -> None:
        chosen = _chosen(experiment)
        write_json(experiment.directory / FUNNELS["latents"], chosen["funnel"])
        write_json(experiment.directory / LATENTS, chosen)

    fingerprint = experiment.cache.do(stage, work)
    return Latents(fingerprint, read_latents(experiment.directory, resources.source(), resources.labels()))


def _chosen(experiment: Experiment) -> dict[str, Any]:
    """JSON values of `latents.json`: indices by split, the residual norm, and what became of the other latents."""
    recipe, resources = experiment.recipe, experiment.resources
    source, labels, pools = resources.source(), resources.labels(), resources.prompts()
    topics: set[str] = set() if recipe.vectors else set(pools.topics)
    first, left_out = first_of_each(labels, topics, recipe.latents.per_label)
    norm = resources.residual_norm()
    steering = [latent for latent in first if isinstance(source, VectorSet) or source.row(latent).any()]
    if zeros := len(first) - len(steering):
        left_out[ZEROS] = zeros
    directions = [source.direction(latent, norm, labels[latent]) for latent in steering]
    active, notes = _active_on_prompts(experiment)
    if recipe.vectors:
        notes.append(f"vectors of {recipe.vectors.file} are added to the output of layer {source.layer}")
    splits = resources.prompt_section().splits
    all_measured = _all_are_measured(recipe, len(directions))
    ratings: dict[str, float | None] = {}
    dealt_by, faults = None if all_measured else splits, _label_faults(experiment, ratings)
    choice = choose(directions, active, pools.topics, dealt_by, recipe.latents.limit, faults)
    _check_dealt(recipe, choice.splits)
    kept = sum(map(len, choice.splits.values()))
    notes += [ALL_MEASURED.format(direction_noun(recipe))] if all_measured else []
    notes += [_rated(experiment, ratings)] if ratings else []
    for note in notes:
        experiment.say(note)
    return {
        "funnel": {KEPT: kept, **left_out, **choice.left_out},
        "notes": notes,
        "layer": source.layer,
        "residual_norm": norm,
        "splits": {split: [direction.latent for direction in group] for split, group in choice.splits.items()},
        "nearest": _nearest(choice.splits["test"], choice.splits["train"]),
        **({"concreteness": ratings} if ratings else {}),
    }


def _label_faults(experiment: Experiment, ratings: dict[str, float | None]) -> Faults | None:
    """Leaves out latents whose label the judge finds too abstract, and notes its ratings; None if none is asked for."""
    least, resources = experiment.recipe.latents.concreteness, experiment.resources
    if least is None:
        return None

    def faults(latents: Sequence[Direction]) -> list[str | None]:
        judge, labels = resources.judge(), [str(latent.label) for latent in latents]
        assert isinstance(judge, ModelJudge)  # the recipe refuses others
        found = rate_labels(labels, judge.asker)
        ratings.update(zip(labels, found, strict=True))
        return [UNRATED if score is None else ABSTRACT if score < least else None for score in found]

    return faults


def _rated(experiment: Experiment, ratings: Mapping[str, float | None]) -> str:
    least = experiment.recipe.latents.concreteness or 0
    concrete = sum(score is not None and score >= least for score in ratings.values())
    return f"{concrete} of {len(ratings)} labels are rated {least:g} or more for concreteness"


def _nearest(test: Sequence[Direction], train: Sequence[Direction]) -> dict[str, float]:
    """Test latent -> its cosine with the nearest training direction."""
    if not train:
        return {}
    seen = torch.stack([direction.unit.float() for direction in train])
    return {str(each.latent): round(float((seen @ each.unit.float()).max()), 4) for each in test}


def _active_on_prompts(experiment: Experiment) -> tuple[frozenset[int], list[str]]:
    """The latents that are active on a prompt, and a sentence where that cannot be asked.

    A latent whose label is a topic never steers a prompt of it; of others nobody knows where they are relevant.
    """
    recipe, resources = experiment.recipe, experiment.resources
    pools = resources.prompts()
    if recipe.vectors or not set(pools.topics).isdisjoint(resources.labels().values()):
        return frozenset(), []
    sae = resources.sae()
    if sae.not_encoded:
        return frozenset(), [f"latents that are active on a prompt are not left out: {sae.not_encoded}"]
    texts = resources.rendered(pools.all_prompts)
    mask = active_latents(resources.base_model(), resources.tokenizer(), sae, texts, recipe.engine.chunk())
    return frozenset(mask.nonzero().flatten().tolist()), []


def _all_are_measured(recipe: Recipe, count: int) -> bool:
    """Whether all latents or vectors are measured: the recipe says so, or vectors cannot have been trained on or dealt.

    Raises:
        InputError: if vectors are too few to be divided between training and measurement, or what is trained on is to
            be measured.
    """
    if not recipe.latents.held_out:
        if _trains_on_directions(recipe):
            what = "an arm is trained on what steers, which must not be measured then"
            raise InputError(what, "latents.held_out", "Remove it, or train nothing here.")
        return True
    if not recipe.vectors:
        return False
    needed = 2 + bool(recipe.prompts and recipe.prompts.splits.validation)
    if not _trains_on_directions(recipe):
        given = any(arm.adapter or arm.model for arm in recipe.arms.values())
        return count < needed or not given
    if count < needed:
        raise InputError(
            f"{count} vector{'s' * (count != 1)} cannot be divided between training and measurement, and what was "
            f"trained on must not be measured: {needed} are needed",
            "vectors.file",
            "Name a file with more vectors (`esr vectors make`), or train nothing here: without rows that are steered "
            "or a trained arm, one vector is enough.",
        )
    return False


def _trains_on_directions(recipe: Recipe) -> bool:
    seen = [recipe.for_arm(arm) for arm in recipe.trained_arms]
    return any(arm.train.data or arm.train.probe or sources_steer(arm.data) for arm in seen)


def _check_dealt(recipe: Recipe, splits: Mapping[Split, Sequence[Direction]]) -> None:
    """Refuse latents or vectors of which none is left to train on, or to measure."""
    noun = direction_noun(recipe)
    for split, purpose in _needed(recipe).items():
        if not splits[split]:
            raise InputError(
                f"none of the {sum(map(len, splits.values()))} {noun}s is left {purpose}: they are dealt to splits by "
                "their labels",
                "prompts.splits",
                f"{MORE[noun]}, or change the shares or the seed.",
            )


def _needed(recipe: Recipe) -> dict[Split, str]:
    """The splits that must have directions, and what for."""
    wanted: dict[Split, str] = {"test": "to measure"}
    if any(sources_steer(recipe.for_arm(arm).data) for arm in recipe.trained_arms):
        wanted["train"] = "to steer training rows with"
    return wanted


def check_steerable(recipe: Recipe, calibrated: Calibrated) -> None:
    """Refuse to go on where every direction that is needed has its threshold at a bound.

    Raises:
        InputError: saying at which bounds they lie, and what that means.
    """
    noun, (low, high) = direction_noun(recipe), recipe.calibration.bounds
    for split, purpose in _needed(recipe).items():
        if not calibrated.steerable[split]:
            at, count = Counter(threshold.bound for threshold in calibrated.thresholds), len(calibrated.thresholds)
            raise InputError(
                f"no {noun} is left {purpose}, as thresholds lie at a bound: {at['low']} of {count} at the low one (at "
                f"{low:g} residual norms answers are off-topic), {at['high']} at the high one (at {high:g} they "
                "are not yet)",
                f"calibration.bounds=[{low:g}, {high:g}]",
                f"Widen them; where that does not help, the judge or the {noun}s do not fit the model.",
            )


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


def read_latents(directory: Path, source: DirectionSource, labels: Mapping[int, str]) -> dict[Split, list[Direction]]:
    """The chosen latents of a run, by split."""
    chosen = read_json(directory / LATENTS)
    norm = chosen["residual_norm"]
    return {
        split: [source.direction(latent, norm, labels[latent]) for latent in chosen["splits"][split]]
        for split in SPLITS
    }


def calibrate_base(experiment: Experiment, latents: Latents) -> Calibrated:
    """Every latent's threshold on the base model."""
    recipe = experiment.recipe
    inputs = {
        "base": base_inputs(experiment),
        **source_inputs(experiment),
        "judge": judge_inputs(experiment),
        "calibration": recipe.calibration.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    # Scores are kept under what they depend on: with more latents, or others, those known already are not asked again.
    scores = experiment.directory / "calibration" / f"base-{digest(inputs)}.jsonl"
    path, directions = experiment.directory / THRESHOLDS, _by_label(experiment, latents)

    def work() -> None:
        arm = Arm(experiment.resources.base(), experiment.resources.judge(), experiment.resources.sampling())
        thresholds = search_thresholds(experiment, arm, directions, scores)
        write_json(experiment.directory / FUNNELS["thresholds"], threshold_funnel(thresholds))
        save_thresholds(path, threshold_key(experiment.resources), thresholds)

    stage = Stage(
        "calibrate",
        {**inputs, "latents": latents.fingerprint},
        (THRESHOLDS, FUNNELS["thresholds"]),
        ("eval.calibration", "recipes.stages.steering_latents"),
    )
    fingerprint = experiment.cache.do(stage, work)
    thresholds = load_thresholds(path, threshold_key(experiment.resources))
    at_bound = sum(threshold.bound is not None for threshold in thresholds)
    median = sorted(threshold.norm for threshold in thresholds)[len(thresholds) // 2]
    experiment.say(
        f"calibrated {len(thresholds)} {direction_noun(recipe)}s: median threshold {median:.2f} residual norms; "
        f"{at_bound} left out at a bound"
    )
    return Calibrated(fingerprint, thresholds, steerable(latents.splits, thresholds))


def _by_label(experiment: Experiment, latents: Latents) -> list[Direction]:
    """The latents of every split, in the order of their labels."""
    directions = {direction.latent: direction for direction in latents.in_order()}
    return [directions[latent] for latent in experiment.resources.labels() if latent in directions]


def search_thresholds(experiment: Experiment, arm: Arm, latents: Sequence[Direction], scores: Path) -> list[Threshold]:
    """Thresholds of latents on an arm; another one than the base is searched up to higher strengths."""
    section, pools = experiment.recipe.calibration, experiment.resources.prompts()
    if arm.name != "base":
        low, high = section.bounds
        section = section.model_copy(update={"bounds": (low, WIDER * high)})
    with progress_bar(response_count(len(latents), section), f"calibrate {arm.name}") as progress:
        return calibrate(
            arm,
            latents,
            CalibrationPrompts(pools.validation or pools.train, pools.train),
            section,
            positions=experiment.recipe.engine.positions,
            seed=experiment.recipe.seed,
            store=score_store(scores),
            progress=progress,
        )


def threshold_key(resources: Resources) -> Mapping[str, Any]:
    """What the base model's thresholds depend on (see `eval.calibration.calibration_key`)."""
    recipe = resources.recipe
    pools = resources.prompts()
    return calibration_key(
        recipe.model.path,
        resources.source().ref,
        resources.judge().name,
        pools.validation or pools.train,
        resources.sampling(),
        recipe.calibration,
        recipe.engine.positions,
    )


def steerable(
    splits: Mapping[Split, Sequence[Direction]], thresholds: Sequence[Threshold]
) -> dict[Split, list[SteerableLatent]]:
    """The steerable latents of each split; those whose threshold lies at a bound are left out."""
    norms = {threshold.latent: threshold.norm for threshold in thresholds if threshold.bound is None}
    return {
        split: [SteerableLatent(direction, norms[direction.latent]) for direction in group if direction.latent in norms]
        for split, group in splits.items()
    }


def threshold_funnel(thresholds: Sequence[Threshold]) -> dict[str, int]:
    """How many latents have a threshold, and how many have none because steering broke them at once, or never."""
    bounds = Counter(threshold.bound for threshold in thresholds if threshold.bound)
    kept = len(thresholds) - bounds.total()
    return {KEPT: kept, **{f"threshold at the {bound} bound": n for bound, n in sorted(bounds.items())}}


def held_out(resources: Resources, latents: Latents) -> Side:
    """All that the evaluation may use: test prompts, and test latents with what they stand for."""
    test = latents.splits["test"]
    return Side(
        frozenset(prompt.text for prompt in resources.prompts().test),
        frozenset(direction.latent for direction in test),
        frozenset(direction.label for direction in test if direction.label),
    )


def direction_noun(recipe: Recipe) -> str:
    """What texts call one of a recipe's directions: `latent` or `vector`."""
    return "vector" if recipe.vectors else "latent"


def nearest_trained(directory: Path) -> dict[int, float]:
    """Test latent -> its cosine with the nearest training direction, as far as the run knows."""
    path = directory / LATENTS
    found = read_json(path).get("nearest", {}) if path.is_file() else {}
    return {int(latent): float(cosine) for latent, cosine in found.items()}


def latent_facts(directory: Path, noun: str = "latent") -> list[str]:
    """What the report says about a run's latents or vectors: how many are in play, and why the others are not."""
    chosen = directory / LATENTS
    said = list(read_json(chosen).get("notes", ())) if chosen.is_file() else []
    in_play = f"{noun}s are in play" if noun == "vector" else f"labelled {noun}s are in play"
    for name, what in (("latents", in_play), ("thresholds", "of those can be steered with")):
        path = directory / FUNNELS[name]
        if path.is_file():
            funnel = read_json(path)
            lost = ", ".join(f"{reason}: {n}" for reason, n in funnel.items() if reason != KEPT)
            said.append(f"{funnel[KEPT]} of {sum(funnel.values())} {what}" + (f" (left out: {lost})" if lost else ""))
    return said
