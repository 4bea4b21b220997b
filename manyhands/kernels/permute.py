"""Sort the (token, expert) pairs by expert, bring rows there and back. Forward and backward without atomic adds.

T tokens, K experts per token, E experts, N kept pairs (T·K when nothing is dropped), D width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.kernels.twice import gradients_through


@dataclass(frozen=True, slots=True)
class Permutation:
    """Where each kept pair goes when pairs are sorted by expert, and by token within an expert."""

    token_N: Tensor
    """Token of each sorted row, int64."""
    pair_N: Tensor
    """Pair (t·K + k) of each sorted row, int64."""
    row_TK: Tensor
    """Sorted row of each pair, int64; N, one past the last, for a dropped pair."""
    offsets_E: Tensor
    """End of each expert's rows, int32."""


def sort_pairs(ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> Permutation:
    """Stable sort of the kept pairs by expert: within an expert, tokens stay in order."""
    T, K = ids_TK.shape
    keys = torch.where(kept_TK, ids_TK, num_experts).flatten()
    pair = keys.argsort(stable=True)
    counts_E = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    offsets_E = counts_E.cumsum(0)
    num_kept = int(offsets_E[-1])
    row = torch.empty_like(pair)
    row[pair] = torch.arange(T * K, device=pair.device)
    pair_N = pair[:num_kept]
    row_TK = row.clamp(max=num_kept).view(T, K)
    return Permutation(pair_N // K, pair_N, row_TK, offsets_E.to(torch.int32))


def _weighted_rows(rows_ND: Tensor, weights_TK: Tensor, p: Permutation) -> Tensor:
    """Σ_k weights_tk · rows[row_tk]: [T, D], each token's sum in the order of its experts, float32 inside."""
    T, K = p.row_TK.shape
    if rows_ND.shape[0] < max(T * K, 1):  # dropped pairs read zeros, not somebody's possibly infinite row
        rows_ND = torch.cat((rows_ND, rows_ND.new_zeros(1, rows_ND.shape[1])))
    weights = weights_TK.to(rows_ND.dtype)
    if rows_ND.device.type == "cpu" and rows_ND.dtype == torch.float32:
        starts = torch.arange(0, T * K, K)
        return F.embedding_bag(p.row_TK.flatten(), rows_ND, starts, mode="sum", per_sample_weights=weights.flatten())
    picked_TKD = rows_ND.index_select(0, p.row_TK.flatten()).view(T, K, rows_ND.shape[1])
    return torch.bmm(weights[:, None], picked_TKD).squeeze(1)


class _Gather(torch.autograd.Function):
    """Rows of x in sorted order; the backward pass sums a token's K rows instead of scattering them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, p: Permutation) -> Tensor:
        ctx.p = p
        return x_TD.index_select(0, p.token_N)

    @staticmethod
    def backward(ctx: Any, drows_ND: Tensor) -> tuple[Tensor, None]:
        p: Permutation = ctx.p
        if torch.is_grad_enabled():
            zeros = drows_ND.new_zeros(p.row_TK.shape[0], drows_ND.shape[1])
            return zeros.index_add(0, p.token_N, drows_ND), None
        ones = torch.ones_like(p.row_TK, dtype=torch.float32)
        return _weighted_rows(drows_ND.contiguous(), ones, p), None


def _combined(rows_ND: Tensor, weights_TK: Tensor, p: Permutation) -> Tensor:
    """`_weighted_rows` in operators that can be differentiated twice."""
    padded = torch.cat((rows_ND, rows_ND.new_zeros(1, rows_ND.shape[1])))
    return (weights_TK[..., None].to(rows_ND.dtype) * padded[p.row_TK]).sum(1)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weights_TK: Tensor, p: Permutation) -> Tensor:
        ctx.save_for_backward(rows_ND, weights_TK)
        ctx.p = p
        return _weighted_rows(rows_ND, weights_TK, p)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_ND, weights_TK = ctx.saved_tensors
        p: Permutation = ctx.p
        if torch.is_grad_enabled():
            wanted = ctx.needs_input_grad[:2]
            drows, dweights = gradients_through(partial(_combined, p=p), [rows_ND, weights_TK], wanted, dy_TD)
            return drows, dweights, None
        drows_ND = dy_TD.index_select(0, p.token_N)
        dweights = weights_TK.new_zeros(weights_TK.numel())
        dweights[p.pair_N] = torch.linalg.vecdot(rows_ND, drows_ND).to(weights_TK.dtype)
        weights_N = weights_TK.flatten().index_select(0, p.pair_N).to(drows_ND.dtype)
        return drows_ND.mul_(weights_N[:, None]), dweights.view_as(weights_TK), None


def gather(x_TD: Tensor, p: Permutation) -> Tensor:
    """[T, D] -> [N, D]: each kept pair's token, sorted by expert."""
    y: Tensor = _Gather.apply(x_TD, p)  # type: ignore[no-untyped-call]
    return y


def combine(rows_ND: Tensor, weights_TK: Tensor, p: Permutation) -> Tensor:
    """[N, D] -> [T, D]: the weighted sum of each token's kept rows; a token without any gets zeros."""
    y: Tensor = _Combine.apply(rows_ND, weights_TK, p)  # type: ignore[no-untyped-call]
    return y
