"""Several processes: those that were started together, and those that a run starts itself."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from esr_train.command import prepare
from esr_train.errors import InputError
from esr_train.ranks import Ranks, join
from esr_train.recipe import Recipe
from recipes.pipeline import Experiment, experiments

LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
"""How the variables begin by which a launcher tells a process of its fellows."""


def joined(recipe: Recipe) -> Ranks:
    """Meet the processes that `accelerate launch` started with this one, if any.

    Raises:
        InputError: if the recipe's engine cannot be that of several processes.
    """
    ranks = join()
    if ranks.count > 1 and recipe.engine.kind == "vllm":
        raise InputError(
            "vLLM spreads itself over accelerators and cannot be several processes' engine",
            "engine.kind",
            "Start one process with engine.tensor_parallel, or take the transformers engine.",
        )
    return ranks


def train_alone(experiment: Experiment, arm: str) -> None:
    """Train an arm as one process would, while the others wait: in a process that knows nothing of them."""
    top = experiment.shared or experiment
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(LAUNCHED)}
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(_train, top.recipe, top.directory, experiment.directory, arm).result()
    finally:
        os.environ.update(kept)


def _train(recipe: Recipe, directory: Path, part: Path, arm: str) -> None:
    prepare()
    _, parts = experiments(recipe, directory)
    next(each for each in parts if each.directory == part).train(arm)


def measure_in_processes(recipe: Recipe, parts: int) -> None:
    """Measure `recipe.workers` parts at a time, each in a process with one thread; the first failure ends all."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(recipe.workers, context, _single_threaded) as pool:
        futures = [pool.submit(_measure, recipe, number) for number in range(parts)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _measure(recipe: Recipe, number: int) -> None:
    experiments(recipe)[1][number].measure()


def _single_threaded() -> None:
    prepare()
    import torch

    torch.set_num_threads(1)
