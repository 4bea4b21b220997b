"""Cross entropy of a linear head, in chunks: the logits [T, V] never exist at once, nor twice.

T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.kernels.moment import transformed
from manyhands.kernels.twice import gradients_through

CHUNK_VALUES = 1 << 22  # logits held at a time: 16 MB in float32


def _reference(states_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, mask_T: Tensor) -> Tensor:
    """The same in PyTorch's operators, the logits at once: for what cannot take the hand-written gradient."""
    dtype = states_TD.dtype
    logits = F.linear(states_TD, head_VD.to(dtype), None if bias_V is None else bias_V.to(dtype))
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    losses = F.cross_entropy(logits, targets_T, reduction="none")
    return torch.where(mask_T, losses, 0.0).sum() / mask_T.sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is formed with the loss, chunk by chunk, while the logits are still in cache."""

    @staticmethod
    def forward(
        ctx: Any, states_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, mask_T: Tensor
    ) -> Tensor:
        T, V = states_TD.shape[0], head_VD.shape[0]
        head = head_VD.to(states_TD.dtype)
        bias = None if bias_V is None else bias_V.to(head.dtype)
        need_states, need_head, need_bias = ctx.needs_input_grad[:3]
        dstates = torch.empty_like(states_TD) if need_states else None
        dhead = torch.zeros_like(head_VD, dtype=torch.float32) if need_head else None
        dbias = torch.zeros(V, dtype=torch.float32, device=head.device) if need_bias else None
        count = mask_T.sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.float32, device=states_TD.device)
        chunk = max(1, CHUNK_VALUES // V)
        for start in range(0, T, chunk):
            rows = slice(start, min(start + chunk, T))
            products = F.linear(states_TD[rows], head, bias)
            logits = products.to(torch.promote_types(head.dtype, torch.float32))
            target = targets_T[rows, None]
            largest = logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, target)
            probability = logits.sub_(largest).exp_()
            norm = probability.sum(-1, keepdim=True)
            losses = (norm.log() + largest - chosen).squeeze(1)
            total = total + torch.where(mask_T[rows], losses, 0.0).sum()
            if not (need_states or need_head or need_bias):
                continue
            share = mask_T[rows, None] / count
            gradient = probability.mul_(share / norm).scatter_add_(1, target, -share.to(logits.dtype))
            if dbias is not None:
                dbias += gradient.sum(0)
            gradient = gradient.to(head.dtype)
            if dstates is not None:
                torch.mm(gradient, head, out=dstates[rows])
            if dhead is not None and head.dtype == dhead.dtype:
                dhead.addmm_(gradient.t(), states_TD[rows])
            elif dhead is not None:
                dhead += gradient.t() @ states_TD[rows]
        ctx.save_for_backward(dstates, dhead, dbias, states_TD, head_VD, bias_V, targets_T, mask_T)
        ctx.head_dtype = head_VD.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dstates, dhead, dbias, states, head, bias, targets, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            reference = partial(_reference, targets_T=targets, mask_T=mask)
            found = gradients_through(reference, [states, head, bias], ctx.needs_input_grad[:3], dloss)
            return *found, None, None
        return (
            None if dstates is None else dstates * dloss.to(dstates.dtype),
            None if dhead is None else (dhead * dloss).to(ctx.head_dtype),
            None if dbias is None else (dbias * dloss).to(bias.dtype),
            None,
            None,
        )


def cross_entropy(
    head: Callable[[Tensor], Tensor],
    states_TD: Tensor,
    targets_T: Tensor,
    mask_T: Tensor,
    num_classes: int,
    each_T: Tensor | None = None,
) -> Tensor:
    """The same mean for any head, logits = head(states), and without gradients: what a packed head is measured by.

    `each_T`, float32, is filled with every token's loss, 0 where it is masked out.
    """
    chunk = max(1, CHUNK_VALUES // num_classes)
    total = torch.zeros((), dtype=torch.float32, device=states_TD.device)
    for start in range(0, states_TD.shape[0], chunk):
        rows = slice(start, start + chunk)
        losses = F.cross_entropy(head(states_TD[rows]).float(), targets_T[rows], reduction="none")
        losses = torch.where(mask_T[rows], losses, 0.0)
        if each_T is not None:
            each_T[rows] = losses
        total = total + losses.sum()
    return total / mask_T.sum().clamp(min=1)


def linear_cross_entropy(
    states_TD: Tensor, head_VD: Tensor, targets_T: Tensor, mask_T: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """Mean over the masked-in tokens of −log softmax(states·headᵀ + bias)[target], in nats, float32.

    The same value and gradients as `F.cross_entropy(F.linear(states, head, bias), targets)`.
    """
    if transformed():
        return _reference(states_TD, head_VD, bias_V, targets_T, mask_T)
    y: Tensor = _LinearCrossEntropy.apply(states_TD, head_VD, bias_V, targets_T, mask_T)  # type: ignore[no-untyped-call]
    return y
