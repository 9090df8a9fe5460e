"""Monitors of a run: fitted on replies of its base model to training prompts, and put into arms."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_gen.sources import LABEL, SteerableLatent, read_cues
from esr_train.errors import InputError
from esr_train.files import write_json
from esr_train.provenance import digest, sha256
from esr_train.recipe import Recipe
from esr_train.steering.engine import Engine, Request, Scorer, decoded
from esr_train.steering.monitor import Monitor, load_monitor, save_monitor, smoothed
from esr_train.steering.monitored_engine import Monitorable, MonitoredEngine
from esr_train.steering.token_reading import Activations, Projections, Reply, States
from eval.calibration import read_thresholds
from eval.cells import Cell, derived_seed, make_cells, unsteered
from eval.monitoring import area, fit_probe, level
from eval.trials import Steerer
from recipes.experiment import Experiment, base_inputs, open_experiment, source_inputs
from recipes.noticing.latent_search import known_detectors
from recipes.resources import located
from recipes.stages.base_replies import kept_replies
from recipes.stages.steering_latents import (
    LATENTS,
    THRESHOLDS,
    calibrate_base,
    choose_latents,
    read_latents,
    steerable,
)

FOLDER = "monitor"
"""In a run directory."""
EPISODES = 256
"""Cells of training prompts and latents, each answered steered and unsteered, that detectors are fitted on."""
LEVEL_REPLIES = 400
"""Unsteered replies, at least, by which thresholds are set."""
TOKENS_OF_A_REPLY = 32
"""That a probe is fitted on, spread over it: neighbours say the same, and the states of all would fill the memory."""
PERPLEXITY = "perplexity"
"""The detector that others are compared with; it needs a pass of its own, so nothing acts on it."""
Reads = dict[str, Projections | Activations]
Values = dict[str, list[NDArray[np.float64]]]
"""Detector -> what it reads at each reply's tokens, [tokens] each."""


def monitor_inputs(experiment: Experiment, arm: str) -> dict[str, Any]:
    """What an arm's monitor adds to what decides its trials; nothing if it has none."""
    section = None if arm == "base" else experiment.recipe.arms[arm].monitor
    if section is None:
        return {}
    cues = cues_of(experiment.recipe) if section.action in ("restart", "unsteer") else ()
    return {"monitor": [section.action, sha256(located(section.file)), digest(list(cues))]}


def watched(experiment: Experiment, arm: str, engine: Engine) -> Engine:
    """An arm's engine with its monitor, if it has one."""
    section = None if arm == "base" else experiment.recipe.arms[arm].monitor
    if section is None:
        return engine
    monitor = load_monitor(located(section.file))
    return MonitoredEngine(monitorable(engine), monitor, section.action, cues_of(experiment.recipe))


def monitorable(engine: Engine) -> Monitorable:
    """An engine that reads, and scores texts.

    Raises:
        InputError: for one that does not.
    """
    if not isinstance(engine, Monitorable):
        raise InputError(f"the engine {engine.name!r} does not read hidden states", "engine.kind")
    return engine


