"""Ranks that are threads of this process, for tests: they meet at a barrier and sum in the order of their numbers."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class _Table:
    size: int
    barrier: threading.Barrier
    values: list[Tensor | None] = field(default_factory=list)
    said: Any = None
    claimed: list[int] = field(default_factory=list)


@dataclass
class ThreadRanks:
    """One of `size` ranks."""

    rank: int
    table: _Table

    @property
    def size(self) -> int:
        return self.table.size

    @property
    def local_size(self) -> int:
        return self.size

    def sum(self, value: Tensor) -> Tensor:
        return (
            torch.stack(self._gather(value)).sum(0).to(value.dtype)
        )  # small integers stay small, as between processes

    def max(self, value: Tensor) -> Tensor:
        return torch.stack(self._gather(value)).amax(0)

    def tell(self, message: Any) -> Any:
        if self.rank == 0:
            self.table.said = message
        self.table.barrier.wait()
        said = self.table.said
        self.table.barrier.wait()
        return said

    def first_to_fail(self, exit_code: int) -> int | None:
        self.table.claimed.append(exit_code)
        return None if len(self.table.claimed) == 1 else self.table.claimed[0]

    def _gather(self, value: Tensor) -> list[Tensor]:
        self.table.values[self.rank] = value.detach().clone()
        self.table.barrier.wait()
        found = [v for v in self.table.values if v is not None]
        assert len(found) == self.size and len({(v.shape, v.dtype) for v in found}) == 1, "ranks bring different things"
        self.table.barrier.wait()
        return found


def on_ranks(size: int, work: Callable[[ThreadRanks], T]) -> list[T]:
    """What `work` returned on each rank; if one fails, the others do not wait for it, and its error is raised."""
    table = _Table(size, threading.Barrier(size, timeout=30), [None] * size)

    def one(rank: int) -> T:
        try:
            return work(ThreadRanks(rank, table))
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        done = [pool.submit(one, rank) for rank in range(size)]
    failed = [error for each in done if (error := each.exception())]
    first = [error for error in failed if not isinstance(error, threading.BrokenBarrierError)]
    if failed:
        raise (first or failed)[0]
    return [each.result() for each in done]
