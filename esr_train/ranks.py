"""Several processes: those that `accelerate launch` or torchrun started together, and those that a run starts."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from esr_train.command import prepare
from esr_train.errors import InputError, RunError
from esr_train.recipe import Recipe

LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
"""How the variables begin by which a launcher tells a process of the others."""
PATIENCE = timedelta(days=1)
"""How long a process waits for the others: one may calibrate for hours while they have nothing to do.

One that ends, for whatever reason, is noticed at once; this is for a machine that went away without a word.
"""


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows.

    Args:
        rank: its number, from 0; the first one alone writes files.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process.

        Raises:
            RunError: if another process has ended instead of bringing its value.
        """
        if self.count == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(found, value)
        except RuntimeError as error:
            raise RunError(
                f"process {self.rank} of {self.count} stops, because another one has ended; what went wrong there "
                "stands above or below. The same command goes on where it stopped."
            ) from error
        return found

    def by_first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on the first process, on every process; the others wait for it."""
        return self.gather(work() if self.first else None)[0]


ALONE = Ranks()


def join() -> Ranks:
    """Meet the other processes that were started with this one, if any; each then sees one accelerator of its own.

    Must come before the accelerator is first used. Messages go over the CPU, so any accelerator will do.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    local = int(os.environ.get("LOCAL_RANK", "0"))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named != "":
        devices = named.split(",") if named else [str(local)]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
    from torch import distributed

    distributed.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(distributed.get_rank(), count)


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
