"""One arm's trials: every condition's cells, steering and beginnings, run into one resumable file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esr_train.errors import InputError
from esr_train.files import write_json
from esr_train.provenance import digest, folder_hashes, sha256
from esr_train.steering.directions import Direction
from esr_train.steering.engine import Scorer
from esr_train.steering.transformers_engine import TransformersEngine
from eval.arms import Arm, Variant
from eval.calibration import load_thresholds, save_thresholds
from eval.cells import Cell, make_cells, unsteered
from eval.conditions import Measured, Setting, measured_conditions
from eval.harness import open_tasks, run_tasks
from eval.judging.restart_likelihood import BEFORE, read_phrases, restart_reader
from eval.report.story import finished_line, progress_bar
from eval.retention import MOST_REPLIES, read_replies, reply_store
from eval.store import Trial, TrialStore
from eval.trials import Plan, Readings, Steerer, run_trials, trial_key
from recipes.experiment import Experiment, base_inputs, judge_inputs, read_inputs, write_recipe
from recipes.noticing.given_beginnings import read_beginnings
from recipes.noticing.monitors import cues_of, monitor_inputs, watched
from recipes.resources import located
from recipes.stages.goal_steering import read_obedience
from recipes.stages.stage_cache import Stage
from recipes.stages.steering_latents import Shared, search_thresholds, threshold_key
from recipes.stages.weights import Weights, arm_variant, matched
from recipes.using.attacks import Attacked, MovedDirections, adapted_directions, moved_directions

MODULES = ("eval.trials", "eval.conditions")
RETENTION = "retention"
"""Folder of what each arm was read of the base model's replies, and the name of these stages."""


def measure(experiment: Experiment, arm: str, weights: Weights, shared: Shared) -> Path:
    """Run every trial of an arm that is not there yet; returns the file of its trials.

    What decides all its trials is the stage `trials/<arm>`; each condition is a stage of its own under it, so that
    one which is added later leaves the others' trials as they are.
    """
    write_recipe(experiment)
    run = ArmRun(experiment, arm, weights, shared)
    plans: dict[str, Plan] = {}
    for measured in run.conditions():
        plans[measured.name] = run.plan(measured)
        run.measure(measured, plans[measured.name])
    run.read_base_replies()
    run.ask_tasks()
    if shared.found:
        read_beginnings(experiment, arm, run.arm, plans, shared.found, run.activating())
    path = run.path
    del run  # with the arm's weights: the base model is to read its replies
    read_obedience(experiment, arm)
    return path


