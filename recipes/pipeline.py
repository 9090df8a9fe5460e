"""An experiment's stages, each resumable: calibrate -> data -> train -> trials."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_gen.collect import Meter, collect
from data_gen.mixture import mix
from data_gen.sources import Source as RowSource
from data_gen.sources import SteerableLatent
from esr_train.errors import InputError
from esr_train.files import hold, read_json, replacing, write_json
from esr_train.interchange import read_training_file
from esr_train.provenance import git_state, hardware, relevant, sha256, versions
from esr_train.ranks import ALONE, Ranks
from esr_train.recipe import DataSection, Recipe, SourceSection, dump_recipe
from esr_train.steering.directions import Direction
from esr_train.steering.engine import Engine
from esr_train.transcript import read_transcripts, write_transcripts
from eval.calibration import (
    Threshold,
    calibrate,
    load_thresholds,
    save_thresholds,
    score_store,
    work,
)
from eval.cells import SPLITS, Cell, Side, Split, make_cells
from eval.conditions import names
from eval.progress import progress_bar
from eval.store import Trial, read_trials
from eval.variants import PLAIN, Variant
from recipes.measure import ArmTrials
from recipes.resources import World
from recipes.sources import asked_for, check_held_out, chunk_rows, make_context, source_files, writer_of
from recipes.stage_cache import Stages, digest
from recipes.steering_latents import FILE as LATENTS
from recipes.steering_latents import choose_latents, gate_funnel, load_splits, save_chosen, steerable, threshold_key
from recipes.training_probe import probe
from recipes.weights import Weights, frequencies, weights

LOCK = ".lock"
"""In a run directory: held by the process that writes there."""
WIDER = 2.0
"""Upper bound of a recalibration, in multiples of the base model's: a tuned model may resist more."""


def begun(recipe: Recipe, ranks: Ranks = ALONE) -> tuple["Experiment", list["Experiment"]]:
    """The `experiments` of a recipe, with their directories made and held: no second run can write into them."""
    top, parts = experiments(recipe, ranks=ranks)
    ranks.by_first(lambda: hold(top.directory / LOCK))
    for experiment in (top, *(part for part in parts if part is not top)):
        experiment.begin()
    return top, parts


def experiments(
    recipe: Recipe, directory: Path | None = None, ranks: Ranks = ALONE
) -> tuple["Experiment", list["Experiment"]]:
    """The recipe's run directory, and its parts: one for each seed, or the run itself.

    Args:
        recipe: the experiment's.
        directory: where the run lies, if it was moved from where the recipe puts it.
        ranks: processes that make its rows together.
    """
    directory = directory or recipe.directory
    top = Experiment(recipe, directory, World(recipe), ranks=ranks)
    if recipe.seeds is None:
        return top, [top]
    alone = [recipe.model_copy(update={"seed": seed, "seeds": None}) for seed in recipe.seeds]
    return top, [Experiment(each, directory / f"seed-{each.seed}", top.world, top, ranks) for each in alone]


