"""Several processes: those that were started together, and those that a run starts itself."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from esr_train.command import prepare
from esr_train.errors import InputError
from esr_train.ranks import Ranks, join
from esr_train.recipe import Recipe

LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
"""How the variables begin by which a launcher tells a process of the others."""


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


def alone(work: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a new process that knows nothing of those that were launched beside this one."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(LAUNCHED)}
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare) as pool:
            pool.submit(work, *arguments).result()
    finally:
        os.environ.update(kept)


def at_once(work: Callable[..., None], calls: Iterable[tuple[Any, ...]], workers: int) -> None:
    """Call a function with each of some arguments, so many at a time, each in a process with one thread.

    The first failure ends all.
    """
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _single_threaded) as pool:
        futures = [pool.submit(work, *arguments) for arguments in calls]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _single_threaded() -> None:
    prepare()
    import torch

    torch.set_num_threads(1)
