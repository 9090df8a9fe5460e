"""Ranks that are threads of one process: what several processes do together, without starting any."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from esr_train.ranks import Ranks

Result = TypeVar("Result")


class Threads(Ranks):
    """One of several threads that meet at a barrier."""

    def __init__(self, rank: int, count: int, board: list[object], barrier: threading.Barrier) -> None:
        super().__init__(rank, count)
        object.__setattr__(self, "_shared", (board, barrier))

    def gather(self, value: object) -> list[object]:
        board, barrier = self._shared
        board[self.rank] = value
        barrier.wait(30)
        found = list(board)
        barrier.wait(30)
        return found


def as_ranks(count: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """What `work` gives on each of `count` ranks, which run beside each other."""
    board, barrier = [None] * count, threading.Barrier(count)

    def one(rank: int) -> Result:
        return work(Threads(rank, count, board, barrier))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