def cues_of(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's cues; those that name a topic are left out, as a monitor does not know it."""
    registers = read_cues(recipe.data.cues).registers.values()
    return tuple(cue for register in registers for cue in register if LABEL not in cue)


@dataclass(frozen=True)
class Detector:
    """A detector as `monitor/fit.json` has it.

    Args:
        name: probe, the contrast of a set of latents, or perplexity.
        centre, scale, threshold: see `Monitor`.
        auc: per token, on the replies it was fitted on; the probe's, on directions that were left out in turn.
    """

    name: str
    centre: float
    scale: float
    threshold: float
    auc: float


@dataclass(frozen=True)
class Episode:
    """A reply of the base model: its request, token ids without the end of turn, the direction of its cell."""

    request: Request
    ids: tuple[int, ...]
    group: int | None


def fit(recipe: Recipe, directory: Path | None, layer: int | None, false_alarms: float) -> list[str]:
    """Fit detectors and write `monitor/<name>.json`; returns lines for a terminal.

    Args:
        recipe: of the run.
        directory: where it lies, if not where the recipe puts it.
        layer: whose output the probe reads; None: the one that is steered.
        false_alarms: share of unsteered replies in which a monitor may sound.

    Raises:
        InputError: for a run in which nothing steers training prompts, or a share that cannot be told.
    """
    with open_experiment(recipe, directory) as experiment:
        told, quiet = _episodes(experiment, _training_latents(experiment), false_alarms)
        engine = monitorable(experiment.resources.base())
        probe, auc = _fit_probe(engine, told, experiment.resources.source().layer if layer is None else layer)
        reads: Reads = {"probe": probe, **_latent_sums(experiment)}
        fitted = [
            replace(each, auc=auc) if each.name == "probe" else each
            for each in _levels(_read(engine, told, reads), _read(engine, quiet, reads), told, false_alarms)
        ]
        _write(experiment.directory / FOLDER, fitted, reads, false_alarms)
        return _said(experiment.directory / FOLDER, fitted, len(told), len(quiet))


def _training_latents(experiment: Experiment) -> Sequence[SteerableLatent]:
    """The training latents with their thresholds: those of the finished run as they are, or else found first.

    Raises:
        InputError: if there are none.
    """
    folder, resources = experiment.directory, experiment.resources
    if (folder / LATENTS).is_file() and (folder / THRESHOLDS).is_file():
        splits = read_latents(folder, resources.source(), resources.labels())
        found = steerable(splits, read_thresholds(folder / THRESHOLDS).thresholds)["train"]
    else:
        found = [*calibrate_base(experiment, choose_latents(experiment)).steerable["train"]]
    if not found:
        raise InputError("nothing is there to steer training prompts with, so nothing to fit on", "sae")
    return found


def _episodes(
    experiment: Experiment, train: Sequence[SteerableLatent], false_alarms: float
) -> tuple[list[Episode], list[Episode]]:
    """Replies to fit on, steered and not, and unsteered ones to set thresholds by, to validation prompts if any."""
    recipe, pools = experiment.recipe, experiment.resources.prompts()
    directions = {each.direction.latent: each.direction for each in train}
    norms = {each.direction.latent: each.threshold for each in train}
    steerer = Steerer(directions, norms, recipe.engine.positions)
    cells = make_cells(pools.train, list(directions.values()), EPISODES, derived_seed("monitor", recipe.seed))
    prompts = pools.validation or pools.train
    count = max(LEVEL_REPLIES, round(4 / false_alarms))
    quiet = [
        Cell(prompt.text, prompt.topic, None, None, 0.0, derived_seed("level", recipe.seed, number))
        for number in range(count)
        for prompt in [prompts[number % len(prompts)]]
    ]
    wanted = [(cell, pair.latent) for pair in cells for cell in (pair, *unsteered([pair]))]
    replies = _replies(experiment, steerer, [*(cell for cell, _ in wanted), *quiet])

    def episodes(pairs: Sequence[tuple[Cell, int | None]]) -> list[Episode]:
        made = [Episode(steerer.request(cell, cell.key), replies[cell.key], group) for cell, group in pairs]
        # Replies of like lengths are read together.
        return sorted((each for each in made if each.ids), key=lambda each: len(each.ids))

    return episodes(wanted), episodes([(cell, None) for cell in quiet])


def _replies(experiment: Experiment, steerer: Steerer, cells: Sequence[Cell]) -> Mapping[str, tuple[int, ...]]:
    """Cell -> the base model's reply; those that were made before an interruption are not made again."""
    norms = {str(latent): norm for latent, norm in steerer.norms.items()}
    inputs = [base_inputs(experiment), source_inputs(experiment), norms]
    path = experiment.directory / FOLDER / f"replies-{digest(inputs)[:16]}.jsonl"
    return kept_replies(experiment, path, {cell.key: steerer.request(cell, cell.key) for cell in cells})


def _fit_probe(engine: Monitorable, told: Sequence[Episode], layer: int) -> tuple[Projections, float]:
    """The probe, and its AUC on directions that were left out."""
    states, steered, groups = [], [], []
    read = engine.read([each.request for each in told], [each.ids for each in told], [States(layer)])
    for episode, (of_reply,) in zip(told, read, strict=True):
        some = of_reply[:: -(-len(of_reply) // TOKENS_OF_A_REPLY)].float().cpu().numpy()
        states.append(some)
        steered += [bool(episode.request.interventions)] * len(some)
        groups += [episode.group] * len(some)
    probe = fit_probe(np.concatenate(states), np.array(steered), groups)
    return Projections(layer, torch.tensor(probe.weights, dtype=torch.float32)[None]), probe.auc


def _latent_sums(experiment: Experiment) -> Reads:
    """The sums of the latents that `esr latents search` has found in this run, by contrast."""
    found = known_detectors(experiment)
    if found is None:
        return {}
    sae = experiment.resources.read_sae()
    return {each.contrast: Activations(sae, each.chosen) for each in found.sets if each.chosen}


def _read(engine: Monitorable, episodes: Sequence[Episode], reads: Reads) -> Values:
    """What each detector reads in each reply, and how surprising its tokens are to the model that nobody steers."""
    requests, replies = [each.request for each in episodes], [each.ids for each in episodes]
    texts = [decoded(engine.tokenizer, each.request, each.ids) for each in episodes]
    return {**sums(engine, requests, replies, reads), PERPLEXITY: surprises(engine, requests, texts)}


def sums(engine: Monitorable, requests: Sequence[Request], replies: Sequence[Reply], reads: Reads) -> Values:
    """What each detector reads in each reply."""
    values: Values = {name: [] for name in reads}
    for read in engine.read(requests, replies, list(reads.values())):
        for name, each in zip(reads, read, strict=True):
            values[name].append(each.sum(-1).double().cpu().numpy())
    return values


def surprises(scorer: Scorer, requests: Sequence[Request], texts: Sequence[str]) -> list[NDArray[np.float64]]:
    """How surprising (nats) each token of a text is to the model that nobody steers, [tokens] for each text."""
    plain = [replace(request, interventions=()) for request in requests]
    return [-np.array(found, np.float64) for found in scorer.log_probabilities(plain, texts)]


def _levels(told: Values, quiet: Values, episodes: Sequence[Episode], false_alarms: float) -> list[Detector]:
    """Every detector's centre, scale and threshold."""
    found = []
    for name, values in told.items():
        steered = [each for each, episode in zip(values, episodes, strict=True) if episode.request.interventions]
        plain = [each for each, episode in zip(values, episodes, strict=True) if not episode.request.interventions]
        centre, scale = float(np.concatenate(plain).mean()), max(float(np.concatenate(plain).std()), 1e-6)
        scores = [[smoothed((each - centre) / scale) for each in kind] for kind in (plain, steered, quiet[name])]
        threshold = level([float(each.max()) for each in scores[2]], false_alarms)
        auc = area(np.concatenate(scores[0]), np.concatenate(scores[1]))
        found.append(Detector(name, centre, scale, threshold, auc))
    return found


def _write(folder: Path, fitted: Sequence[Detector], reads: Reads, false_alarms: float) -> None:
    for each in fitted:
        if each.name in reads:
            monitor = Monitor(each.name, reads[each.name], each.centre, each.scale, each.threshold, false_alarms)
            save_monitor(monitor, folder / f"{each.name}.json")
    write_json(folder / "fit.json", {"false_alarms": false_alarms, "detectors": [asdict(each) for each in fitted]})


def _said(folder: Path, fitted: Sequence[Detector], told: int, quiet: int) -> list[str]:
    lines = [f"fitted on {told} replies, thresholds set by {quiet} unsteered ones"]
    lines += [f"  {each.name:12} AUC per token {each.auc:.3f}, threshold {each.threshold:.2f}" for each in fitted]
    if len(fitted) == 2:
        lines.append("  no sum of latents: `esr latents search` finds some (detectors/detectors.json)")
    return [*lines, f"{folder}: {', '.join(f'{each.name}.json' for each in fitted if each.name != PERPLEXITY)}"]
