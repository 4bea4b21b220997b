"""Gradients of all ranks as one: their sum, their norm, and how they are cut to size.

A sharded parameter's gradient was summed by the backward pass, and every process has its rows of it; of any other each
rank has a gradient of its own, and after `sum_gradients` all have the same.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from manyhands.parallel.ranks import ALONE, Ranks, largest_of
from manyhands.parallel.shards import is_sharded, local


@torch.no_grad()
def sum_gradients(params: Iterable[Tensor], ranks: Ranks) -> None:
    """Replace every gradient by its sum over the ranks; what one rank had no use for counts as zero there.

    For parameters that each rank holds whole; the others are left alone. Afterwards all have the same gradients, and
    with them the same norm.
    """
    if ranks.size == 1:
        return
    trained = [p for p in params if p.requires_grad and not is_sharded(p)]
    used = largest_of([p.grad is not None for p in trained], ranks)
    for param, somewhere in zip(trained, used, strict=True):
        if somewhere:
            param.grad = ranks.sum(torch.zeros_like(param) if param.grad is None else param.grad)


@torch.no_grad()
def grad_norm(params: Iterable[Tensor], ranks: Ranks = ALONE) -> Tensor:
    """The joint L2 norm of all gradients, a scalar, the same on every rank; NaN or Inf if any gradient is.

    Every element counts once, wherever it lies: squares are summed in float64 where any is sharded.
    """
    gradients = [p.grad for p in params if p.grad is not None]
    shards = [local(gradient) for gradient in gradients if is_sharded(gradient)]
    if not shards:
        return torch.nn.utils.get_total_norm(gradients)
    squares = torch.stack([shard.double().square().sum() for shard in shards]).sum()
    squares = ranks.sum(squares)
    if plain := [gradient for gradient in gradients if not is_sharded(gradient)]:
        squares = squares + torch.nn.utils.get_total_norm(plain).double().square()
    return squares.sqrt().to(shards[0].dtype)


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale every gradient so that their joint norm, which is `norm`, becomes `max_norm`, unless it is less.

    torch's `clip_grads_with_norm_`, which does not know shards on several meshes.
    """
    params = list(params)
    gradients = [p.grad for p in params if p.grad is not None]
    if not any(map(is_sharded, gradients)):
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor.to(gradient.device))
