"""Good steering: vectors towards styles and refusals, from what the base model does when it is asked in words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Literal

from esr_train.errors import InputError
from esr_train.provenance import digest
from esr_train.steering import vector_making
from esr_train.steering.directions import Direction, SteeringVector
from esr_train.steering.engine import Request, Scorer
from esr_train.steering.vector_files import open_vectors, save_vectors
from esr_train.template import reply_text
from esr_train.values import typed
from eval.arms import Arm
from eval.calibration import Threshold, load_thresholds, read_thresholds, save_thresholds
from eval.cells import Prompt, derived_seed
from eval.conditions import GOALS
from eval.obedience import OBEDIENCE, Scale, Written, instructed, read_replies, reading_store, scales
from eval.store import RowStore, TrialStore
from eval.trials import Steerer
from recipes.experiment import Experiment, base_inputs, judge_inputs
from recipes.stages.stage_cache import Stage
from recipes.stages.steering_latents import Latents, search_thresholds, threshold_key

PROMPTS = 32
"""Training prompts that a goal's vector is made from, and test prompts whose replies set the scale of obedience."""
REPLIES, READINGS = f"{GOALS}/replies.jsonl", f"{GOALS}/readings.jsonl"
VECTORS, THRESHOLDS, SCORES = f"{GOALS}/vectors.safetensors", f"{GOALS}/thresholds.json", f"{GOALS}/scores.jsonl"
SHARED = (REPLIES, READINGS, VECTORS, THRESHOLDS)
"""Files that the seeds of a run share."""


@dataclass(frozen=True)
class Reply:
    """What the base model wrote, not steered, when it was asked for a goal in words, or for none."""

    key: str
    goal: str | None
    split: Literal["train", "test"]
    prompt: str
    reply: str


def towards_goals(experiment: Experiment, latents: Latents) -> Steerer:
    """Steers towards the goals of the recipe at their thresholds on the base model, at the layer of its directions.

    Raises:
        InputError: if none is left, as instructions change nothing or thresholds lie at a bound.
    """
    (first, *_), recipe = latents.in_order(), experiment.recipe
    made = _make_vectors(experiment, first)
    thresholds = _calibrate(experiment, made, first)
    for goal, why in (lost := left_out(experiment)).items():
        experiment.say(f"goal {goal} is left out: {why}")
    norms = {each.latent: each.norm for each in thresholds if each.bound is None}
    if not norms:
        raise _none_left(lost)
    directions = {each.latent: each for each in _directions(experiment, first) if each.latent in norms}
    said = ", ".join(f"{directions[latent].label} {norm:.2f}" for latent, norm in norms.items())
    experiment.say(f"thresholds of goals in residual norms: {said}")
    return Steerer(directions, norms, recipe.engine.positions)


def left_out(experiment: Experiment) -> dict[str, str]:
    """The goals towards which nothing is steered, and why; none where no goal is measured."""
    if GOALS not in experiment.recipe.eval.conditions:
        return {}
    found, at_bound = read_scales(experiment), {}
    if (experiment.directory / THRESHOLDS).is_file():
        at_bound = {each.label: each for each in read_thresholds(experiment.directory / THRESHOLDS).thresholds}
    reasons = {goal: _reason(found.get(goal), at_bound.get(goal)) for goal in experiment.recipe.eval.goals}
    return {goal: reason for goal, reason in reasons.items() if reason}


def _reason(scale: Scale | None, threshold: Threshold | None) -> str | None:
    if scale is None or not scale.differs:
        return "asked for it in words, the base model replies as if nobody had asked"
    bound = threshold.bound if threshold else None
    return f"its threshold lies at the {bound} bound ({threshold.norm:.2f})" if threshold and bound else None


def _none_left(lost: Mapping[str, str]) -> InputError:
    what = "no goal is left to steer towards: " + "; ".join(f"{goal}: {why}" for goal, why in lost.items())
    return InputError(what, "eval.goals", "Word them otherwise, or widen calibration.bounds.")


def read_scales(experiment: Experiment) -> dict[str, Scale]:
    """Goal -> what its obedience is measured by."""
    return scales(reading_store(experiment.directory / READINGS, writes=False).rows())


def read_obedience(experiment: Experiment, arm: str) -> None:
    """Let the base model read what an arm wrote when it was steered towards goals."""
    if GOALS not in experiment.recipe.eval.conditions:
        return
    rows = TrialStore(experiment.directory / "trials" / f"{arm}.jsonl", writes=False).rows()
    trials = [row for row in rows if row.condition == GOALS]
    if not trials:
        return
    goals, file = experiment.recipe.eval.goals, f"{OBEDIENCE}/{arm}.jsonl"
    written = [Written(row.key, str(row.cell.label), row.cell.prompt, row.response) for row in trials]

    def work() -> None:
        read_replies(_base(experiment), goals, written, reading_store(experiment.directory / file))

    replies = digest([[each.key, each.goal, each.reply] for each in written])
    inputs = {"base": base_inputs(experiment), "goals": goals, "replies": replies}
    experiment.cache.do(Stage(f"{OBEDIENCE}/{arm}", inputs, (file,), ("eval.obedience",)), work)


def _base(experiment: Experiment) -> Scorer:
    base = experiment.resources.base()
    assert isinstance(base, Scorer)  # `preflight` has looked
    return base


