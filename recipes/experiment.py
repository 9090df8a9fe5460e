"""One run of a recipe: its directory, its resources and what is done, and what decides each stage's result."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_gen.brevity
import data_gen.prompted
import data_gen.steered  # noqa: F401 - each registers what a recipe may name
import eval.conditions
import eval.judging.lexical
import eval.judging.likelihood
import eval.judging.model_judge  # noqa: F401
from esr_train.files import hold, replacing
from esr_train.provenance import digest, model_hashes, sae_hashes, sha256
from esr_train.ranks import ALONE, Ranks
from esr_train.recipe import JudgeSection, ModelSection, Recipe, SaeSection, dump_recipe, judging_model, load_recipe
from esr_train.template import DATE
from recipes import recipe_file
from recipes.resources import Resources, located, open_resources, required
from recipes.run_log import logged, say
from recipes.stages.stage_cache import FILE as STAGES
from recipes.stages.stage_cache import StageCache

NOT_HERE = {"device", "chat_template", "template_kwargs"}
"""Settings of the model that change no response, or are counted among its files."""
LOCK = ".lock"
"""In a run directory: held by the process that writes there."""


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, import the plug-ins that it names, and apply `key.sub=value` overrides.

    Args:
        path: of its file, or a shipped recipe's name, such as `tiny/quickstart`.
        overrides: such as `eval.trials=512`.

    Raises:
        InputError: naming every mistake at once, each with its key.
    """
    return load_recipe(recipe_file(path), list(overrides))


@dataclass(frozen=True)
class Experiment:
    """One run directory and what is done in it.

    Args:
        resources: model, SAE, judges and prompts; the parts of a run with several seeds share them.
        ranks: processes that work on it together.
    """

    recipe: Recipe
    directory: Path
    resources: Resources
    cache: StageCache
    ranks: Ranks = ALONE

    def parts(self) -> "list[Experiment]":
        """One run for each seed, in `seed-<n>/`; the run itself if the recipe names one seed."""
        if self.recipe.seeds is None:
            return [self]
        return [self._part(seed) for seed in self.recipe.seeds]

    def _part(self, seed: int) -> "Experiment":
        directory = self.directory / f"seed-{seed}"
        recipe = self.recipe.model_copy(update={"seed": seed, "seeds": None})
        cache = StageCache(directory, self.ranks, self.cache.redo, self.resources.tally, self.cache.on_begin)
        return Experiment(recipe, directory, self.resources, cache, self.ranks)

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.ranks.first:
            say(text)


@contextmanager
def open_experiment(
    recipe: Recipe,
    directory: Path | None = None,
    ranks: Ranks = ALONE,
    redo: Sequence[str] = (),
    on_begin: Callable[[str], None] | None = None,
) -> Iterator[Experiment]:
    """A recipe's run, held so that no second process can write into it; closed when the block ends.

    Args:
        directory: where the run lies, if it was moved from where the recipe puts it.
        ranks: processes that work on it together.
        on_begin: told the name of each stage that is about to be done.

    Raises:
        RunError: if another process works there.
    """
    directory = directory or recipe.directory
    ranks.by_first(lambda: hold(directory / LOCK))
    with (
        logged(directory) if ranks.first else nullcontext(),
        open_resources(recipe, asks=False) as resources,  # `preflight` has looked for the keys that are needed
    ):
        cache = StageCache(directory, ranks, redo, resources.tally, on_begin)
        yield Experiment(recipe, directory, resources, cache, ranks)


def write_recipe(experiment: Experiment) -> None:
    """Write the resolved recipe beside its results."""
    path, text = experiment.directory / "recipe.yaml", dump_recipe(experiment.recipe)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with replacing(path) as file:
            file.write(text)


def is_finished(recipe: Recipe) -> bool:
    """Whether the run directory says that this very recipe was run to its report: nobody is asked anything then."""
    written, records = recipe.directory / "recipe.yaml", StageCache(recipe.directory).records()
    if "report" not in records or not written.is_file() or written.read_text(encoding="utf-8") != dump_recipe(recipe):
        return False
    return all(StageCache(file.parent).is_whole() for file in recipe.directory.rglob(STAGES))


def base_inputs(experiment: Experiment) -> dict[str, Any]:
    """What decides the base model's responses: model, engine, sampling, prompts and how they are dealt."""
    recipe, resources = experiment.recipe, experiment.resources
    return {
        "model": {"settings": recipe.model.model_dump(exclude=NOT_HERE), "files": hashed(resources, recipe.model)},
        "engine": recipe.engine.model_dump(include={"kind", "positions"}),
        "sampling": recipe.sampling.model_dump(),
        "template date": DATE.isoformat(),
        "prompts": resources.once("prompts digest", lambda: _prompts_digest(resources)),
        "plugins": {path: sha256(located(path)) for path in recipe.plugins},
    }


def hashed(resources: Resources, section: ModelSection) -> dict[str, str]:
    """Hashes of a model's files, computed once."""
    return resources.once(f"hashes of {section.path} {section.revision}", lambda: model_hashes(section))


def _prompts_digest(resources: Resources) -> str:
    pools = resources.prompts()
    names = ("train", "validation", "test", "normal")
    return digest([[name, [[prompt.text, prompt.topic] for prompt in getattr(pools, name)]] for name in names])


def sae_inputs(experiment: Experiment) -> dict[str, Any]:
    """What decides an SAE's directions: its config and parameters, and what its latents are said to stand for."""
    section = experiment.recipe.sae
    if section is None:
        return {}
    labels = experiment.resources.labels() if section.labels else {}
    return {
        "sae": [section.release, section.id],
        "files": _sae_hashes(experiment, section),
        "labels": digest({str(latent): label for latent, label in labels.items()}),
    }


def read_inputs(experiment: Experiment) -> dict[str, Any]:
    """What decides what is read: the SAE's files and what its latents are said to stand for."""
    section = required(experiment.recipe.read.sae or experiment.recipe.sae, "sae")
    return {
        "sae": [section.release, section.id],
        "files": _sae_hashes(experiment, section),
        "labels": digest({str(latent): label for latent, label in experiment.resources.read_labels().items()}),
    }


def _sae_hashes(experiment: Experiment, section: SaeSection) -> dict[str, str]:
    """Hashes of an SAE's files, computed once."""
    name = f"hashes of the SAE {section.release} {section.id}"
    return experiment.resources.once(name, lambda: sae_hashes(section.release, section.id))


def source_inputs(experiment: Experiment) -> dict[str, Any]:
    """What decides the directions: of vectors the layer and all that is in their file, of latents the SAE's inputs."""
    section, inputs = experiment.recipe.vectors, {"sae": sae_inputs(experiment)}
    if section is None:
        return inputs
    file = located(section.file)
    return {**inputs, "vectors": {"layer": experiment.resources.source().layer, "file": sha256(file)}}


def judge_inputs(experiment: Experiment) -> dict[str, Any]:
    """What decides the scores: the judge's name and settings, its vocabulary or its local model's files."""
    section: JudgeSection = experiment.recipe.judge
    values = section.model_dump(mode="json")
    found: dict[str, Any] = {"name": experiment.resources.judge().name, "settings": values}
    if values.get("vocabulary"):
        found["vocabulary"] = sha256(located(values["vocabulary"]))
    if model := judging_model(experiment.recipe, section):
        found["model"] = hashed(experiment.resources, model)
    return found
