"""One step of expectation maximisation for a tree of gates over linear experts (Jordan and Jacobs 1994, section 3).

Given the responsibilities, every part is a problem of its own: a weighted linear regression for an expert, a weighted
logistic regression for a gate. The first is solved; the second takes one Newton step, which is shortened until it does
not lower its own objective. So the objective never falls. What is maximised has two small penalties, which keep every
linear system solvable where an expert has hardly an example.

N examples, I inputs with the column of ones, O outputs, M experts, G gates of a level, b branches of each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EXPERT_RIDGE = 1e-3
"""An expert's weights cost ½ · this · ‖W‖² / σ²."""
GATE_RIDGE = 1e-2
"""A gate's cost ½ · this · ‖V‖²."""
LEAST_VARIANCE = 1e-6
"""Of the targets' own: an expert that fits a few examples exactly would have an infinite likelihood."""
_HALVINGS = 30


@dataclass(frozen=True, slots=True)
class Tree:
    """The parameters, which are changed in place."""

    gates: list[Tensor]
    """[G, b, I] of each level, from the root down."""
    experts: Tensor
    """[M, O, I]"""
    log_variance: Tensor
    """[M]"""


def penalty(tree: Tree) -> float:
    """What is subtracted from the log-likelihood of all examples."""
    weights_M = tree.experts.square().sum((1, 2)) / tree.log_variance.exp()
    gates = sum(float(gate.square().sum()) for gate in tree.gates)
    return 0.5 * (EXPERT_RIDGE * float(weights_M.sum()) + GATE_RIDGE * gates)


def start(tree: Tree, x_NI: Tensor, y_NO: Tensor) -> None:
    """Every expert becomes the regression of all examples, plus what it was; its variance that of the residuals."""
    everywhere_N1 = x_NI.new_ones(len(x_NI), 1)
    weights_1OI = regressions(everywhere_N1, x_NI, y_NO)
    tree.experts.add_(weights_1OI)
    spread = (y_NO - x_NI @ weights_1OI[0].T).square().mean().clamp(min=_least(y_NO))
    tree.log_variance.fill_(float(spread.log()))


def improve(tree: Tree, share_NM: Tensor, x_NI: Tensor, y_NO: Tensor) -> None:
    """The M step: `share_NM` are the responsibilities of the experts for the examples."""
    tree.experts.copy_(regressions(share_NM, x_NI, y_NO))
    outputs_NMO = torch.einsum("ni,moi->nmo", x_NI, tree.experts)
    residual_M = (share_NM * (y_NO[:, None] - outputs_NMO).square().sum(-1)).sum(0)
    residual_M = residual_M + EXPERT_RIDGE * tree.experts.square().sum((1, 2))
    mass_M = share_NM.sum(0).clamp(min=torch.finfo(share_NM.dtype).tiny)
    tree.log_variance.copy_((residual_M / (y_NO.shape[1] * mass_M)).clamp(min=_least(y_NO)).log())
    for gate_GbI in tree.gates:
        G, b = gate_GbI.shape[:2]
        share_NGb = share_NM.view(len(share_NM), G, b, -1).sum(-1)
        for g in range(G):
            gate_GbI[g] = newton(gate_GbI[g], share_NGb[:, g], x_NI)


def regressions(share_NM: Tensor, x_NI: Tensor, y_NO: Tensor) -> Tensor:
    """[M, O, I]: the linear regression of each expert, an example counting as much as the expert's share of it."""
    weighed_MNI = share_NM.T[..., None] * x_NI
    normal_MII = weighed_MNI.mT @ x_NI + EXPERT_RIDGE * torch.eye(x_NI.shape[1], dtype=x_NI.dtype)
    weights_MIO: Tensor = torch.linalg.solve(normal_MII, weighed_MNI.mT @ y_NO)
    return weights_MIO.mT


def gate_objective(gate_bI: Tensor, share_Nb: Tensor, x_NI: Tensor) -> Tensor:
    """Σ_n Σ_b share · log softmax(V x), less the penalty."""
    return (share_Nb * (x_NI @ gate_bI.T).log_softmax(-1)).sum() - 0.5 * GATE_RIDGE * gate_bI.square().sum()


def newton(gate_bI: Tensor, share_Nb: Tensor, x_NI: Tensor) -> Tensor:
    """[b, I]: the gate after one Newton step, or less of it. Its objective is concave, so the direction rises."""
    b, columns = gate_bI.shape
    mass_N1, p_Nb = share_Nb.sum(-1, keepdim=True), (x_NI @ gate_bI.T).softmax(-1)
    slope_bI = (share_Nb - mass_N1 * p_Nb).T @ x_NI - GATE_RIDGE * gate_bI
    curve = GATE_RIDGE * torch.eye(b * columns, dtype=x_NI.dtype).view(b, columns, b, columns)
    for row in range(b):  # one after the other: all at once would be N·b²·I numbers
        curve_Nb = mass_N1 * (-p_Nb[:, row : row + 1] * p_Nb)
        curve_Nb[:, row] += mass_N1[:, 0] * p_Nb[:, row]
        curve[row] += ((curve_Nb.T[..., None] * x_NI).mT @ x_NI).transpose(0, 1)
    direction: Tensor = torch.linalg.solve(curve.view(b * columns, -1), slope_bI.flatten())
    direction_bI = direction.view(b, columns)
    before, length = gate_objective(gate_bI, share_Nb, x_NI), 1.0
    for _ in range(_HALVINGS):
        after_bI = gate_bI + length * direction_bI
        if gate_objective(after_bI, share_Nb, x_NI) >= before:
            return after_bI
        length *= 0.5
    return gate_bI


def _least(y_NO: Tensor) -> float:
    return max(LEAST_VARIANCE * float(y_NO.var(0, correction=0).mean()), 1e-300)
