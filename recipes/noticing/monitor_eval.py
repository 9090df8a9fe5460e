"""How well a run's monitors do: on the trials of its arms, whose topics, prompts and latents nothing was fitted on."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from esr_train.errors import InputError
from esr_train.files import read_json, write_json
from esr_train.recipe import ModelJudgeSection, Recipe
from esr_train.restarts import attempts, sentences
from esr_train.steering.engine import Request, Sampling
from esr_train.steering.monitor import Monitor, load_monitor, smoothed
from esr_train.steering.monitored_engine import Follower, Monitorable
from eval.judging.judge import JudgeItem
from eval.metrics import OFF_TOPIC_BELOW
from eval.monitoring import Detection, Followed, detection
from eval.report.drawing import save_figures
from eval.report.monitor_figures import detection_table, roc_figure
from eval.statistics import cluster_of
from eval.store import Trial, read_trials
from eval.summary import STEERED
from recipes.experiment import Experiment, open_experiment
from recipes.noticing.monitors import FOLDER, PERPLEXITY, Detector, Reads, Values, monitorable, sums, surprises
from recipes.stages.steering_latents import LATENTS, read_latents
from recipes.stages.weights import adapter_folder

SENTENCES_OF = 128
"""Steered replies whose sentences the judge is asked about."""
TIMED = Sampling(temperature=0.0, max_new_tokens=32)
TIMED_ROWS = 32


@dataclass(frozen=True)
class Fitted:
    """A run's detectors: those that act, and the levels of all."""

    monitors: Mapping[str, Monitor]
    levels: Mapping[str, Detector]

    @property
    def reads(self) -> Reads:
        """What is read for those that act."""
        return {name: monitor.reads for name, monitor in self.monitors.items()}


def evaluate(recipe: Recipe, directory: Path | None) -> list[str]:
    """Measure the monitors of a run on its own trials; writes `monitor/eval.json` and `monitor/roc.svg`.

    Args:
        directory: where it lies, if not where the recipe puts it.

    Returns:
        Lines for a terminal.

    Raises:
        InputError: before `fit`, or before the run's trials are there.
    """
    with open_experiment(recipe, directory) as experiment:
        folder = experiment.directory / FOLDER
        fitted = read_fitted(folder)
        found: dict[str, list[Detection]] = {}
        for arm, adapter in arms_with_trials(experiment):
            engine = monitorable(experiment.resources.engine(adapter))
            replies = _followed(experiment, engine, arm, fitted)
            found[arm] = [detection(name, fitted.levels[name].threshold, each) for name, each in replies.items()]
        cost = dict(_milliseconds(experiment, fitted.monitors))
        rows = {arm: [asdict(each) for each in detections] for arm, detections in found.items()}
        write_json(folder / "eval.json", {"schema": 1, "arms": rows, "milliseconds_per_token": cost})
        save_figures(folder, [roc_figure(found)])
        return [*detection_table(found, cost), f"{folder}: eval.json, roc.csv, roc.svg"]


def read_fitted(folder: Path) -> Fitted:
    """The detectors that `fit` has written.

    Raises:
        InputError: if it has not.
    """
    if not (folder / "fit.json").is_file():
        raise InputError("no monitor was fitted for this run", str(folder), "Run `esr monitor fit RUN` first.")
    levels = [Detector(**row) for row in read_json(folder / "fit.json")["detectors"]]
    monitors = {each.name: load_monitor(folder / f"{each.name}.json") for each in levels if each.name != PERPLEXITY}
    return Fitted(monitors, {each.name: each for each in levels})


def arms_with_trials(experiment: Experiment) -> Iterator[tuple[str, Path | None]]:
    """The arms with weights of their own whose trials are there, and their adapters."""
    part = experiment.parts()[0]
    if not (part.directory / "trials" / "base.jsonl").is_file():
        raise InputError("the run has no trials", str(part.directory / "trials"), "Run `esr run` or `esr eval run`.")
    yield "base", None
    for arm, section in experiment.recipe.arms.items():
        if not (part.directory / "trials" / f"{arm}.jsonl").is_file():
            continue
        trained = part.directory / "adapter" / arm
        if section.is_trained and trained.is_dir():
            yield arm, trained
        elif section.adapter and not section.is_trained and not section.edit and section.scale == 1:
            yield arm, adapter_folder(section.adapter, f"arms.{arm}.adapter", experiment.recipe.model)


