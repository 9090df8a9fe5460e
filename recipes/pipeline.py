"""An experiment from a recipe to its report, read from top to bottom.

Every step below is a stage: it is skipped if nothing that decides its result has changed (see `stage_cache`), and an
interrupted one goes on where it stopped. Values are passed from step to step.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data_gen.sources import sources_steer
from esr_train.errors import InputError
from esr_train.ranks import ALONE, Ranks, at_once
from esr_train.recipe import Recipe
from eval.conditions import GOALS, measured_conditions
from recipes.experiment import Experiment, is_finished, open_experiment
from recipes.noticing.latent_search import find_detectors, known_detectors
from recipes.planning.plan import Planner, announcing
from recipes.planning.preflight import Scope, check, whole
from recipes.resources import open_resources
from recipes.run_log import say
from recipes.stages.goal_steering import SHARED, towards_goals
from recipes.stages.measure import ArmRun, measure
from recipes.stages.results import spent, write_print_figures, write_reports
from recipes.stages.rows import Rows, generate_sources, mix_rows
from recipes.stages.stage_cache import StageCache
from recipes.stages.steering_latents import (
    FUNNELS,
    LATENTS,
    NOT_CALIBRATED,
    THRESHOLDS,
    Shared,
    calibrate_base,
    check_steerable,
    choose_latents,
)
from recipes.stages.weights import (
    BASE,
    Weights,
    given_weights,
    latent_frequency,
    merge_arm,
    needs_frequency,
    scale_arm,
    takes_detectors,
    train_arm,
)

Sources = Mapping[str, Mapping[str, Rows]]
"""Arm -> source -> its generated rows."""


def run(recipe: Recipe, redo: Sequence[str] = (), plans: bool = False) -> Path:
    """Run everything that is not done yet; returns the report's path.

    Several seeds become `seed-<n>/` run directories under one combined `metrics.json` and report; they share
    latents, thresholds and generated rows, and differ in mixture, training and trials.

    Args:
        recipe: the experiment's.
        redo: stages to do anew, such as `train` or `trials/tuned`; what depends on them follows.
        plans: print what is still to be done and what that will cost, and which stage of it is being done.
    """
    check(recipe, whole(recipe, redo))
    on_begin = _planned(recipe) if plans and not is_finished(recipe) else None
    with open_experiment(recipe, redo=redo, on_begin=on_begin) as experiment:
        shared = prepare(experiment)
        sources = {arm: generate_sources(experiment, arm, shared) for arm in recipe.trained_arms}
        parts = _parts(experiment)
        if recipe.workers > 1 and len(parts) > 1:
            at_once(_measure_seed, [(recipe, number, redo) for number in range(len(parts))], recipe.workers)
            parts = experiment.parts()
        else:
            for part in parts:
                measure_part(part, shared, sources)
        return write_reports(experiment, parts)


def _planned(recipe: Recipe) -> Callable[[str], None]:
    """Print the plan; returns what says which of its lines begins."""
    planner = Planner(recipe)
    print(planner.plan().text(), flush=True)
    return announcing(planner, say)


def prepare(experiment: Experiment, evaluates: bool = True) -> Shared:
    """What all arms and seeds share: the latents that steer, their thresholds, how often latents are active.

    Args:
        evaluates: whether trials will be run; rows that nobody steers need no thresholds.
    """
    recipe = experiment.recipe
    latents = choose_latents(experiment)
    steers = evaluates and any(name != "unsteered" for name in recipe.eval.conditions)
    steers = steers or any(sources_steer(recipe.for_arm(arm).data) for arm in recipe.trained_arms)
    calibrated = calibrate_base(experiment, latents) if steers else NOT_CALIBRATED
    if steers:
        check_steerable(recipe, calibrated)
    frequency = latent_frequency(experiment) if evaluates and needs_frequency(recipe) else None
    detectors = None
    if evaluates and takes_detectors(recipe):
        detectors = find_detectors(experiment, latents, calibrated if steers else None).of("off_topic")
    known = known_detectors(experiment) if evaluates else None
    goals = towards_goals(experiment, latents) if evaluates and GOALS in recipe.eval.conditions else None
    return Shared(latents, calibrated, frequency, detectors, known, goals)


def measure_part(experiment: Experiment, shared: Shared, sources: Sources) -> None:
    """Measure every arm of one seed: the base model first, others once their weights are there."""
    measure(experiment, "base", BASE, shared)
    for arm in experiment.recipe.arms:
        measure(experiment, arm, arm_weights(experiment, arm, shared, sources), shared)


def arm_weights(experiment: Experiment, arm: str, shared: Shared, sources: Sources) -> Weights:
    """An arm's weights: given, another arm's, or trained (on) on rows that are mixed for it; merged if it says so."""
    section = experiment.recipe.arms[arm]
    if section.of == "base":
        weights: Weights | None = BASE
    elif section.of:
        weights = arm_weights(experiment, section.of, shared, sources)
    else:
        weights = given_weights(experiment, arm)
    if section.is_trained:
        live, moved = experiment.recipe.for_arm(arm).train.live, None
        if live and live.adaptive:
            assert section.of is not None
            assert weights is not None
            moved = ArmRun(experiment, section.of, weights, shared).moved_for_training()
        weights = train_arm(experiment, arm, mix_rows(experiment, arm, sources[arm], shared, moved), weights)
    assert weights is not None
    weights = scale_arm(experiment, arm, weights, section.scale)
    owner = arm if section.is_trained or section.scale != 1 else section.of or arm
    return merge_arm(experiment, owner, weights) if section.merged else weights


def _parts(run: Experiment) -> list[Experiment]:
    """One run for each seed; each keeps what all of them share in its own directory."""
    parts = run.parts()
    for part in parts:
        _keep_shared(run, part)
    return parts


def _keep_shared(run: Experiment, part: Experiment) -> None:
    """Keep what the seeds of a run share in a seed's own directory, too."""
    if part.directory == run.directory or not part.ranks.first:
        return
    for name in (LATENTS, THRESHOLDS, *FUNNELS.values(), *SHARED):
        if (run.directory / name).is_file():
            (part.directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.directory / name, part.directory / name)


