"""What is measured on the way: rounding errors, routing, cross entropy."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manyhands.moe import Routing
from manyhands.quant import PackedExperts
from manyhands.quant.panels import CHUNK_VALUES, chunks, decode
from manyhands.quant.record import Matrix


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


def rounding_error(w: Tensor, section: Tensor, scales: Tensor | None, matrix: Matrix) -> Tensor:
    """`squared_error` of a packed matrix [parts · N, K], unpacked some million weights at a time."""
    squares = torch.zeros(2, dtype=torch.float64)
    values = section.view(matrix.panels, -1)
    by_panel = None if scales is None else scales.view(matrix.panels, -1)
    for rows, panels, part in chunks(matrix, CHUNK_VALUES):
        got = decode(values[panels].flatten(), None if by_panel is None else by_panel[panels].flatten(), part)
        squares += squared_error(torch.cat([w[of_part] for of_part in rows]), got)
    return squares


def expert_error(packed: PackedExperts, expert: int, up: Tensor, down: Tensor) -> Tensor:
    """`squared_error` [2, 2] of one expert's two matrices."""
    found = []
    for name, matrix, w in zip(("up", "down"), packed.layout.matrices, (up, down), strict=True):
        section = packed.section(expert, name)
        assert section is not None
        found.append(rounding_error(w, section, packed.section(expert, f"{name}_scales"), matrix))
    return torch.stack(found)


def relative(squares: Tensor) -> float:
    """‖w − got‖ / ‖w‖ from sums of `squared_error`."""
    return math.sqrt(float(squares[0] / squares[1])) if squares[1] else 0.0
