"""What is measured on the way: rounding errors, routing, cross entropy."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manyhands.moe import Routing


@dataclass(slots=True)
class Figures:
    """What is measured on the way."""

    relative_error: dict[str, float] = field(default_factory=dict)
    """Our tensor -> ‖W − Ŵ‖ / ‖W‖."""
    agreement: dict[int, float] = field(default_factory=dict)
    """Sparse layer -> share of the chosen experts that the packed model chooses too."""
    tokens_per_expert: dict[int, list[int]] = field(default_factory=dict)
    too_few: dict[int, list[int]] = field(default_factory=dict)
    nats: tuple[float, float] | None = None
    """Mean cross entropy before and after."""


def agreement(a: Routing, b: Routing) -> float:
    """Of the experts that `a` chose, the share that `b` chose for the same token."""
    chosen = [torch.zeros(r.scores.shape[0], r.num_experts + 1, dtype=torch.bool) for r in (a, b)]
    for r, member_TE in zip((a, b), chosen, strict=True):
        member_TE.scatter_(1, r.expert_ids.where(r.expert_ids >= 0, r.num_experts), True)
    first, second = (member_TE[:, :-1] for member_TE in chosen)
    return float((first & second).sum() / first.sum().clamp(min=1))


def squared_error(w: Tensor, got: Tensor) -> Tensor:
    """‖w − got‖² and ‖w‖²."""
    w = w.float()
    return torch.stack(((w - got).square().sum(dtype=torch.float64), w.square().sum(dtype=torch.float64)))


def relative(squares: Tensor) -> float:
    """‖w − got‖ / ‖w‖ from sums of `squared_error`."""
    return math.sqrt(float(squares[0] / squares[1])) if squares[1] else 0.0
