"""Selections that share the tokens out evenly while training: which tokens an expert gets depends on all of them.

T tokens, E experts, K experts per token. No gradient flows through an assignment; it goes by the chosen scores. Padding
is given its best experts, and counts for nothing.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.moe.routing import top_k_stable

SINKHORN_TOLERANCE = 1e-4  # Megatron's
SINKHORN_ROUNDS = 100
PRICE_ROUNDS = 100
EQUAL = 1e-12  # a gain of less is rounding


@torch.no_grad()
def sinkhorn(logits_TE: Tensor, token_mask_T: Tensor, k: int) -> Tensor:
    """[T, k]: the best of exp(logits), scaled until all tokens have equal sums and all experts have (Megatron).

    Scaling a token's row changes no choice within it, so the result is the best of logits + one offset per expert.
    Choices are nearly even, not exactly. Stops when no offset moves by 1e-4, or after 100 rounds.
    """
    return top_k_stable(logits_TE + sinkhorn_offsets(logits_TE[token_mask_T]), k)


def sinkhorn_offsets(logits_TE: Tensor) -> Tensor:
    """[E]: logarithms of the experts' factors, of the tokens given; zeros without any."""
    T, E = logits_TE.shape
    offsets_E = torch.zeros(E, dtype=logits_TE.dtype, device=logits_TE.device)
    for _ in range(SINKHORN_ROUNDS if T else 0):
        rows_T = -(logits_TE + offsets_E).logsumexp(1) - math.log(T)
        before_E, offsets_E = offsets_E, -(logits_TE + rows_T[:, None]).logsumexp(0) - math.log(E)
        if float((offsets_E - before_E).abs().max()) < SINKHORN_TOLERANCE:
            break
    return offsets_E


@torch.no_grad()
def balanced(logits_TE: Tensor, token_mask_T: Tensor, k: int) -> Tensor:
    """[T, 1]: the assignment of one expert to each token with the largest sum of logits in which no expert has more
    than ⌈T/E⌉ tokens (BASE layers, arXiv 2103.16716). `k` is 1. Exact; computed on the CPU.
    """
    ids_T1 = top_k_stable(logits_TE, k)
    real_TE = logits_TE[token_mask_T].nan_to_num().cpu().double().numpy()  # a run that diverges must not hang here
    assigned = torch.from_numpy(assign(real_TE, -(-len(real_TE) // real_TE.shape[1])))
    ids_T1[token_mask_T] = assigned[:, None].to(ids_T1.device)
    return ids_T1


def assign(values_TE: NDArray[np.float64], room: int) -> NDArray[np.int64]:
    """[T]: the assignment with the largest sum in which each of E columns is used at most `room` times.

    Every token begins at its best after prices, which is right for the loads it makes, whatever the prices are. While
    an expert has too many, or a move would gain, tokens move along the cheapest chain that ends where there is room
    (successive shortest paths; the graph has a node per expert, not per token). The prices leave few to move.
    """
    T, E = values_TE.shape
    of_T = (values_TE - _prices(values_TE)).argmax(1) if T else np.zeros(0, np.int64)
    counts_E = np.bincount(of_T, minlength=E)
    # What the cheapest move from expert i to j costs, and which token makes it; the diagonal is never used.
    cost_EE, token_EE = np.full((E, E), np.inf), np.zeros((E, E), np.int64)

    def look_at(expert: int) -> None:
        members = np.flatnonzero(of_T == expert)
        if not len(members):
            cost_EE[expert] = np.inf
            return
        losses = values_TE[members, expert, None] - values_TE[members]
        best = losses.argmin(0)
        cost_EE[expert], token_EE[expert] = losses[best, np.arange(E)], members[best]
        cost_EE[expert, expert] = np.inf

    for expert in range(E):
        look_at(expert)
    while (counts_E < room).any():
        full_E = counts_E > room
        path, cost = _cheapest_path(cost_EE, full_E if full_E.any() else counts_E > 0, counts_E < room)
        if not full_E.any() and cost >= -EQUAL:
            break
        for start, end in pairwise(path):
            of_T[token_EE[start, end]] = end
        counts_E[path[0]] -= 1
        counts_E[path[-1]] += 1
        for expert in path:
            look_at(expert)
    return of_T


def _prices(values_TE: NDArray[np.float64]) -> NDArray[np.float64]:
    """[E]: what each expert would have to cost for nearly even loads; dearer while it has more than its share."""
    T, E = values_TE.shape
    prices_E, step = np.zeros(E), 0.5 * values_TE.std()
    for n in range(PRICE_ROUNDS):
        counts_E = np.bincount((values_TE - prices_E).argmax(1), minlength=E)
        prices_E = prices_E + step / (1.0 + n / 10) * (counts_E * E / T - 1.0)
    return prices_E


def _cheapest_path(
    cost_EE: NDArray[np.float64], start_E: NDArray[np.bool_], end_E: NDArray[np.bool_]
) -> tuple[list[int], float]:
    """Nodes and cost of the cheapest path from any start to any end. Bellman–Ford: a move may gain, no circle does."""
    E = len(cost_EE)
    distance_E, before_E = np.where(start_E, 0.0, np.inf), np.full(E, -1)
    for _ in range(E):
        through_EE = distance_E[:, None] + cost_EE
        best_E = through_EE.argmin(0)
        found_E = through_EE[best_E, np.arange(E)]
        better_E = found_E < distance_E - EQUAL
        if not better_E.any():
            break
        distance_E, before_E = np.where(better_E, found_E, distance_E), np.where(better_E, best_E, before_E)
    node = int(np.where(end_E, distance_E, np.inf).argmin())
    path = [node]
    while before_E[node] >= 0:
        node = int(before_E[node])
        path.append(node)
    return path[::-1], float(distance_E[path[0]])


ASSIGNMENTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"base": balanced, "sinkhorn": sinkhorn}
"""By `RouterConfig.select`: (logits [T, E], token mask [T], K) to ids [T, K], while training."""
