"""The ranks that train one model together, as an argument: nothing below reads a global one.

Two rules make any number of them equal to one process: what is added up (gradients, losses, counts) is a sum over
ranks, and whoever decides (skip this update, stop, save) decides from numbers that every rank has alike.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from manyhands.errors import EndedElsewhere, exit_code_of

T = TypeVar("T")


class Ranks(Protocol):
    """What a step asks of the others. Every rank makes the same calls in the same order; each returns when all did."""

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def local_size(self) -> int:
        """How many of them are on this machine."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every rank's `value` (one shape and dtype), bit for bit the same on all."""

    def max(self, value: Tensor) -> Tensor:
        """The largest of every rank's `value`, element by element. No rank may bring a NaN."""

    def tell(self, message: Any) -> Any:
        """What rank 0 brings, on every rank: anything JSON can say. The others' `message` is not looked at."""

    def first_to_fail(self, exit_code: int) -> int | None:
        """Be the one that says why the job ends: None for the first that asks, for the others that one's exit code.

        Not collective: a process asks when it fails, whatever the others do.
        """


@dataclass(frozen=True, slots=True)
class Alone:
    """One process: every sum is its own."""

    rank: int = 0
    size: int = 1
    local_size: int = field(default=1, repr=False)

    def sum(self, value: Tensor) -> Tensor:
        """`value` itself."""
        return value

    def max(self, value: Tensor) -> Tensor:
        """`value` itself."""
        return value

    def tell(self, message: Any) -> Any:
        """`message` itself."""
        return message

    def first_to_fail(self, exit_code: int) -> int | None:
        """It speaks."""
        return None


ALONE = Alone()


def first(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone does it, on every rank: anything JSON can say.

    What it raises there is raised there; the others end at once with the same exit code, by `EndedElsewhere`.
    """
    if ranks.size == 1:
        return work()
    if ranks.rank:
        said = ranks.tell(None)
        if "failed" in said:
            raise EndedElsewhere(said["failed"])
        heard: T = said["value"]
        return heard
    try:
        value = work()
    except BaseException as error:
        with suppress(Exception):  # those that are no longer there need not be told
            ranks.tell({"failed": exit_code_of(error)})
        raise
    ranks.tell({"value": value})
    return value


def after_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` returns, which rank 0 does before the others: they find done what need be done only once.

    What it raises on rank 0 ends all, as with `first`.
    """
    mine: list[T] = []
    first(ranks, lambda: mine.append(work()))
    return mine[0] if mine else work()


def gathered(ranks: Ranks, data: bytes) -> list[bytes]:
    """Every rank's `data`, in their order, on all of them."""
    [most] = map(int, largest_of([len(data)], ranks))
    lengths = torch.zeros(ranks.size, dtype=torch.int64)
    table = torch.zeros(ranks.size, most, dtype=torch.uint8)
    lengths[ranks.rank] = len(data)
    if data:
        table[ranks.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    lengths, table = ranks.sum(lengths), ranks.sum(table)
    return [row[:length].numpy().tobytes() for row, length in zip(table, lengths.tolist(), strict=True)]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad, ctx.ranks), None


def total(value: Tensor, ranks: Ranks) -> Tensor:
    """`ranks.sum`, with a gradient: what every rank makes of the sum, added up."""
    if ranks.size == 1:
        return value
    found: Tensor = _Total.apply(value, ranks)  # type: ignore[no-untyped-call]
    return found


def sum_of(numbers: list[float], ranks: Ranks) -> list[float]:
    """Each number summed over the ranks, in float64."""
    return _through(ranks.sum, numbers)


def largest_of(numbers: list[float], ranks: Ranks) -> list[float]:
    """Each number's largest value on any rank, in float64: what all of them may decide from."""
    return _through(ranks.max, numbers)


def _through(reduce: Callable[[Tensor], Tensor], numbers: list[float]) -> list[float]:
    found: list[float] = reduce(torch.tensor(numbers, dtype=torch.float64)).tolist()
    return found
