"""The behavioural probe of a training: validation cells, steered at the base model's thresholds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esr_train.errors import InputError
from esr_train.recipe import Recipe
from esr_train.restarts import find_cues
from esr_train.steering.engine import Engine, Sampling
from eval.calibration import load_thresholds
from eval.cells import Cell, make_cells, unsteered
from eval.judging.judge import Judge, JudgeItem
from eval.trials import Steerer
from recipes.resources import Resources, required
from recipes.stages.steering_latents import THRESHOLDS, read_latents, steerable, threshold_key
from recipes.stages.training_reward import check_judge_fits

if TYPE_CHECKING:
    from esr_train.training.callbacks import Observation, Probe

MakeProbe = Callable[[Any, Any], "Probe"]
"""What the trainer is given: makes the probe from the model in training and its tokenizer."""
PROBED_AT_ONCE = 32
"""Rows, where the recipe gives no number: a training fills the memory that they could have."""


def calibrated_probe(recipe: Recipe, directory: Path) -> MakeProbe:
    """The probe that an arm's `train.probe` asks for, from a run's frozen thresholds, without loading a model.

    Every process of a launched training calls it, and before anything of DeepSpeed's is set up: ZeRO-3 changes how
    modules are made, which sae-lens does not survive.

    Args:
        recipe: as the arm sees it.

    Raises:
        InputError: if the run has not been calibrated, or a judge would have to be loaded beside sharded weights.
    """
    section = required(recipe.train.probe, "train.probe")
    check_judge_fits(recipe, "train.probe")
    if not (directory / THRESHOLDS).is_file():
        raise InputError(
            "train.probe steers at the base model's thresholds, which are not there",
            str(directory / THRESHOLDS),
            "Run `esr eval calibrate` with this recipe first, or set train.probe=null.",
        )
    resources = Resources(recipe)
    thresholds = load_thresholds(directory / THRESHOLDS, threshold_key(resources))
    latents = steerable(read_latents(directory, resources.source(), resources.labels()), thresholds)["validation"]
    directions = {latent.direction.latent: latent.direction for latent in latents}
    cells = make_cells(resources.prompts().validation, list(directions.values()), section.trials, recipe.seed)
    norms = {latent.direction.latent: latent.threshold for latent in latents}
    steerer = Steerer(directions, norms, recipe.engine.positions)
    return probing(resources.judge(), cells, steerer, resources.sampling(), recipe.engine.batch_rows or PROBED_AT_ONCE)


def probing(judge: Judge, cells: Sequence[Cell], steerer: Steerer, sampling: Sampling, batch_rows: int) -> MakeProbe:
    """A probe on these cells, steered and unsteered, for `esr_train.training.trainer.train`.

    Args:
        cells: steered ones, of the validation split: the test's must not be looked at while training.
        steerer: knows the cells' latents.
        sampling: as in the evaluation.
        batch_rows: responses generated at once.
    """

    def make(model: Any, tokenizer: Any) -> "Probe":
        from esr_train.steering.transformers_engine import TransformersEngine

        engine = TransformersEngine(model, tokenizer, batch_rows=batch_rows)
        return lambda step, logged: observe(engine, judge if logged else None, cells, steerer, sampling)

    return make


def observe(
    engine: Engine, judge: Judge | None, cells: Sequence[Cell], steerer: Steerer, sampling: Sampling
) -> "Observation":
    """Restart rates and mean last scores (without a judge: no scores), steered and not, and a response of each."""
    from esr_train.training.callbacks import Observation

    figures: dict[str, float] = {}
    samples = []
    for name, group in (("steered", cells), ("unsteered", unsteered(cells))):
        requests = [steerer.request(cell, str(number)) for number, cell in enumerate(group)]
        texts = [completion.text for completion in engine.generate(requests, sampling)]
        figures[f"restarts_{name}"] = sum(bool(find_cues(text)) for text in texts) / len(texts)
        scores = _last_scores(judge, group, texts) if judge else []
        # No figure at all is better than one that takes a silent judge for a score of 0.
        if scores:
            figures[f"last_score_{name}"] = sum(scores) / len(scores)
        samples.append({"condition": name, "prompt": group[0].prompt, "label": group[0].label, "response": texts[0]})
    return Observation(figures, tuple(samples))


def _last_scores(judge: Judge, cells: Sequence[Cell], texts: Sequence[str]) -> list[float]:
    items = [JudgeItem(cell.prompt, text, cell.label) for cell, text in zip(cells, texts, strict=True)]
    last = [found.attempts[-1].score for found in judge.judge(items) if found.attempts]
    return [score for score in last if score is not None]