@dataclass
class Experiment:
    """One run directory and what is done in it.

    Args:
        recipe: the experiment's, with this run's seed.
        directory: of the run.
        world: model, SAE, judge and prompts, loaded when needed.
        shared: the run whose thresholds and generated rows this one uses, if not its own.
        ranks: processes that make its rows together.
    """

    recipe: Recipe
    directory: Path
    world: World
    shared: "Experiment | None" = None
    ranks: Ranks = ALONE

    @cached_property
    def stages(self) -> Stages:
        """What is done."""
        return Stages(self.directory, self.ranks)

    def begin(self) -> None:
        """Write the resolved recipe and where it runs."""
        self.ranks.by_first(self._write_facts)

    def _write_facts(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with replacing(self.directory / "recipe.yaml") as file:
            file.write(dump_recipe(self.recipe))
        facts = {"versions": versions(), "git": git_state(), "hardware": hardware(), "inputs": self.world.files}
        write_json(self.directory / "provenance.json", facts)

    def measure(self) -> None:
        """Run every arm's trials, after whatever they need: thresholds, rows, a training."""
        self.measure_arm("base")
        for arm in self.recipe.arms:
            self.measure_arm(arm)

    def measure_arm(self, arm: str) -> None:
        """Run an arm's trials, after whatever they need and is not there yet."""
        ArmTrials(self, arm, weights(self, arm)).run()

    def trained(self, arm: str) -> Weights:
        """The arm's adapter, trained first if it is not there yet."""
        adapter, fingerprint = self._train(arm, self.data(arm))
        return Weights(fingerprint, adapter)

    @cached_property
    def frequency(self) -> NDArray[np.float64]:
        """How often each latent of the SAE is active in the base model's own answers, [n_latents]."""
        if self.shared:
            return self.shared.frequency
        path = self.directory / "frequency.json"
        inputs = {"base": self._base_inputs(), "seed": self.recipe.seed}

        def make() -> None:
            write_json(path, frequencies(self.world, self.recipe.seed))

        self.stages.do("frequency", inputs, [path.name], make)
        return np.array(read_json(path))

    @property
    def spreads(self) -> dict[int, float]:
        """The standard deviation of each latent's posterior, in `norm` units."""
        return {each.latent: each.spread for each in self.calibrated[1]}

    @cached_property
    def split_latents(self) -> dict[Split, list[int]]:
        """The latents that were chosen to steer, by split; none where the recipe has no SAE, or no labels for it."""
        if self.shared:
            return self.shared.split_latents
        if self.recipe.sae is None or self.recipe.sae.labels is None:
            return {split: [] for split in SPLITS}
        inputs = {
            **self._base_inputs(),
            "latents": self.recipe.latents.model_dump(),
        }
        outputs = [LATENTS, "data/latents.funnel.json"]
        self.stages.do(
            "latents", inputs, outputs, lambda: save_chosen(self.directory, choose_latents(self.recipe, self.world))
        )
        return load_splits(self.directory)

    @property
    def chosen(self) -> list[int]:
        """The latents of every split, in the order of their labels."""
        found = {latent for latents in self.split_latents.values() for latent in latents}
        return [latent for latent in self.world.labels if latent in found]

    @cached_property
    def calibrated(self) -> tuple[str, list[Threshold]]:
        """The fingerprint of the calibration, and every latent's threshold on the base model."""
        key = threshold_key(self.recipe, self.world)
        if self.shared:
            fingerprint, thresholds = self.shared.calibrated
            self.ranks.by_first(lambda: save_thresholds(self.directory / "thresholds.json", key, thresholds))
            return fingerprint, thresholds
        path, funnel = self.directory / "thresholds.json", self.directory / "data" / "thresholds.funnel.json"
        inputs = {**self._base_inputs(), "calibration": self.recipe.calibration.model_dump(mode="json")}
        # Scores lie under what they depend on: with more latents, or others, those known already are not asked again.
        scores = self.directory / "calibration" / f"base-{digest(inputs)}.jsonl"

        def make() -> None:
            # Directions first: with vLLM running there may be no room for the model that their units are read off.
            directions = self.directions
            found = self.bisect("base", self.world.base, directions, scores)
            write_json(funnel, gate_funnel(found))
            save_thresholds(path, key, found)

        outputs = [path.name, "data/thresholds.funnel.json"]
        fingerprint = self.stages.do("calibrate", {**inputs, "latents": self.chosen}, outputs, make)
        thresholds = load_thresholds(path, key)
        bound = sum(each.bound is not None for each in thresholds)
        middle = sorted(each.norm for each in thresholds)[len(thresholds) // 2]
        self.ranks.by_first(
            lambda: print(
                f"calibrated {len(thresholds)} latents: median threshold {middle:.2f} residual norms; "
                f"{bound} left out at a bound",
                flush=True,
            )
        )
        return fingerprint, thresholds

    @cached_property
    def directions(self) -> list[Direction]:
        """The directions of all latents in play."""
        return [self.world.direction(latent) for latent in self.chosen]

    @cached_property
    def latents(self) -> dict[Split, list[SteerableLatent]]:
        """The steerable latents of each split; those whose threshold lies at a bound are left out."""
        return steerable(self.split_latents, self.directions, self.calibrated[1])

    @property
    def steers(self) -> bool:
        """Whether the evaluation steers at all, and so needs thresholds."""
        return any(condition != "unsteered" for condition in self.recipe.eval.conditions)

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells that every arm runs: test latents on test prompts, none of them steered if nothing is to be."""
        if self.steers:
            latents = [each.direction for each in self.latents["test"]]
        else:
            latents = [self.world.direction(latent) for latent in self.split_latents["test"]]
        return make_cells(self.world.pools.test, latents, self.recipe.eval.trials, self.recipe.seed)

    @cached_property
    def held_out(self) -> Side:
        """All that the evaluation may use: test prompts, and test latents with what they stand for."""
        latents = self.split_latents["test"]
        return Side(
            frozenset(prompt.text for prompt in self.world.pools.test),
            frozenset(latents),
            frozenset(label for latent in latents if (label := self.world.labels[latent])),
        )

    def bisect(
        self, label: str, engine: Engine, latents: Sequence[Direction], scores: Path, variant: Variant = PLAIN
    ) -> list[Threshold]:
        """Thresholds of latents on an engine; another one than the base's is searched up to higher strengths."""
        section = self.recipe.calibration
        if label != "base":
            low, high = section.bounds
            section = section.model_copy(update={"bounds": (low, WIDER * high)})
        pools = self.world.pools
        with progress_bar(work(len(latents), section), f"calibrate {label}") as progress:
            return calibrate(
                engine,
                self.world.judge,
                latents,
                pools.validation or pools.train,
                pools.train,
                section,
                self.world.sampling(),
                positions=self.recipe.engine.positions,
                variant=variant,
                seed=self.recipe.seed,
                store=score_store(scores),
                progress=progress,
            )

    def _base_inputs(self) -> dict[str, Any]:
        """What the base model's responses and their scores depend on."""
        recipe = self.recipe.model_dump(mode="json")
        keys = ("model", "sae", "prompts", "sampling")
        # The judge by its name, which knows what decides its scores; how fast it is asked does not.
        rest = {
            "judge": self.world.judge.name,
            "positions": recipe["engine"]["positions"],
            "files": self.world.base_files,
        }
        return {**{key: recipe[key] for key in keys}, **rest}

    def data(self, arm: str) -> str:
        """Mix the arm's training file from the sources it asks for, or check the one it names; returns its fingerprint.

        Raises:
            InputError: if it shares a prompt, a latent or an off-topic subject with the evaluation.
        """
        section, seed = self.recipe.for_arm(arm).data, self.recipe.seed
        train = self.recipe.for_arm(arm).train
        if train.data:
            check_held_out(read_training_file(train.data), self.held_out, train.data)
            return sha256(train.data)
        sources = (self.shared or self).sources(section)
        path = self.directory / "data" / f"{arm}.jsonl"

        def make() -> None:
            rows = [row for source, _ in sources.values() for row in read_transcripts(source)]
            if not rows:
                raise InputError(f"the arm {arm!r} asks for no rows", "data", "Set rows under one of its sources.")
            mixed = mix(rows, section.self_correction, seed)
            check_held_out(mixed, self.held_out)
            write_transcripts(path, mixed)

        inputs = {
            "sources": {name: fingerprint for name, (_, fingerprint) in sources.items()},
            "self_correction": section.self_correction,
            "seed": seed,
            "held_out": self.held_out.fingerprint,
        }
        return self.stages.do(f"data/{arm}", inputs, [f"data/{arm}.jsonl"], make)

    def sources(self, section: DataSection) -> dict[str, tuple[Path, str]]:
        """Generate the rows of every source that a `data` section asks for: name -> file and fingerprint."""
        result = {}
        for source, wanted in asked_for(section):
            inputs = {
                "section": wanted.model_dump(mode="json"),
                "scores": [section.min_answer_score, section.max_detour_score],
                "files": source_files(section, wanted),
                **self._source_inputs(source, wanted),
                "seed": self.recipe.seed,
                "name": source.name,
            }
            stem = f"data/sources/{source.name}-{digest(inputs)}"
            path = self.directory / f"{stem}.jsonl"
            outputs = [f"{stem}.jsonl", f"{stem}.candidates.jsonl", f"{stem}.funnel.json"]
            together = writer_of(wanted) is None
            ranks = self.ranks if together else ALONE
            make = partial(self._collect, source, wanted, section, ranks, path)
            fingerprint = self.stages.do(stem, inputs, outputs, make, together)
            result[source.name] = (path, fingerprint)
        return result

    def _source_inputs(self, source: RowSource, section: SourceSection) -> dict[str, Any]:
        if source.needs_latents:
            return {"calibration": self.calibrated[0]}
        writes = writer_of(section) is not None
        return {"base": self._base_inputs(), **({"held_out": self._held_out_labels()} if writes else {})}

    def _held_out_labels(self) -> list[str]:
        """What the chosen latents stand for that are not dealt to training."""
        latents = [latent for split, found in self.split_latents.items() if split != "train" for latent in found]
        return sorted({label for latent in latents if (label := self.world.labels[latent])})

    def _collect(self, source: RowSource, section: SourceSection, data: DataSection, ranks: Ranks, path: Path) -> None:
        latents = self.latents["train"] if source.needs_latents else []
        ledger, meter = path.with_suffix(".requests.json"), Meter()
        context = make_context(self.recipe, data, self.world, latents, self._held_out_labels(), ledger, meter)
        make = source.make(context, section)
        candidates = path.with_suffix(".candidates.jsonl")
        chunk = chunk_rows(self.recipe, section)
        found = collect(source.name, section.rows, make, candidates, chunk, ranks, meter)
        if self.ranks.first:
            # A writer is paid for the candidates behind the last wanted row, too: they stay in the books.
            unused = sum(found.surplus.values()) if writer_of(section) else 0
            funnel = found.funnel | ({"not needed": unused} if unused else {})
            write_json(path.with_suffix(".funnel.json"), funnel)
            write_transcripts(path, found.transcripts)

    def _train(self, arm: str, data: str) -> tuple[Path, str]:
        def make() -> None:
            print(f"train {arm}", flush=True)
            if self.ranks.count > 1:
                from recipes.workers import train_alone

                train_alone(self, arm)
            else:
                self.train(arm)

        inputs = {"data": data, "recipe": relevant(self.recipe.for_arm(arm))}
        fingerprint = self.stages.do(f"train/{arm}", inputs, [f"adapter/{arm}"], make)
        return self.directory / "adapter" / arm, fingerprint

    def train(self, arm: str) -> None:
        """Train an arm on its file in this process."""
        from esr_train.training.trainer import train

        section = self.recipe.for_arm(arm)
        made = probe(section, self.world, self.latents["validation"]) if section.train.probe else None
        self.world.stop()
        train(self.recipe, arm, self.directory, made)

    def trials(self) -> dict[str, list[Trial]]:
        """The finished trials of every arm in the recipe's conditions; each row's `seed` is this run's."""
        wanted, seed = names(self.recipe.eval), self.recipe.seed
        found = {arm: read_trials(self.directory / "trials" / f"{arm}.jsonl") for arm in ("base", *self.recipe.arms)}
        return {
            arm: [replace(row, seed=seed) for row in rows if row.condition in wanted] for arm, rows in found.items()
        }