def _make_vectors(experiment: Experiment, like: SteeringVector) -> str:
    """Replies, readings of those to test prompts, and vectors; the fingerprint of all of them."""
    recipe, pools = experiment.recipe, experiment.resources.prompts()
    prompts: dict[Literal["train", "test"], list[str]] = {
        "train": _drawn(pools.train, derived_seed(GOALS, recipe.seed, "train")),
        "test": _drawn(pools.test, derived_seed(GOALS, recipe.seed, "test")),
    }
    inputs = {
        "base": base_inputs(experiment),
        "goals": recipe.eval.goals,
        "prompts": prompts,
        "layer": like.layer,
        "residual norm": like.residual_norm,
    }

    def work() -> None:
        replies = _write_replies(experiment, prompts)
        _read_own(experiment, replies)
        kept = [goal for goal, scale in read_scales(experiment).items() if scale.differs]
        if not kept:
            raise _none_left(left_out(experiment))
        save_vectors(experiment.directory / VECTORS, _vectors(experiment, replies, kept, like))

    modules = ("recipes.stages.goal_steering", "eval.obedience", "esr_train.steering.vector_making")
    return experiment.cache.do(Stage(GOALS, inputs, (REPLIES, READINGS, VECTORS), modules), work)


def _drawn(pool: Sequence[Prompt], seed: int) -> list[str]:
    return [prompt.text for prompt in Random(seed).sample(pool, min(PROMPTS, len(pool)))]


def _write_replies(experiment: Experiment, prompts: Mapping[Literal["train", "test"], Sequence[str]]) -> list[Reply]:
    """The base model's replies with and without every instruction, goal by goal as far as they are not there."""
    goals, seed = experiment.recipe.eval.goals, experiment.recipe.seed
    store = RowStore(experiment.directory / REPLIES, lambda row: typed(Reply, row), asdict)
    for goal in (None, *goals):
        asked = [
            (f"{goal or 'plain'}/{split}/{number}", split, prompt)
            for split, texts in prompts.items()
            for number, prompt in enumerate(texts)
        ]
        known = store.keys()
        missing = [(key, split, prompt) for key, split, prompt in asked if key not in known]
        requests = [
            Request(key, instructed(prompt, goals[goal]) if goal else prompt, seed=derived_seed(GOALS, seed, key))
            for key, _, prompt in missing
        ]
        written = experiment.resources.base().generate(requests, experiment.resources.sampling()) if missing else []
        store.append(
            (key, Reply(key, goal, split, prompt, done.text))
            for (key, split, prompt), done in zip(missing, written, strict=True)
        )
    return store.rows()


def _read_own(experiment: Experiment, replies: Sequence[Reply]) -> None:
    """Read the replies to test prompts: each by its own goal's instruction, those without one by every goal's."""
    goals = experiment.recipe.eval.goals
    written = [
        Written(f"{goal}: {each.key}", goal, each.prompt, each.reply, asked=each.goal is not None)
        for each in replies
        if each.split == "test"
        for goal in ([each.goal] if each.goal else goals)
    ]
    read_replies(_base(experiment), goals, written, reading_store(experiment.directory / READINGS))


def _vectors(
    experiment: Experiment, replies: Sequence[Reply], goals: Sequence[str], like: SteeringVector
) -> list[SteeringVector]:
    tokenizer, instructions = experiment.resources.tokenizer(), experiment.recipe.eval.goals
    assert like.residual_norm is not None  # strengths of a recipe's directions are in this unit

    def said(goal: str | None) -> list[vector_making.Reply]:
        own = [each for each in replies if each.split == "train" and each.goal == goal]
        prompts = [instructed(each.prompt, instructions[goal]) if goal else each.prompt for each in own]
        return [
            vector_making.Reply(reply_text(tokenizer, prompt), each.reply)
            for prompt, each in zip(prompts, own, strict=True)
        ]

    return vector_making.vectors_of_instructions(
        experiment.resources.base_model(),
        tokenizer,
        {goal: said(goal) for goal in goals},
        said(None),
        like.layer,
        like.residual_norm,
        experiment.recipe.engine.chunk(),
    )


def _directions(experiment: Experiment, like: SteeringVector) -> list[Direction]:
    source = open_vectors(experiment.directory / VECTORS)
    return [source.direction(number, like.residual_norm) for number in range(len(source.vectors))]


def _calibrate(experiment: Experiment, vectors: str, like: SteeringVector) -> list[Threshold]:
    """The base model's thresholds along the goals' vectors."""
    resources, path = experiment.resources, experiment.directory / THRESHOLDS
    key = {**threshold_key(resources), "goals": vectors}

    def work() -> None:
        arm, directions = Arm(resources.base(), resources.judge(), resources.sampling()), _directions(experiment, like)
        save_thresholds(path, key, search_thresholds(experiment, arm, directions, experiment.directory / SCORES))

    inputs = {"key": key, "judge": judge_inputs(experiment), "seed": experiment.recipe.seed}
    modules = ("eval.calibration", "recipes.stages.steering_latents")
    experiment.cache.do(Stage(f"{GOALS}-calibrate", inputs, (THRESHOLDS, SCORES), modules), work)
    return load_thresholds(path, key)
