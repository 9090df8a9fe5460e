"""What can be refused before anything is generated: files, names, settings and keys, all mistakes at once."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from data_gen.sources import read_cues, sources_steer, wanted_sources
from esr_train.errors import InputError
from esr_train.models import choose_device, load_config, model_source
from esr_train.recipe import ModelSection, Recipe, judging_model
from esr_train.steering.direction_files import check_sizes
from esr_train.steering.monitor import load_monitor
from eval.arms import prompt_text
from eval.conditions import CONDITIONS
from eval.judging.restart_likelihood import read_phrases
from eval.llm import InspectLlm
from recipes.experiment import is_finished
from recipes.neuronpedia import where_labels_are
from recipes.resources import Resources, located
from recipes.weights import adapter_folder

KINDS = (
    "latents",
    "calibrate",
    "frequency",
    "detectors",
    "attack",
    "data",
    "train",
    "scale",
    "merge",
    "trials",
    "retention",
    "report",
)
"""What names of stages begin with."""


def check(recipe: Recipe, redo: Sequence[str] = ()) -> None:
    """Refuse a recipe whose files, names or settings cannot work, before a model is loaded.

    Raises:
        InputError: naming every mistake at once.
    """
    mistakes: list[InputError] = []
    for test in _tests(recipe, redo):
        try:
            test()
        except InputError as error:
            if str(error) not in {str(other) for other in mistakes}:
                mistakes.append(error)
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        listed = " ".join(f"({number}) {error}" for number, error in enumerate(mistakes, start=1))
        raise InputError(f"{len(mistakes)} mistakes: {listed.rstrip('.')}", None)


def _tests(recipe: Recipe, redo: Sequence[str]) -> Iterator[Callable[[], Any]]:
    """What is looked at, one thing each."""
    asks = bool(redo) or not is_finished(recipe)
    resources = Resources(recipe, asks)
    yield lambda: _check_redo(recipe, redo)
    yield lambda: choose_device(recipe.model)
    yield lambda: load_config(recipe.model)
    yield resources.tokenizer
    if recipe.engine.kind == "vllm":
        yield _check_vllm
    if recipe.prompts:
        yield resources.prompts
    if recipe.sae and recipe.sae.labels:
        yield resources.labels
    if recipe.prompts and recipe.sae and not recipe.sae.labels and not recipe.vectors:
        yield lambda: _check_labelled(recipe)
    if recipe.vectors:
        yield lambda: _check_vectors(resources)
    yield resources.judge
    yield resources.further_judges
    keyed = [("judge", recipe.judge), *((f"judges.{number}", each) for number, each in enumerate(recipe.judges))]
    for key, section in keyed:
        if model := judging_model(recipe, section):
            yield partial(_check_judging_model, model, f"{key}.model")
    if recipe.eval.restart_phrases:
        yield lambda: read_phrases(located(str(recipe.eval.restart_phrases)))
    for arm in recipe.arms:
        yield partial(_check_arm, recipe, arm)
        yield partial(_check_attack, recipe, arm)
    for arm in recipe.trained_arms:
        yield partial(_check_training, recipe.for_arm(arm), arm, asks)


def _check_redo(recipe: Recipe, redo: Sequence[str]) -> None:
    for name in redo:
        kind, _, rest = name.partition("/")
        owner = rest.partition("/")[0]
        if kind not in KINDS or (owner and owner not in ("base", "sources", *recipe.arms)):
            arms = ", ".join(f"train/{arm}" for arm in recipe.trained_arms[:1])
            raise InputError(
                f"there is no stage {name!r}",
                "--redo",
                f"Take one of {', '.join(KINDS)}, or of an arm, such as {arms}.",
            )


def _check_labelled(recipe: Recipe) -> None:
    assert recipe.sae is not None
    steers = any(name != "unsteered" for name in recipe.eval.conditions)
    if steers or any(sources_steer(recipe.for_arm(arm).data) for arm in recipe.trained_arms):
        what = "only labelled latents steer, and no labels are named"
        raise InputError(what, "sae.labels", where_labels_are(recipe.sae.release, recipe.sae.id))


def _check_vectors(resources: Resources) -> None:
    recipe = resources.recipe
    config = load_config(recipe.model).get_text_config()
    check_sizes(resources.vectors(), config.hidden_size, config.num_hidden_layers)
    for name in recipe.eval.conditions:
        if name in CONDITIONS and CONDITIONS[name].needs_frequency:
            raise InputError(
                f"the condition {name!r} takes latents of an SAE that are like those that steer, and vectors steer",
                "eval.conditions",
                "Take `random_direction` in its place.",
            )


def _check_judging_model(model: ModelSection, key: str) -> None:
    try:
        load_config(model)
    except InputError as error:
        raise InputError(error.what, key, error.fix) from None


def _check_vllm() -> None:
    from esr_train.steering.vllm.vllm_server import require_vllm

    require_vllm()


def _check_arm(recipe: Recipe, arm: str) -> None:
    section = recipe.arms[arm]
    prompt_text(section.prompt, f"arms.{arm}.prompt")
    if section.adapter:
        adapter_folder(section.adapter, f"arms.{arm}.adapter", recipe.model)
    if section.monitor:
        load_monitor(located(section.monitor.file))
        read_cues(recipe.data.cues)
    if section.model:
        model_source(recipe.model.model_copy(update={"path": section.model, "revision": None}))


def _check_attack(recipe: Recipe, arm: str) -> None:
    section = recipe.arms[arm]
    if "adaptive" not in (recipe.eval.conditions if section.conditions is None else section.conditions):
        return
    if recipe.engine.kind != "transformers":
        what = "the condition `adaptive` optimises directions through the model that transformers runs"
        raise InputError(what, "eval.conditions", "Take engine.kind transformers, or leave it out.")
    if section.edit:
        what = "directions are not optimised against an arm whose latents are edited"
        raise InputError(what, f"arms.{arm}", "Give it conditions without `adaptive`.")


def _check_training(recipe: Recipe, arm: str, asks: bool) -> None:
    """Settings of the trainer and the files that rows are made from."""
    from esr_train.training.saving import repository
    from esr_train.training.settings import check_settings

    check_settings(recipe, recipe.directory / "adapter" / arm / "checkpoints")
    repository(recipe)
    if recipe.train.data and not located(recipe.train.data).is_file():
        raise InputError("the training file does not exist", f"train.data={recipe.train.data}", "Check the path.")
    if not recipe.train.data:
        if not wanted_sources(recipe.data):
            raise InputError(f"the arm {arm!r} asks for no rows", "data", "Set rows under one of its sources.")
        if recipe.train.live and not sources_steer(recipe.data):
            what = "no source that is asked for steers, so there is nothing to inject"
            raise InputError(what, "train.live", "Remove it (train.live=null), or set data.steered.rows.")
        read_cues(recipe.data.cues)
        for section in wanted_sources(recipe.data).values():
            if asks and (writer := getattr(section, "writer", None)):
                InspectLlm(writer).check()