def _followed(experiment: Experiment, engine: Monitorable, arm: str, fitted: Fitted) -> dict[str, list[Followed]]:
    """Each detector's replies of an arm, steered and unsteered."""
    part = experiment.parts()[0]
    trials = [
        trial
        for trial in read_trials(part.directory / "trials" / f"{arm}.jsonl")
        if trial.condition in (STEERED, "unsteered") and trial.response.strip() and trial.attempts
    ]
    trials.sort(key=lambda trial: len(trial.response))
    requests = trial_requests(experiment, trials)
    texts = [trial.response for trial in trials]
    values: Values = sums(engine, requests, texts, fitted.reads)
    if arm == "base":
        values[PERPLEXITY] = surprises(engine, requests, texts)
    events = _events(experiment, engine, trials, judged=arm == "base")
    return {name: [*_scored(trials, each, fitted.levels[name], events)] for name, each in values.items()}


def trial_requests(experiment: Experiment, trials: Sequence[Trial]) -> list[Request]:
    """What the trials' responses are read behind: their prompts, under their own steering.

    Raises:
        InputError: for a trial steered along none of the run's latents: others were chosen, and the run stopped then.
    """
    resources = experiment.resources
    splits = read_latents(experiment.directory, resources.source(), resources.labels())
    directions = {direction.latent: direction for split in splits.values() for direction in split}
    positions, requests = experiment.recipe.engine.positions, []
    for trial in trials:
        cell, strength = trial.cell, trial.cell.strength
        plain = Request(trial.key, cell.prompt)
        if cell.latent is None or strength is None:
            requests.append(plain)
        elif cell.latent not in directions:
            what = f"a trial was steered by {cell.latent}, which is not among the latents that the run has now"
            raise InputError(what, str(experiment.directory / LATENTS), "Finish the run first: `esr run`.")
        else:
            add = directions[cell.latent].add(raw=strength.raw, positions=positions)
            requests.append(replace(plain, interventions=(add,)))
    return requests


def _scored(
    trials: Sequence[Trial], values: Sequence[np.ndarray], level: Detector, events: Sequence[Mapping[str, int]]
) -> Iterator[Followed]:
    for trial, each, happened in zip(trials, values, events, strict=True):
        last = trial.attempts[-1].score
        yield Followed(
            smoothed((each - level.centre) / level.scale),
            trial.condition == STEERED,
            cluster_of(trial),
            last is not None and last < OFF_TOPIC_BELOW,
            happened,
        )


def _events(experiment: Experiment, engine: Monitorable, trials: Sequence[Trial], judged: bool) -> list[dict[str, int]]:
    """At which token of each steered response it restarts, and where its first off-topic sentence ends."""

    def token(trial: Trial, character: int) -> int:
        return len(engine.tokenizer.encode(trial.response[:character], add_special_tokens=False))

    events: list[dict[str, int]] = [{} for _ in trials]
    steered = [number for number, trial in enumerate(trials) if trial.condition == STEERED]
    for number in steered:
        if len(found := attempts(trials[number].response)) > 1:
            events[number]["restart"] = token(trials[number], found[1][0])
    if judged:
        some = steered[:: -(-len(steered) // SENTENCES_OF) or 1]
        for number, (_, end) in off_topic_sentences(experiment, trials, some).items():
            events[number]["off-topic sentence"] = token(trials[number], end) - 1
    return events


def off_topic_sentences(
    experiment: Experiment, trials: Sequence[Trial], numbers: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Number -> the first sentence, in characters, that the judge, shown it alone, scores below 50.

    A judge of kind `model` is not asked: every sentence would be paid for.
    """
    if isinstance(experiment.recipe.judge, ModelJudgeSection):
        return {}
    asked = [(number, each) for number in numbers for each in sentences(trials[number].response)]
    items = [
        JudgeItem(trials[number].cell.prompt, trials[number].response[start:end], trials[number].cell.label)
        for number, (start, end) in asked
    ]
    found: dict[int, tuple[int, int]] = {}
    for (number, sentence), judgement in zip(asked, experiment.resources.judge().judge(items), strict=True):
        score = judgement.attempts[0].score if judgement.attempts else None
        if score is not None and score < OFF_TOPIC_BELOW:
            found.setdefault(number, sentence)
    return found


def _milliseconds(experiment: Experiment, monitors: Mapping[str, Monitor]) -> Iterator[tuple[str, float]]:
    """What a token costs without a monitor and with each, where the engine lets one follow it."""
    engine = experiment.resources.base()
    if not isinstance(engine, Follower):
        return
    prompts = experiment.resources.prompts().test
    requests = [Request(str(n), prompts[n % len(prompts)].text) for n in range(TIMED_ROWS)]
    engine.generate(requests, TIMED)  # what is made once, such as buffers, is not counted
    runs = {"none": lambda: engine.generate(requests, TIMED)}
    for name, monitor in monitors.items():
        runs[name] = lambda monitor=monitor: engine.generate_watched(requests, TIMED, monitor, False)  # type: ignore[misc]
    for name, run in runs.items():
        began = time.perf_counter()
        tokens = sum(len(each.token_ids) for each in run())
        yield name, 1000 * (time.perf_counter() - began) / max(tokens, 1)
