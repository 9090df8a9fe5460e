"""One arm's trials: every condition's cells, steering and beginnings, run into one resumable file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from esr_train.errors import InputError
from esr_train.provenance import sha256
from esr_train.recipe import NEEDS
from esr_train.steering.engine import Engine, Scorer
from eval.calibration import load_thresholds, save_thresholds
from eval.cells import Cell, unsteered
from eval.conditions import (
    Plan,
    boosted,
    boosts,
    names,
    opening,
    random_directions,
    through_restart,
    unlabelled,
    with_latents,
)
from eval.judging.restart_likelihood import BEFORE, read_phrases, restart_reader
from eval.progress import finished_line, progress_bar
from eval.store import Trial, TrialStore
from eval.summary import RECALIBRATED
from eval.trials import Readings, Steerer, run_trials, trial_key
from recipes.resources import located
from recipes.steering_latents import threshold_key
from recipes.weights import Weights, matched, needs_frequency, variant

if TYPE_CHECKING:
    from recipes.pipeline import Experiment

BASE_FILE = "trials/base.jsonl"
FULL = ("steered", "unsteered", RECALIBRATED)
"""Conditions that run every cell; the others run `eval.control_trials` of them."""
READ = ("steered", "unsteered")
"""Conditions in which the probability of a restart is read at sentence ends."""


@dataclass(frozen=True)
class ArmTrials:
    """An arm of an experiment, with the weights that it has."""

    experiment: "Experiment"
    arm: str
    weights: Weights

    def run(self) -> None:
        """Run every trial that is not there yet.

        What decides a trial's outcome is the stage's fingerprint; the list of conditions is not, so that a
        condition which is added later leaves the others' trials as they are.
        """
        experiment = self.experiment
        if needs_frequency(experiment.recipe):
            experiment.frequency  # noqa: B018 - read off the base model, before another one is loaded
        if self.arm != "base" and any(NEEDS.get(each) for each in experiment.recipe.eval.conditions):
            experiment.measure_arm("base")
        experiment.stages.do(f"trials/{self.arm}", self._inputs(), [self._file], lambda: self.store.touch())
        experiment.ranks.gather(len(self.store.keys()))  # every process has read the file before one writes to it
        for condition in self._conditions:
            if self.weights.is_base and not self.variant.to_json() and condition == RECALIBRATED:
                continue
            self._run(self.plan(condition))

    @property
    def _conditions(self) -> tuple[str, ...]:
        section = self.experiment.recipe.eval
        own = None if self.arm == "base" else self.experiment.recipe.arms[self.arm].conditions
        return names(section if own is None else section.model_copy(update={"conditions": own}))

    @property
    def _file(self) -> str:
        return f"trials/{self.arm}.jsonl"

    @cached_property
    def store(self) -> TrialStore:
        """The arm's trials on disk."""
        return TrialStore(self.experiment.directory / self._file, writes=self.experiment.ranks.first)

    @cached_property
    def engine(self) -> Engine:
        """Generates with the arm's weights; loaded when the first trial needs it."""
        return self.weights.engine(self.experiment.world)

    @cached_property
    def variant(self):  # type: ignore[no-untyped-def]
        """What the arm changes beside its weights."""
        return variant(self.experiment, self.arm)

    def _inputs(self) -> dict[str, Any]:
        experiment, section = self.experiment, self.experiment.recipe.eval
        phrases = section.restart_phrases
        return {
            "weights": self.weights.fingerprint,
            "variant": self.variant.to_json(),
            "calibration": experiment.calibrated[0] if experiment.steers else None,
            "sampling": experiment.recipe.sampling.model_dump(),
            "cells": [cell.key for cell in experiment.cells],
            "control_trials": section.control_trials,
            "prefix_sentences": section.prefix_sentences,
            "restart_phrases": [sha256(located(phrases)), BEFORE] if phrases else None,
        }

    def _run(self, plan: Plan) -> None:
        experiment = self.experiment
        keys = self.store.keys()
        missing = [cell for cell in plan.cells if trial_key(self.arm, plan.condition, cell) not in keys]
        if not missing:
            return
        ranks, engine = experiment.ranks, self.engine  # loaded before the bar that times it
        with progress_bar(len(plan.cells), f"{self.arm}: {plan.condition}", visible=ranks.first) as bar:
            found = run_trials(
                engine,
                experiment.world.judge,
                self.store,
                plan.cells,
                plan.steerer,
                experiment.world.sampling(),
                arm=self.arm,
                condition=plan.condition,
                variant=self.variant,
                prefixes=plan.prefixes,
                readings=self._readings(plan.condition),
                chunk_rows=experiment.recipe.engine.batch_rows,
                progress=bar,
                watch=bar.watch,
                ranks=ranks,
            )
        if ranks.first:
            print(finished_line(self.arm, plan.condition, found), flush=True)

    def _readings(self, condition: str) -> Readings:
        tokenizer, path = self.experiment.world.tokenizer, self.experiment.recipe.eval.restart_phrases

        def count(text: str) -> int:
            return len(tokenizer.encode(text, add_special_tokens=False))

        if path is None or condition not in READ:
            return Readings(count)
        if not isinstance(self.engine, Scorer):
            kind = self.experiment.recipe.engine.kind
            raise InputError(
                f"the engine {kind!r} does not give log-probabilities",
                "eval.restart_phrases",
                "Take engine.kind transformers, or leave the phrases out.",
            )
        return Readings(count, restart_reader(self.engine, read_phrases(located(path))))

    def plan(self, condition: str) -> Plan:
        """What the arm runs under a condition; its own thresholds are measured first where it is recalibrated."""
        experiment, steerer = self.experiment, self.steerer
        cells = experiment.cells if condition in FULL else self._control_cells
        sweep = boosts(experiment.recipe.eval.boost)
        if condition == "unsteered":
            return Plan(condition, tuple(unsteered(cells)), steerer)
        if condition == RECALIBRATED:
            norms = self._own_norms()
            return Plan(condition, tuple(each for each in cells if each.latent in norms), replace(steerer, norms=norms))
        if condition in sweep:
            found = boosted(cells, sweep[condition], steerer.norms, experiment.spreads)
            return Plan(condition, tuple(found), steerer)
        if condition == "random_direction":
            directions = random_directions(steerer.directions, experiment.recipe.seed)
            return Plan(condition, tuple(unlabelled(cells)), replace(steerer, directions=directions))
        if condition == "random_latents":
            return self._random_latents(cells)
        if condition in NEEDS:
            return self._going_on(condition, cells)
        return Plan(condition, tuple(cells), steerer)

    @property
    def steerer(self) -> Steerer:
        """Steers at the base model's thresholds."""
        latents = self.experiment.latents["test"] if self.experiment.steers else []
        return Steerer(
            {each.direction.latent: each.direction for each in latents},
            {each.direction.latent: each.threshold for each in latents},
            self.experiment.recipe.engine.positions,
        )

    @property
    def _control_cells(self) -> list[Cell]:
        # The first cells are spread over latents and prompts as evenly as all of them.
        return self.experiment.cells[: self.experiment.recipe.eval.control_trials]

    def _random_latents(self, cells: list[Cell]) -> Plan:
        experiment, steerer = self.experiment, self.steerer
        wanted = sorted({cell.latent for cell in cells if cell.latent is not None})
        reference = steerer.directions[wanted[0]]
        sae, labels = experiment.world.sae, experiment.world.labels
        instead = {
            latent: sae.direction(other, reference.residual_norm, labels.get(other))
            for latent, other in matched(experiment, wanted).items()
        }
        directions = {each.latent: each for each in instead.values()}
        norms = {each.latent: steerer.norms[latent] for latent, each in instead.items()}
        steerer = replace(steerer, directions=directions, norms=norms)
        return Plan("random_latents", tuple(with_latents(cells, instead)), steerer)

    def _going_on(self, condition: str, cells: list[Cell]) -> Plan:
        """The cells, each from where the base's (or, switched off, the arm's own) response to it is cut."""
        if condition == "switched_off":
            return self._switched_off(cells)
        steered = condition == "unsteered_continues"
        base = _by_key(self.store if self.arm == "base" else TrialStore(self.experiment.directory / BASE_FILE))
        sources = cells if steered else unsteered(cells)
        count = self.experiment.recipe.eval.prefix_sentences
        prefixes = {
            cell.key: opening(base[trial_key("base", NEEDS[condition], source)].response, count)
            for cell, source in zip(cells, sources, strict=True)
        }
        return Plan(condition, tuple(cells), replace(self.steerer, off=steered), prefixes)

    def _switched_off(self, cells: list[Cell]) -> Plan:
        """Responses without a restart stand as they are: steering was never switched off."""
        own, condition = _by_key(self.store), "switched_off"
        prefixes: dict[str, str] = {}
        copies = []
        for cell in cells:
            source = own[trial_key(self.arm, "steered", cell)]
            begun = through_restart(source)
            if begun is not None:
                prefixes[cell.key] = begun
            elif (key := trial_key(self.arm, condition, cell)) not in own:
                copies.append(replace(source, key=key, condition=condition, restart_logprobs=()))
        self.store.add(copies)
        going_on = tuple(cell for cell in cells if cell.key in prefixes)
        return Plan(condition, going_on, replace(self.steerer, off=True), prefixes)

    def _own_norms(self) -> dict[int, float]:
        """The arm's own thresholds of the test latents, measured first; those at a bound are left out."""
        experiment = self.experiment
        path = experiment.directory / "calibration" / f"{self.arm}.json"
        key = {
            **threshold_key(experiment.recipe, experiment.world),
            "weights": self.weights.fingerprint,
            "variant": self.variant.to_json(),
        }
        scores = f"calibration/{self.arm}.jsonl"

        def make() -> None:
            latents = [each.direction for each in experiment.latents["test"]]
            found = experiment.bisect(self.arm, self.engine, latents, experiment.directory / scores, self.variant)
            save_thresholds(path, key, found)

        outputs = [scores, f"calibration/{self.arm}.json"]
        experiment.stages.do(f"calibrate/{self.arm}", {"of": self._inputs(), "key": key}, outputs, make)
        found = load_thresholds(path, key)
        bound = sum(each.bound is not None for each in found)
        if experiment.ranks.first:
            print(f"{self.arm}: {len(found)} latents recalibrated, {bound} left out at a bound", flush=True)
        return {each.latent: each.norm for each in found if each.bound is None}


def _by_key(store: TrialStore) -> Mapping[str, Trial]:
    return store.by_key()
