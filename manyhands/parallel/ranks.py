"""The ranks that train one model together, as an argument: nothing below reads a global one.

Two rules make any number of them equal to one process: what is added up (gradients, losses, counts) is a sum over
ranks, and whoever decides (skip this update, stop, save) decides from numbers that every rank has alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """What a step asks of the others. Every rank makes the same calls in the same order; each returns when all did."""

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every rank's `value` (one shape and dtype), bit for bit the same on all."""

    def max(self, value: Tensor) -> Tensor:
        """The largest of every rank's `value`, element by element. No rank may bring a NaN."""


@dataclass(frozen=True, slots=True)
class Alone:
    """One process: every sum is its own."""

    rank: int = 0
    size: int = 1

    def sum(self, value: Tensor) -> Tensor:
        """`value` itself."""
        return value

    def max(self, value: Tensor) -> Tensor:
        """`value` itself."""
        return value


ALONE = Alone()


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
