"""A recipe's cells for inspect_ai.

inspect eval recipes/inspect_task.py --model none -T recipe=recipes/tiny/quickstart.yaml -T arm=tuned
inspect eval recipes/inspect_task.py --model none -T recipe=runs/quickstart/recipe.yaml -T condition=unsteered
inspect view
"""

from contextlib import chdir

from inspect_ai import Task, task

from esr_train.errors import InputError
from esr_train.models import ROOT
from esr_train.recipe import NEEDS, Recipe, load_recipe
from eval.conditions import names
from eval.inspect_cells import cells_task
from recipes.measure import ArmTrials
from recipes.pipeline import begun
from recipes.weights import weights


@task
def steering(recipe: str, arm: str = "base", condition: str = "steered") -> Task:
    """One arm under one condition; what it needs (thresholds, an adapter) is made first if it is not there yet.

    Args:
        recipe: recipe file (YAML), absolute or from the repository on; of several seeds the first is taken.
        arm: base, or one of the recipe's arms.
        condition: one of the recipe's, but for those that go on from other responses.

    Raises:
        InputError: for an arm or a condition that the recipe has not.
    """
    # inspect runs a task in its file's folder: here, relative paths count from the repository.
    with chdir(ROOT):
        read = load_recipe(recipe)
        return _task(read.model_copy(update={"runs": str(ROOT / read.runs)}), arm, condition)


def _task(recipe: Recipe, arm: str, condition: str) -> Task:
    _, parts = begun(recipe)
    experiment = parts[0]
    for value, known, name in (
        (arm, ("base", *experiment.recipe.arms), "arm"),
        (condition, tuple(each for each in names(experiment.recipe.eval) if each not in NEEDS), "condition"),
    ):
        if value not in known:
            raise InputError(f"there is no {name} {value!r} here", name, f"Take one of {', '.join(known)}.")
    trials = ArmTrials(experiment, arm, weights(experiment, arm))
    # The plan may need the base model; the arm's own engine takes its place afterwards.
    plan, variant = trials.plan(condition), trials.variant
    return cells_task(
        plan,
        trials.engine,
        experiment.world.judge,
        experiment.world.sampling(),
        arm=arm,
        variant=variant,
        rows=experiment.recipe.engine.batch_rows,
    )
