"""What a reply is worth while training by GRPO: the recipe's judge says."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from esr_train.errors import InputError
from esr_train.recipe import Recipe, judging_model
from eval.judging.judge import Judge, JudgeItem, Judgement
from eval.metrics import OFF_TOPIC_BELOW
from recipes.resources import Resources

if TYPE_CHECKING:
    from esr_train.training.rollouts import Merit, Reward, Rollout


def recipe_reward(recipe: Recipe) -> "Reward | None":
    """The reward by the recipe's judge; None where the arm's method has no need of one.

    Args:
        recipe: as the arm sees it.

    Raises:
        InputError: if the judge cannot be opened, or would have to be loaded into each of several processes.
    """
    if recipe.train.method != "grpo":
        return None
    check_judge_fits(recipe, "train.method=grpo")
    return judged_reward(Resources(recipe).judge())


def check_judge_fits(recipe: Recipe, key: str) -> None:
    """Refuse a judge that would have to be loaded into one of several training processes.

    Raises:
        InputError: under the key that asks for a judge.
    """
    if judging_model(recipe, recipe.judge) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = "the judge cannot be loaded into one of several training processes"
        raise InputError(what, key, "Take judge.kind lexical or model, or train in one process.")


def judged_reward(judge: Judge) -> "Reward":
    """A reward by a judge; a reply that it cannot score is worth nothing that is known."""

    def reward(rollouts: "Sequence[Rollout]") -> "list[Merit | None]":
        items = [JudgeItem(each.prompt, each.reply, each.label) for each in rollouts]
        return [merit(*each) for each in zip(rollouts, judge.judge(items), strict=True)]

    return reward


def merit(rollout: "Rollout", judgement: Judgement) -> "Merit | None":
    """What a judged reply is worth, and what is taken off it; None if its first or last attempt has no score."""
    from esr_train.training.rollouts import Merit

    scores = [attempt.score for attempt in judgement.attempts]
    if judgement.error or not scores or scores[0] is None or scores[-1] is None:
        return None
    return Merit(
        score=scores[-1] / 100,
        needless_restart=float(not rollout.steered and len(scores) > 1),
        relapse=max(0.0, scores[0] - scores[-1]) / 100,
        length=float(not rollout.ended),
        unnoticed=float(rollout.steered and len(scores) == 1 and scores[0] < OFF_TOPIC_BELOW),
    )
