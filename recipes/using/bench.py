"""`esr bench`: a model of one's own, alone or with an adapter, on a recipe's prompts, directions and attacks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from esr_train.errors import InputError
from esr_train.files import write_json
from esr_train.models import load_config
from esr_train.provenance import hardware, versions
from esr_train.recipe import Recipe
from eval.report.story import tables
from eval.summary import Summary, read_summary
from recipes.experiment import read_recipe
from recipes.making.vectors import Wanted, make
from recipes.pipeline import run
from recipes.resources import located
from recipes.stages.results import METRICS
from recipes.stages.stage_cache import StageCache
from recipes.using.given_adapter import adapter_name

RESULT = "bench.json"
SCHEMA = 1
GIVEN = "given"
DEPTH = 0.57
"""Where vectors steer unless a layer is named: the share of the decoder layers up to the one whose output they move."""


@dataclass(frozen=True)
class Contender:
    """What is measured.

    Args:
        model: hub id, folder or fetched model's name; None: the recipe's, and the recipe's vectors.
        adapter: hub id or folder; None: the model alone.
        layer: whose output vectors steer that are made for the model; None: at `DEPTH`.
        monitor: file of a monitor that follows the replies and lets them begin again; None: there is none.
    """

    model: str | None = None
    adapter: str | None = None
    layer: int | None = None
    monitor: str | None = None


def bench(file: str, contender: Contender, overrides: Sequence[str] = ()) -> list[str]:
    """Measure a contender, write `bench.json` and the report; returns tables and where they lie.

    Args:
        file: the benchmark: a recipe, whose own arms are left out.
        contender: what is measured.
        overrides: of the recipe; what they change makes it another benchmark, and is kept in the result.

    Raises:
        InputError: whatever the run refuses.
    """
    recipe = bench_recipe(file, contender, overrides)
    if recipe.vectors and not located(recipe.vectors.file).exists():
        print("\n".join(make(recipe, Wanted(f"esr bench {file}"))), flush=True)
    report = run(recipe, plans=True)
    summary = read_summary(recipe.directory / METRICS)
    write_json(recipe.directory / RESULT, result(recipe, contender, file, overrides, summary))
    return [*tables(summary), "", f"results: {recipe.directory / RESULT}", f"report: {report}"]


def bench_recipe(file: str, contender: Contender, overrides: Sequence[str] = ()) -> Recipe:
    """The benchmark's recipe with the contender's model and adapter in place of its own arms.

    Raises:
        InputError: for a layer where no vectors are made.
    """
    words = [*overrides, *([f"model.path={contender.model}"] if contender.model else [])]
    given: dict[str, Any] = {"adapter": contender.adapter} if contender.adapter else {"of": "base"}
    given |= {"monitor": {"file": contender.monitor}} if contender.monitor else {}
    arms = {GIVEN: given} if contender.adapter or contender.monitor else {}
    recipe = read_recipe(file, [*words, f"arms={json.dumps(arms)}"])
    who = adapter_name(contender.adapter or recipe.model.path) + ("-monitored" if contender.monitor else "")
    recipe = recipe.model_copy(update={"name": f"{recipe.name}-{who}"})
    makes_vectors = recipe.vectors is not None and contender.model is not None
    if contender.layer is not None and not makes_vectors:
        what = "the layer is that of vectors made for another model, and none are made here"
        raise InputError(what, "--layer", "Leave it out, or name --model and a recipe with vectors.")
    if recipe.vectors and makes_vectors:
        middle = round(DEPTH * load_config(recipe.model).get_text_config().num_hidden_layers)
        layer = middle if contender.layer is None else contender.layer
        # Of the model and the layer alone, so that all adapters of a model share them.
        made = recipe.directory.parent / f"vectors-{adapter_name(recipe.model.path)}-{layer}.safetensors"
        update = {"file": str(made), "layer": layer}
        recipe = recipe.model_copy(update={"vectors": recipe.vectors.model_copy(update=update)})
    return recipe


def result(
    recipe: Recipe, contender: Contender, file: str, overrides: Sequence[str], summary: Summary
) -> Mapping[str, Any]:
    """What `bench.json` holds: who was measured on what, by which versions, what decided the trials, every metric."""
    records = StageCache(recipe.directory).records()
    return {
        "schema": SCHEMA,
        "benchmark": file,
        "overrides": list(overrides),
        "contender": asdict(contender) | {"model": recipe.model.path},
        "versions": versions(),
        "hardware": hardware(),
        "inputs": {
            stage.removeprefix("trials/"): record["inputs"]
            for stage, record in records.items()
            if stage in ("trials/base", f"trials/{GIVEN}")
        },
        "metrics": summary.to_json(),
    }
