"""The oracle's Soft MoE: one sequence after the other, every slot and every token a weighted mean. Float64.

S tokens, E experts, P slots per expert, D width.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from manyhands.check.oracle_dense import DenseRouting, RouterWeights
from manyhands.config import RouterConfig


def soft(
    x_TD: Tensor,
    weights: RouterWeights,
    scale: Tensor,
    config: RouterConfig,
    mask_T: Tensor,
    length: int,
    experts: Callable[[Tensor], Tensor],
) -> tuple[Tensor, DenseRouting]:
    """What each expert says to each token [T, E, D], and the routing whose weights they are summed with.

    `experts` gives every expert's output [N, E, D] of N inputs; of the slots of an expert only its own is used.
    """
    E, P = config.num_experts, config.slots_per_expert
    phi = weights.weight / weights.weight.norm(dim=1, keepdim=True) * scale
    outputs, logits = [], []
    for start in range(0, len(x_TD), length):
        x = x_TD[start : start + length]
        z = (x / x.norm(dim=1, keepdim=True)) @ phi.T
        powers = z.exp() * mask_T[start : start + length, None]
        if not mask_T[start : start + length].any():
            powers = torch.ones_like(z)
        slots = (powers / powers.sum(0)).T @ x
        said = torch.stack([experts(slots[n : n + 1])[0, n // P] for n in range(E * P)])
        of_expert = [z[:, e * P : (e + 1) * P].exp() for e in range(E)]
        parts = [(p / p.sum(1, keepdim=True)) @ said[e * P : (e + 1) * P] for e, p in enumerate(of_expert)]
        outputs.append(torch.stack(parts, 1))
        logits.append(torch.stack([p.sum(1).log() for p in of_expert], 1))
    z = torch.cat(logits)
    scores = z.exp() / z.exp().sum(1, keepdim=True)
    every = torch.ones_like(scores, dtype=torch.bool)
    blank = DenseRouting(z, scores, every, every, scores * config.routed_scaling_factor, mask_T, scores.detach())
    return torch.cat(outputs), replace(blank, router=weights)
