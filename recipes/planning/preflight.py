"""What can be refused before anything is generated: all mistakes at once, in seconds, and no model is loaded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from data_gen.sources import read_cues, sources_steer, wanted_sources
from esr_train.errors import InputError, refuse
from esr_train.masking import label
from esr_train.models import load_config, model_source
from esr_train.recipe import ModelJudgeSection, ModelSection, Recipe, RetentionSection, judging_model
from esr_train.steering.direction_files import check_sizes, outline_sae
from esr_train.steering.monitor import load_monitor
from esr_train.template import encode_prompt
from esr_train.training.settings import wants_deepspeed
from esr_train.transcript import SaeRef, Span, SpanKind, Transcript
from eval.arms import prompt_text
from eval.cells import deal_subjects
from eval.conditions import CONDITIONS, GOALS
from eval.harness import open_tasks
from eval.judging.restart_likelihood import read_phrases
from eval.llm import InspectLlm, Ledger
from recipes.experiment import is_finished
from recipes.making.neuronpedia import where_labels_are
from recipes.planning.machine import GIB, check_processes, device_here, free_disk
from recipes.planning.sizes import disk_bytes, generating_bytes, model_size, training_bytes
from recipes.resources import Resources, located
from recipes.stages.steering_latents import first_of_each
from recipes.stages.weights import adapter_folder

KINDS = (
    "latents",
    "calibrate",
    "frequency",
    "detectors",
    "attack",
    "goals",
    "data",
    "train",
    "scale",
    "merge",
    "trials",
    "retention",
    "obedience",
    "report",
)
"""What names of stages begin with."""
ROW = 512
"""Tokens of a training row, for the estimate of memory before rows are there."""
ESTIMATES = ("memory", "disk")
"""What is looked at only if nothing else is wrong."""


@dataclass(frozen=True)
class Scope:
    """Which parts of a recipe are about to be used.

    Args:
        arms: that will be trained.
        generates: whether rows, thresholds or trials will be made: prompts, directions and judges are then needed.
        evaluates: whether trials will be run.
        redo: stages to be done anew.
        speaks: whether this process asks judge and writer a test question; of several one does.
    """

    arms: tuple[str, ...]
    generates: bool = True
    evaluates: bool = True
    redo: tuple[str, ...] = ()
    speaks: bool = True


Look = tuple[str, Callable[[], str | None]]
"""What is looked at, and what finds the mistake in it; it returns what else there is to say."""


def whole(recipe: Recipe, redo: Sequence[str] = (), speaks: bool = True) -> Scope:
    """Everything that a run of the recipe does."""
    return Scope(recipe.trained_arms, redo=tuple(redo), speaks=speaks)


def check(recipe: Recipe, scope: Scope | None = None) -> None:
    """Refuse a recipe whose files, names or settings cannot work, before a model is loaded.

    Args:
        scope: what is about to be used of it; None: all.

    Raises:
        InputError: naming every mistake at once.
    """
    refuse(found for _, found in looked(recipe, scope or whole(recipe)) if isinstance(found, InputError))


def looked(recipe: Recipe, scope: Scope) -> Iterator[tuple[str, InputError | str]]:
    """Each thing that was looked at, with the mistake in it or a word about it."""
    mistaken = False
    for name, test in _looks(recipe, scope):
        if mistaken and name in ESTIMATES:
            continue
        try:
            yield name, test() or ""
        except InputError as error:
            mistaken = True
            yield name, error


def _looks(recipe: Recipe, scope: Scope) -> Iterator[Look]:
    asks = scope.speaks and (bool(scope.redo) or not is_finished(recipe))
    resources = Resources(recipe, asks)
    yield "stages to redo", partial(_check_redo, recipe, scope.redo)
    yield "device", lambda: device_here(recipe).name
    yield "processes", check_processes
    yield "model", lambda: str(model_size(recipe))
    yield "tokenizer and chat template", partial(_check_prefix, resources)
    if recipe.engine.kind == "vllm":
        yield "vllm", _check_vllm
    for arm in scope.arms:
        if not wants_deepspeed():  # Its settings may be made once in a process: the trainer looks at them.
            yield f"training of {arm}", partial(_check_training, recipe.for_arm(arm))
        if scope.generates or recipe.for_arm(arm).train.data:
            yield f"rows of {arm}", partial(_check_rows, recipe.for_arm(arm), arm)
    if scope.evaluates:
        yield "restart phrases", partial(_check_phrases, recipe)
        if recipe.eval.retention:
            yield "tasks", partial(_check_tasks, recipe, recipe.eval.retention)
        if GOALS in recipe.eval.conditions:
            yield GOALS, partial(_check_goals, recipe)
        for arm in recipe.arms:
            yield f"arm {arm}", partial(_check_arm, recipe, arm)
            yield f"attack on {arm}", partial(_check_attack, recipe, arm)
    if scope.generates:
        yield from _looks_at_sources(resources, scope)
    if scope.generates or any(recipe.for_arm(arm).train.method == "grpo" for arm in scope.arms):
        yield from _looks_at_models_that_are_asked(resources, scope, asks)
    if not wants_deepspeed():  # It divides weights among devices.
        yield "memory", partial(_check_memory, recipe, scope.arms)
        yield "disk", partial(_check_disk, recipe)


def _looks_at_sources(resources: Resources, scope: Scope) -> Iterator[Look]:
    recipe = resources.recipe
    yield "prompts", partial(_check_prompts, resources, scope)
    if recipe.vectors:
        yield "vectors", partial(_check_vectors, resources)
    elif recipe.sae:
        yield "sae", partial(_check_sae, resources)
    if recipe.prompts and recipe.sae and not recipe.sae.labels and not recipe.vectors:
        yield "labels", partial(_check_labelled, recipe, scope)
    if recipe.vectors or (recipe.sae and recipe.sae.labels):
        yield "splits", partial(_check_splits, resources, scope)


def _looks_at_models_that_are_asked(resources: Resources, scope: Scope, asks: bool) -> Iterator[Look]:
    recipe = resources.recipe
    yield "judge", lambda: resources.judge().name
    yield "further judges", lambda: ", ".join(judge.name for judge in resources.further_judges())
    keyed = [("judge", recipe.judge), *((f"judges.{number}", each) for number, each in enumerate(recipe.judges))]
    for key, section in keyed:
        if model := judging_model(recipe, section):
            yield f"model of {key}", partial(_check_judging_model, model, f"{key}.model")
    if not asks:
        return
    named = [section.model for _, section in keyed if isinstance(section, ModelJudgeSection)]
    sections = [section for arm in scope.arms for section in wanted_sources(recipe.for_arm(arm).data).values()]
    named += [str(writer) for section in sections if (writer := getattr(section, "writer", None))]
    for name in dict.fromkeys(named):
        yield f"key and answer of {name}", partial(_check_language_model, recipe, name)


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


def _check_prefix(resources: Resources) -> str:
    """What training puts before a reply must be, token for token, what generation asks with."""
    tokenizer = resources.tokenizer()
    row = Transcript("test", "How do I fold a sheet?", (Span(SpanKind.ANSWER, "Start here."),), "normal")
    trained = label(tokenizer, row)
    asked, _ = encode_prompt(tokenizer, row.prompt)
    if list(trained.input_ids[: trained.reply_start]) != asked:
        raise InputError(
            f"replies are trained behind {tokenizer.decode(trained.input_ids[: trained.reply_start])!r} and generated "
            f"behind {tokenizer.decode(asked)!r}",
            resources.recipe.model.path,
            "Use a chat template that writes the same before a reply in both cases.",
        )
    return f"{len(asked)} tokens before a reply, the same in training and generation"


def _check_vllm() -> None:
    from esr_train.steering.vllm.vllm_server import require_vllm

    require_vllm()


def _check_training(recipe: Recipe) -> None:
    from esr_train.training.saving import repository
    from esr_train.training.settings import check_settings

    check_settings(recipe, recipe.directory / "adapter" / "checkpoints")
    repository(recipe)


def _check_rows(recipe: Recipe, arm: str) -> str:
    """The files that rows are made from."""
    if recipe.train.data:
        if not located(recipe.train.data).is_file():
            raise InputError("the training file does not exist", f"train.data={recipe.train.data}", "Check the path.")
        return recipe.train.data
    wanted = wanted_sources(recipe.data)
    if not wanted:
        raise InputError(f"the arm {arm!r} asks for no rows", "data", "Set rows under one of its sources.")
    if recipe.train.method == "dpo" and all(source.name == "prompted" for source in wanted):
        what = "no source that is asked for has replies to reject"
        raise InputError(what, "train.method=dpo", "Set rows of data.steered, normal or brevity.")
    if recipe.train.live and not sources_steer(recipe.data):
        what = "no source that is asked for steers, so there is nothing to inject"
        raise InputError(what, "train.live", "Remove it (train.live=null), or set data.steered.rows.")
    read_cues(recipe.data.cues)
    return ", ".join(f"{section.rows} {source.name}" for source, section in wanted.items())


def _check_memory(recipe: Recipe, arms: Sequence[str]) -> str:
    """Weights that do not fit are refused; what is only estimated is said."""
    size, device = model_size(recipe), device_here(recipe)
    shared = recipe.engine.tensor_parallel if recipe.engine.kind == "vllm" else 1
    weights = size.parameters * size.each / shared
    if weights > device.memory:
        raise InputError(
            f"the model's weights take {weights / GIB:,.0f} GiB, and {device.name} has {device.memory / GIB:,.0f} GiB",
            "model.path",
            "Take a larger device, model.dtype=bfloat16, or the vllm engine with engine.tensor_parallel.",
        )
    needs = {"generation": generating_bytes(recipe, size, 64) / shared}
    needs |= {f"training {arm}": training_bytes(recipe.for_arm(arm), size, ROW) for arm in arms}
    said = ", ".join(f"{name} about {needed / GIB:,.1f} GiB" for name, needed in needs.items())
    tight = "; TIGHT: smaller engine.batch_rows or batches may be needed" * (max(needs.values()) > device.memory)
    return f"{said} of {device.memory / GIB:,.0f} GiB{tight}"


def _check_disk(recipe: Recipe) -> str:
    free, needed = free_disk(recipe.directory), disk_bytes(recipe, model_size(recipe))
    said = f"about {needed / GIB:,.1f} GiB of {free / GIB:,.0f} GiB free"
    if needed > free:
        raise InputError(f"the run writes {said}", f"runs={recipe.runs}", "Make room, or put `runs` elsewhere.")
    return said


def _check_phrases(recipe: Recipe) -> None:
    if recipe.eval.restart_phrases:
        read_phrases(located(str(recipe.eval.restart_phrases)))


def _check_tasks(recipe: Recipe, section: RetentionSection) -> str:
    if recipe.engine.kind != "transformers":
        what = "tasks are asked of the model that transformers runs"
        raise InputError(what, "eval.retention", "Take engine.kind transformers, or leave it out.")
    open_tasks(section, located(section.include) if section.include else None)
    return ", ".join(section.tasks)


def _check_goals(recipe: Recipe) -> str:
    if recipe.engine.kind != "transformers":
        what = "how far replies obey a goal is read from their log-probabilities, which vLLM does not give here"
        raise InputError(what, "eval.conditions", f"Take engine.kind transformers, or leave `{GOALS}` out.")
    return ", ".join(recipe.eval.goals)


def _check_arm(recipe: Recipe, arm: str) -> str:
    section = recipe.arms[arm]
    prompt_text(section.prompt, f"arms.{arm}.prompt")
    if section.adapter:
        adapter_folder(section.adapter, f"arms.{arm}.adapter", recipe.model)
    if section.monitor:
        load_monitor(located(section.monitor.file))
        read_cues(recipe.data.cues)
    if section.model:
        model_source(recipe.model.model_copy(update={"path": section.model, "revision": None}))
    return "trained here" if section.is_trained else f"of {section.of or section.adapter or section.model}"


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


def _check_labelled(recipe: Recipe, scope: Scope) -> None:
    assert recipe.sae is not None
    steers = scope.evaluates and any(name != "unsteered" for name in recipe.eval.conditions)
    if steers or any(sources_steer(each.data) for each in _arms(recipe, scope)):
        what = "only labelled latents steer, and no labels are named"
        raise InputError(what, "sae.labels", where_labels_are(recipe.sae.release, recipe.sae.id))


def _check_prompts(resources: Resources, scope: Scope) -> str:
    recipe = resources.recipe
    if not recipe.prompts and not (scope.evaluates or any(not each.train.data for each in _arms(recipe, scope))):
        return ""
    pools = resources.prompts()
    if scope.evaluates and not pools.test:
        raise InputError("there is no prompt to evaluate on", "prompts.splits", "Hold out more topics.")
    return f"{len(pools.train)} train, {len(pools.validation)} validation, {len(pools.test)} test"


def _check_vectors(resources: Resources) -> str:
    recipe, vectors = resources.recipe, resources.vectors()
    config = load_config(recipe.model).get_text_config()
    check_sizes(vectors, config.hidden_size, config.num_hidden_layers)
    for name in recipe.eval.conditions:
        if name in CONDITIONS and CONDITIONS[name].needs_frequency:
            raise InputError(
                f"the condition {name!r} takes latents of an SAE that are like those that steer, and vectors steer",
                "eval.conditions",
                "Take `random_direction` in its place.",
            )
    count = len(vectors.vectors)
    return f"{count} vector{'s' * (count != 1)}, {vectors.d_model} wide, layer {vectors.layer}"


def _check_sae(resources: Resources) -> str:
    recipe, section = resources.recipe, resources.recipe.sae
    assert section is not None
    sae = outline_sae(SaeRef(section.release, section.id))
    if sae is None:
        return f"{section.release} / {section.id} is known; its configuration cannot be fetched now"
    config = load_config(recipe.model).get_text_config()
    check_sizes(sae, config.hidden_size, config.num_hidden_layers)
    labels = resources.labels() if section.labels else {}
    if unknown := [latent for latent in labels if not 0 <= latent < sae.n_latents]:
        what = f"latent {unknown[0]} has a label, and the SAE has {sae.n_latents} latents, counted from 0"
        raise InputError(what, f"sae.labels={section.labels}", "Take the labels of this SAE.")
    for name, arm in recipe.arms.items():
        for latent in [*arm.edit.ablate, *arm.edit.clamp] if arm.edit else []:
            if latent != "detectors" and latent >= sae.n_latents:
                what = f"there is no latent {latent}: the SAE has {sae.n_latents}, counted from 0"
                raise InputError(what, f"arms.{name}.edit")
    return f"{sae.n_latents} latents, {sae.d_model} wide, layer {sae.layer}, {len(labels)} labelled"


def _check_splits(resources: Resources, scope: Scope) -> str:
    """Directions to steer rows with, and others to measure with, as far as labels tell how they are dealt."""
    recipe, labels = resources.recipe, resources.labels()
    if recipe.vectors:  # A few vectors are all measured: see `steering_latents`, which refuses what cannot be dealt.
        return f"{len(labels)} vector{'s' * (len(labels) != 1)}"
    topics = resources.prompts().topics
    first, _ = first_of_each(labels, set(topics), recipe.latents.per_label)
    dealt = deal_subjects([labels[latent] for latent in first], topics, resources.prompt_section().splits)
    splits = [dealt[labels[latent]] for latent in first]
    wanted = {"test": "measure with"} if scope.evaluates else {}
    if any(sources_steer(each.data) for each in _arms(recipe, scope) if not each.train.data):
        wanted["train"] = "steer training rows with"
    for split, purpose in wanted.items():
        if split not in splits:
            what = f"none of {len(first)} labelled latents is left to {purpose}: they are dealt to splits by labels"
            raise InputError(what, "prompts.splits", "Label more latents, or change the shares or the seed.")
    return ", ".join(f"{splits.count(split)} {split}" for split in ("train", "validation", "test")) + " latents"


def _check_judging_model(model: ModelSection, key: str) -> None:
    try:
        load_config(model)
    except InputError as error:
        raise InputError(error.what, key, error.fix) from None


def _check_language_model(recipe: Recipe, model: str) -> str:
    """One test question; and refuse to go on where the limit in dollars is reached already."""
    ledger = Ledger(model, recipe.llm, folder=recipe.directory)
    spent = ledger.others()
    if ledger.is_exhausted(spent):
        raise InputError(
            f"the run has spent ${spent:.2f} of ${recipe.llm.limit_dollars:g}",
            "llm.limit_dollars",
            "Raise it to go on.",
        )
    InspectLlm(model, None).try_out()
    return "answers" + (f"; ${spent:.2f} of ${recipe.llm.limit_dollars:g} spent" if recipe.llm.limit_dollars else "")


def _arms(recipe: Recipe, scope: Scope) -> list[Recipe]:
    return [recipe.for_arm(arm) for arm in scope.arms]