def _measure_seed(recipe: Recipe, number: int, redo: Sequence[str]) -> None:
    """Measure one seed in a process of its own; what the seeds share is there already."""
    with open_resources(recipe, asks=False) as resources:
        experiment = Experiment(recipe, recipe.directory, resources, StageCache(recipe.directory))
        shared = prepare(experiment)
        sources = {arm: generate_sources(experiment, arm, shared) for arm in recipe.trained_arms}
        part = experiment.parts()[number]
        part.cache.redo = tuple(redo)
        measure_part(part, shared, sources)


def generate(recipe: Recipe, arms: Sequence[str], ranks: Ranks = ALONE) -> list[Path]:
    """Make the training files of some arms, for every seed; returns them.

    Args:
        recipe: the experiment's.
        arms: trained arms of it.
        ranks: processes that make the rows together.
    """
    check(recipe, Scope(tuple(arms), evaluates=False, speaks=ranks.first))
    for arm in arms:
        if (live := recipe.for_arm(arm).train.live) and live.adaptive:
            what = "its rows are steered along directions that are optimised against a trained arm"
            raise InputError(what, f"arms.{arm}.train.live.adaptive", "Use `esr run`.")
    with open_experiment(recipe, ranks=ranks) as experiment:
        shared = prepare(experiment, evaluates=False)
        sources = {arm: generate_sources(experiment, arm, shared) for arm in arms}
        return [mix_rows(part, arm, sources[arm], shared).path for part in _parts(experiment) for arm in arms]


def evaluate(recipe: Recipe, arm: str | None = None, ranks: Ranks = ALONE, redo: Sequence[str] = ()) -> None:
    """Run the trials of one arm, or of all of them and write the report; says where they lie.

    Args:
        arm: base or one of the recipe's; None: all.
        ranks: processes that share the cells.
    """
    check(recipe, whole(recipe, redo, ranks.first))
    with open_experiment(recipe, ranks=ranks, redo=redo) as experiment:
        shared = prepare(experiment)
        wanted = ("base", *recipe.arms) if arm is None else (arm,)
        sources = {name: generate_sources(experiment, name, shared) for name in _trained_for(recipe, wanted)}
        parts = _parts(experiment)
        for part in parts:
            for name in wanted:
                path = _measured(part, name, shared, sources)
                experiment.say(str(path))
        if arm is None:
            write_reports(experiment, parts)  # a stage: every process takes part, the main one writes
            return
        for rank, lines in enumerate(ranks.gather(spent(experiment))):
            for line in lines:
                experiment.say(f"process {rank}: {line}" if ranks.count > 1 else line)


def report_again(recipe: Recipe, directory: Path | None = None, for_print: tuple[float, float] | None = None) -> Path:
    """Write metrics and report anew from the trials that are there; nothing else is looked at or run.

    Args:
        directory: where the run lies, if it was moved from where the recipe puts it.
        for_print: width (inches) and font (points) of figures to be written as PDF, SVG and PNG, too.
    """
    with open_experiment(recipe, directory, redo=("report",)) as experiment:
        page = write_reports(experiment, experiment.parts())
        if for_print:
            experiment.say(f"figures: {write_print_figures(experiment, experiment.parts(), *for_print)}")
        return page


def opened_arm(experiment: Experiment, arm: str) -> ArmRun:
    """One arm of a run, ready to be measured; what it needs (thresholds, an adapter) is made first."""
    recipe = experiment.recipe
    shared = prepare(experiment)
    sources = {name: generate_sources(experiment, name, shared) for name in _trained_for(recipe, (arm,))}
    part = _parts(experiment)[0]
    weights = BASE if arm == "base" else arm_weights(part, arm, shared, sources)
    return ArmRun(part, arm, weights, shared)


def calibrate(recipe: Recipe) -> Path:
    """Find the base model's thresholds; returns their file."""
    check(recipe, Scope((), evaluates=False))
    with open_experiment(recipe) as experiment:
        calibrate_base(experiment, choose_latents(experiment))
        return experiment.directory / THRESHOLDS


def _trained_for(recipe: Recipe, arms: Sequence[str]) -> list[str]:
    """The arms that must be trained before some arms can be measured."""
    needed = (each for arm in arms if arm != "base" for each in recipe.lineage(arm))
    return [arm for arm in dict.fromkeys(needed) if arm in recipe.trained_arms]


def _measured(experiment: Experiment, arm: str, shared: Shared, sources: Sources) -> Path:
    goes_on = any(each.condition.goes_on_from for each in measured_conditions(experiment.recipe.eval))
    if arm == "base" or goes_on:
        path = measure(experiment, "base", BASE, shared)
    if arm != "base":
        path = measure(experiment, arm, arm_weights(experiment, arm, shared, sources), shared)
    return path
