"""A recipe's cells for inspect_ai.

inspect eval recipes/using/inspect_task.py --model none -T recipe=recipes/tiny/quickstart.yaml -T arm=tuned
inspect eval recipes/using/inspect_task.py --model none -T recipe=runs/quickstart/recipe.yaml -T condition=unsteered
inspect view
"""

from contextlib import chdir

from inspect_ai import Task, task

from esr_train.errors import InputError
from esr_train.models import ROOT
from eval.inspect_cells import cells_task
from recipes.experiment import open_experiment, read_recipe
from recipes.pipeline import opened_arm


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
        read = read_recipe(recipe)
        if arm not in ("base", *read.arms):
            raise InputError(f"there is no arm {arm!r} here", "arm", f"Take one of {', '.join(('base', *read.arms))}.")
        with open_experiment(read.model_copy(update={"runs": str(ROOT / read.runs)})) as experiment:
            run = opened_arm(experiment, arm)
            measured = {each.name: each for each in run.conditions() if each.condition.goes_on_from is None}
            if condition not in measured:
                names = ", ".join(measured)
                raise InputError(f"there is no condition {condition!r} here", "condition", f"Take one of {names}.")
            # The plan may need the base model; the arm's own engine takes its place afterwards.
            plan = run.plan(measured[condition])
            return cells_task(run.arm(), condition, plan, rows=read.engine.chunk())
