"""Experts that lie on several processes: which has which, and how tokens reach them and come back.

    by_pairs    a row for each expert of a token; what they say comes back, and is weighted and summed at home
    by_tokens   a row for each process that has any of a token's experts, which weighs and sums its own (DeepEP's way)

Both compute what one process would, forward and backward, by any backend. `by_pairs` adds up a token's experts in their
order, from the rows that one process would have multiplied together: with `grouped_mm` the result is bit-equal.
`by_tokens` sends fewer rows and adds up one partial sum per process.

R processes share E experts, C = E/R each. T tokens, K experts per token, D width, N rows sent, M received.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.kernels import Bank, run_experts
from manyhands.kernels.permute import Permutation, combine, gather, sort_pairs

Meanwhile = Callable[[], None]


def nothing() -> None:
    """There is nothing to do while rows travel."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a layer's experts lie: process r of `group` has `count` of them, from number r · `count` on."""

    group: dist.ProcessGroup
    count: int
    """C."""
    dispatch: Literal["by_pairs", "by_tokens"] = "by_pairs"

    @classmethod
    def even(
        cls, group: dist.ProcessGroup, num_experts: int, dispatch: Literal["by_pairs", "by_tokens"] = "by_pairs"
    ) -> "Placement":
        """As many experts on every process. Raises `ConfigError` if they cannot be shared out so."""
        if num_experts % group.size():
            raise ConfigError(
                f"parallel.ep = {group.size()} does not divide the {num_experts} experts: every process holds as many"
            )
        return cls(group, num_experts // group.size(), dispatch)

    @property
    def size(self) -> int:
        """R."""
        return self.group.size()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.size * self.count

    @property
    def first(self) -> int:
        """The number of the first expert of this process."""
        return self.group.rank() * self.count

    def run(
        self,
        name: str,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        kept_TK: Tensor,
        here: Bank,
        meanwhile: Meanwhile = nothing,
    ) -> Tensor:
        """`run_experts` with experts on all processes, `here` those of this one. Collective: all of them must call.

        Each brings tokens of its own, as many as it has; none at all is fine. `meanwhile` is called while they travel.
        """
        return DISPATCHES[self.dispatch](name, x_TD, ids_TK, weights_TK, kept_TK, here, self, meanwhile)


def by_pairs(
    name: str,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor,
    here: Bank,
    placement: Placement,
    meanwhile: Meanwhile = nothing,
) -> Tensor:
    """Every kept pair travels; rows of an expert arrive in the order of the processes, and of the tokens in each."""
    p = sort_pairs(ids_TK, kept_TK, placement.num_experts)
    counts_RC = _counts(p).view(placement.size, placement.count)
    theirs_RC = _swap(counts_RC, placement)
    send, receive = counts_RC.sum(1).tolist(), theirs_RC.sum(1).tolist()
    rows_MD = exchange(gather(x_TD, p), send, receive, placement.group, meanwhile)
    own_RC = torch.arange(placement.count, device=x_TD.device).expand_as(theirs_RC)
    ids_M1 = own_RC.flatten().repeat_interleave(theirs_RC.flatten())[:, None]
    ones_M1 = torch.ones_like(ids_M1, dtype=torch.float32)
    said_MD = run_experts(name, rows_MD, ids_M1, ones_M1, torch.ones_like(ids_M1, dtype=torch.bool), here)
    return combine(exchange(said_MD, receive, send, placement.group), weights_TK, p)


def by_tokens(
    name: str,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor,
    here: Bank,
    placement: Placement,
    meanwhile: Meanwhile = nothing,
) -> Tensor:
    """Every (token, process) pair travels once, with the token's K ids and weights; a sum of its experts returns."""
    R, C = placement.size, placement.count
    owner_TK = torch.where(kept_TK, ids_TK // C, R)
    spare_TR1 = torch.zeros(len(x_TD), R + 1, dtype=torch.bool, device=x_TD.device)
    to_TR = spare_TR1.scatter_(1, owner_TK, True)[:, :R]
    p = sort_pairs(torch.arange(R, device=x_TD.device).expand_as(to_TR), to_TR, R)
    send = _counts(p)
    theirs = _swap(send, placement)
    splits = send.tolist(), theirs.tolist()
    x_MD = exchange(gather(x_TD, p), *splits, placement.group, meanwhile)
    weights_MK = exchange(gather(weights_TK, p), *splits, placement.group)
    wanted_TK = torch.where(kept_TK, ids_TK, -1)
    ids_MK = exchange(wanted_TK.index_select(0, p.token_N), *splits, placement.group) - placement.first
    own_MK = (ids_MK >= 0) & (ids_MK < C)
    said_MD = run_experts(name, x_MD, ids_MK.clamp(0, C - 1), weights_MK, own_MK, here)
    ones_TR = torch.ones_like(to_TR, dtype=torch.float32)
    return combine(exchange(said_MD, *splits[::-1], placement.group), ones_TR, p)


DISPATCHES: dict[str, Callable[[str, Tensor, Tensor, Tensor, Tensor, Bank, Placement, Meanwhile], Tensor]] = {
    "by_pairs": by_pairs,
    "by_tokens": by_tokens,
}
"""Every `ParallelConfig.dispatch`."""


class _Trip:
    """One exchange, under way or over: on the way there, then of its gradient on the way back."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = None

    def depart(self, rows: Tensor, back: bool = False) -> None:
        """Send `rows` on their way."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        arriving, rows = rows.new_empty(sum(receive), *rows.shape[1:]), rows.contiguous()
        work = dist.all_to_all_single(arriving, rows, receive, send, group=self.group, async_op=True)
        assert work is not None
        self._under_way = work, arriving, rows  # which are read until they are there

    def wait(self) -> Tensor:
        """What has come from the others, once it is here."""
        assert self._under_way is not None
        work, arrived, _ = self._under_way
        work.wait()
        self._under_way = None
        return arrived


class _Depart(torch.autograd.Function):
    """Gives no more than a ticket, which only `_Arrive` takes: so that what is computed between the two is in autograd
    too, and its gradient while theirs travels."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.depart(rows)
        return rows.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip.depart(grad, back=True)
        return grad.new_zeros(()), None


def exchange(
    rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, meanwhile: Meanwhile = nothing
) -> Tensor:
    """[Σ send, …] -> [Σ receive, …]: the first `send[0]` rows go to process 0, and so on; its rows come first here.

    `meanwhile` is done while they travel. A gradient goes the same way back, while that of `meanwhile` is computed.
    """
    trip = _Trip(send, receive, group)
    ticket = _Depart.apply(rows, trip)  # type: ignore[no-untyped-call]
    meanwhile()
    arrived: Tensor = _Arrive.apply(ticket, trip)  # type: ignore[no-untyped-call]
    return arrived


def local(weights: Tensor) -> Tensor:
    """What lies here of a tensor that may be a DTensor. Carries gradient."""
    found: Tensor = weights.to_local() if hasattr(weights, "to_local") else weights
    return found


def _counts(p: Permutation) -> Tensor:
    """[E] int64: the rows of each."""
    ends = p.offsets_E.long()
    return ends.diff(prepend=ends.new_zeros(1))


def _swap(counts_R: Tensor, placement: Placement) -> Tensor:
    """Row r goes to process r; what comes back is what each has for this one."""
    theirs_R = torch.empty_like(counts_R)
    dist.all_to_all_single(theirs_R, counts_R.contiguous(), group=placement.group)
    return theirs_R