class ArmRun:
    """An arm of an experiment with the weights that it has; its engine is loaded when the first trial needs it."""

    def __init__(self, experiment: Experiment, arm: str, weights: Weights, shared: Shared) -> None:
        self.experiment, self.name, self.weights, self.shared = experiment, arm, weights, shared
        self.variant: Variant = arm_variant(experiment, arm, shared)
        self.path = experiment.directory / "trials" / f"{arm}.jsonl"
        file = str(self.path.relative_to(experiment.directory))
        self._fingerprint = experiment.cache.do(
            Stage(f"trials/{arm}", self._inputs(), (file,), ()), lambda: TrialStore(self.path).touch()
        )
        self.store = TrialStore(self.path, writes=experiment.ranks.first)
        experiment.ranks.gather(len(self.store.keys()))  # every process has read the file before one writes to it
        self._arm: Arm | None = None

    def arm(self) -> Arm:
        """The arm with its engine, loaded."""
        if self._arm is None:
            resources = self.experiment.resources
            engine = watched(self.experiment, self.name, resources.engine(self.weights.adapter, self.weights.model))
            self._arm = Arm(engine, resources.judge(), resources.sampling(), self.name, self.variant)
        return self._arm

    def conditions(self) -> list[Measured]:
        """The conditions that the arm is measured in, in order."""
        recipe = self.experiment.recipe
        own = None if self.name == "base" else recipe.arms[self.name].conditions
        is_plain_base = self.weights.is_base and not self.variant.to_json()
        measured = measured_conditions(recipe.eval, own)
        return [each for each in measured if each.condition.for_plain_base or not is_plain_base]

    def cells(self) -> list[Cell]:
        """The cells that every arm runs: test latents on test prompts, none of them steered if nothing is to be."""
        recipe, resources = self.experiment.recipe, self.experiment.resources
        directions: Sequence[Direction] = [each.direction for each in self.shared.calibrated.steerable["test"]]
        return make_cells(
            resources.prompts().test,
            directions if self.shared.calibrated.thresholds else self.shared.latents.splits["test"],
            recipe.eval.trials,
            recipe.seed,
        )

    def plan(self, measured: Measured) -> Plan:
        """What the arm runs under a condition; its own thresholds are measured first where it is recalibrated."""
        section, cells = self.experiment.recipe.eval, self.cells()
        # The first cells are spread over latents and prompts as evenly as all of them.
        run = cells if measured.condition.runs_every_cell else cells[: section.control_trials]
        setting = Setting(
            arm=self.name,
            cells=run,
            steerer=self.shared.steerer(self.experiment.recipe.engine.positions),
            seed=self.experiment.recipe.seed,
            response=self._responses(),
            own_thresholds=self._own_thresholds,
            stand_ins=partial(self._stand_ins, cells),
            value=measured.value,
            adapted=partial(self._adapted, run),
            cues=partial(cues_of, self.experiment.recipe),
            prompts=self.experiment.resources.prompts().test,
            welcome=section.welcome,
            goals=self.shared.goals,
        )
        return measured.condition.plan(setting)

    def measure(self, measured: Measured, plan: Plan) -> None:
        """Run the trials of one condition that are not there yet."""
        experiment, ranks = self.experiment, self.experiment.ranks
        keys = {trial_key(self.name, measured.name, cell) for cell in plan.cells}
        stage = Stage(
            f"trials/{self.name}/{measured.name}",
            {"arm": self._fingerprint, "plan": _digest(plan), "phrases": self._phrases(measured)},
            (),
            MODULES,
            collective=True,
            discard=lambda: self.store.drop(lambda trial: trial.condition == measured.name),
            is_whole=lambda: keys <= self.store.keys(),
        )

        def work() -> None:
            if not ranks.first:
                self.store.reload()
            arm = self.arm()  # loaded before the bar that times it
            with progress_bar(len(plan.cells), f"{self.name}: {measured.name}", visible=ranks.first) as bar:
                trials = run_trials(
                    arm,
                    measured.name,
                    plan,
                    self.store,
                    readings=self._readings(measured, arm),
                    chunk_rows=experiment.recipe.engine.chunk(),
                    observer=bar,
                    ranks=ranks,
                )
            experiment.say(finished_line(self.name, measured.name, trials))

        experiment.cache.do(stage, work)

    def read_base_replies(self) -> None:
        """Read how likely the arm finds the base model's unsteered replies, once these are all there."""
        experiment = self.experiment
        if "unsteered" not in experiment.recipe.eval.conditions:
            return
        base = self.store if self.name == "base" else TrialStore(self.path.with_name("base.jsonl"))
        known = base.by_key()
        cells = unsteered(self.cells())[:MOST_REPLIES]
        trials = [known[key] for cell in cells if (key := trial_key("base", "unsteered", cell)) in known]
        if len(trials) < len(cells):
            return
        file = f"{RETENTION}/{self.name}.jsonl"

        def work() -> None:
            engine = self.arm().engine
            if isinstance(engine, Scorer):
                read_replies(engine, self.variant, trials, reply_store(experiment.directory / file))

        replies = digest([[trial.key, trial.response] for trial in trials])
        inputs = {"arm": self._weighing(), "replies": replies}
        experiment.cache.do(Stage(f"{RETENTION}/{self.name}", inputs, (file,), ("eval.retention",)), work)

    def ask_tasks(self) -> None:
        """Run the tasks of `eval.retention`; an arm with words, edits or a monitor has the weights of another one."""
        experiment, section = self.experiment, self.experiment.recipe.eval.retention
        monitored = monitor_inputs(experiment, self.name)
        if section is None or self.variant.to_json() or monitored:
            return
        include = located(section.include) if section.include else None
        open_tasks(section, include)
        file = f"{RETENTION}/{self.name}.tasks.json"

        def work() -> None:
            engine = self.arm().engine
            assert isinstance(engine, TransformersEngine)
            rows = experiment.recipe.engine.batch_rows
            found = run_tasks(engine.model, experiment.resources.tokenizer(), section, include, rows)
            write_json(experiment.directory / file, {name: asdict(each) for name, each in found.items()})
            experiment.say(f"{self.name}: " + ", ".join(f"{name} {each.value:.3g}" for name, each in found.items()))

        inputs = {
            "arm": self._weighing(),
            "tasks": section.model_dump(mode="json"),
            "files": folder_hashes(include) if include else {},
            "harness": version("lm_eval"),
        }
        experiment.cache.do(Stage(f"{RETENTION}/{self.name}/tasks", inputs, (file,), ("eval.harness",)), work)

    def _weighing(self) -> dict[str, Any]:
        """What decides how likely the arm finds a text that nobody steers."""
        base = base_inputs(self.experiment)
        return {"base": base, "weights": self.weights.fingerprint, "variant": self.variant.to_json(), **self._edits()}

    def activating(self) -> dict[str, Any]:
        """What decides what the arm's activations are."""
        return {"arm": self._inputs(), "read": read_inputs(self.experiment)}

    def _inputs(self) -> dict[str, Any]:
        """What decides all trials of the arm, whatever the condition."""
        return {
            "base": base_inputs(self.experiment),
            "judge": judge_inputs(self.experiment),
            "weights": self.weights.fingerprint,
            "variant": self.variant.to_json(),
            "calibration": self.shared.calibrated.fingerprint,
            **monitor_inputs(self.experiment, self.name),
            **self._edits(),
        }

    def _edits(self) -> dict[str, Any]:
        """What decides the SAE whose latents the arm changes, where that is not the one that steers."""
        arm = self.experiment.recipe.arms.get(self.name)
        return {"read": read_inputs(self.experiment)} if arm and arm.edit and arm.edit.takes_detectors else {}

    def _phrases(self, measured: Measured) -> list[Any] | None:
        phrases = self.experiment.recipe.eval.restart_phrases
        return [sha256(located(phrases)), BEFORE] if phrases and measured.condition.reads_restarts else None

    def _readings(self, measured: Measured, arm: Arm) -> Readings:
        tokenizer, path = self.experiment.resources.tokenizer(), self.experiment.recipe.eval.restart_phrases

        def count(text: str) -> int:
            return len(tokenizer.encode(text, add_special_tokens=False))

        if path is None or not measured.condition.reads_restarts:
            return Readings(count)
        if not isinstance(arm.engine, Scorer):
            raise InputError(
                f"the engine {arm.engine.name!r} does not give log-probabilities",
                "eval.restart_phrases",
                "Take engine.kind transformers, or leave the phrases out.",
            )
        return Readings(count, restart_reader(arm.engine, read_phrases(located(path))))

    def _responses(self) -> Callable[[str, str, Cell], Trial]:
        """Finds the finished trial of an arm (base, or this one) under a condition on a cell."""
        stores: dict[str, Mapping[str, Trial]] = {}

        def response(arm: str, condition: str, cell: Cell) -> Trial:
            if arm not in stores:
                base = self.experiment.directory / "trials" / f"{arm}.jsonl"
                store = self.store if arm == self.name else TrialStore(base)
                stores[arm] = {trial.key: trial for trial in store.rows()}
            return stores[arm][trial_key(arm, condition, cell)]

        return response

    def _stand_ins(self, cells: Sequence[Cell]) -> dict[int, Direction]:
        """Random latents of like frequency and norm in place of the cells'."""
        resources = self.experiment.resources
        wanted = sorted({cell.latent for cell in cells if cell.latent is not None})
        norm = self.shared.steerer("all").directions[wanted[0]].residual_norm
        others = matched(self.experiment, wanted, self.shared.latents, self.shared.frequency)
        sae, labels = resources.sae(), resources.labels()
        return {latent: sae.direction(other, norm, labels.get(other)) for latent, other in others.items()}

    def moved_for_training(self) -> MovedDirections:
        """Directions of the training latents, optimised against the arm."""
        attacked = Attacked(self.name, self._fingerprint, self.variant, self.arm, "train")
        steerer = self.shared.steerer(self.experiment.recipe.engine.positions, "train")
        return moved_directions(self.experiment, attacked, steerer, sorted(steerer.directions))

    def _adapted(self, cells: Sequence[Cell]) -> dict[int, Direction]:
        """Directions of the cells' latents, optimised against the arm."""
        latents = sorted({cell.latent for cell in cells if cell.latent is not None})
        attacked = Attacked(self.name, self._fingerprint, self.variant, self.arm)
        steerer = self.shared.steerer(self.experiment.recipe.engine.positions)
        return adapted_directions(self.experiment, attacked, steerer, latents)

    def _own_thresholds(self) -> dict[int, float]:
        """The arm's own thresholds of the test latents, measured first; those at a bound are left out."""
        experiment = self.experiment
        scores, file = f"calibration/{self.name}.jsonl", f"calibration/{self.name}.json"
        key = {
            **threshold_key(experiment.resources),
            "weights": self.weights.fingerprint,
            "variant": self.variant.to_json(),
            **monitor_inputs(self.experiment, self.name),
        }

        def work() -> None:
            latents = [latent.direction for latent in self.shared.calibrated.steerable["test"]]
            thresholds = search_thresholds(experiment, self.arm(), latents, experiment.directory / scores)
            save_thresholds(experiment.directory / file, key, thresholds)

        stage = Stage(
            f"calibrate/{self.name}", {"of": self._inputs(), "key": key}, (scores, file), ("eval.calibration",)
        )
        experiment.cache.do(stage, work)
        thresholds = load_thresholds(experiment.directory / file, key)
        at_bound = sum(threshold.bound is not None for threshold in thresholds)
        experiment.say(f"{self.name}: {len(thresholds)} latents recalibrated, {at_bound} left out at a bound")
        return {threshold.latent: threshold.norm for threshold in thresholds if threshold.bound is None}


def _digest(plan: Plan) -> str:
    """A hash of what a plan runs: cells, strengths, beginnings, and whether it steers."""
    steerer = plan.steerer
    latents = sorted({cell.latent for cell in plan.cells if cell.latent is not None})
    late = ["late"] if steerer.late else []  # nothing where it is not: trials of other conditions stay as they are
    return digest(
        [
            [cell.key for cell in plan.cells],
            [[latent, steerer.norms[latent], float(steerer.directions[latent].unit[0])] for latent in latents],
            [steerer.positions, steerer.off, dict(plan.prefixes), sorted(plan.copies), *late],
            *_parts(steerer, latents),
        ]
    )


def _parts(steerer: Steerer, latents: Sequence[int]) -> list[Any]:
    """What steers together in a latent's place, if anything does."""
    return [
        [latent, [[part.layer, float(part.unit[0])] for part in steerer.parts[latent]]]
        for latent in latents
        if latent in steerer.parts
    ]
