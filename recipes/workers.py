"""Several seeds of one recipe at a time, each in a process of its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

from esr_train.command import prepare
from esr_train.recipe import Recipe
from recipes.pipeline import experiments


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
