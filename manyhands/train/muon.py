"""Muon: momentum whose update is made (almost) orthogonal before it is applied, matrix by matrix.

    M = μM + G        O = NS(M) · 0.2·√max(n, m)        W = W − η(O + λW)

Letters: B matrices in a batch, n × m one matrix, s = min(n, m), l = max(n, m).
Sources: Muon (Keller Jordan, 2024); scaling to AdamW's RMS and the form above: Moonlight, arXiv 2502.16982 §2;
Kimi K2, arXiv 2507.20534 §2.1.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
"""The quintic's coefficients: steepest at zero, so small singular values grow fastest (Keller Jordan)."""
EPS = 1e-7
CPU_BATCH_ELEMENTS = 1 << 18
"""Matrices orthogonalised together hold at most this many elements: the batch then stays in cache through all steps.
Measured on two AVX2 cores: as fast as or faster than one at a time, and 10 to 30 % faster than no limit."""
GPU_BATCH_ELEMENTS = 1 << 25
"""The same elsewhere, where launches cost more than memory traffic. A guess, not measured."""


class Muon(torch.optim.Optimizer):
    """Muon for matrices `[n, m]` and stacks of matrices `[E, n, m]`, each matrix orthogonalised by itself.

    Group options beside `lr`, `momentum`, `nesterov`, `weight_decay`, `ns_steps`: `split` = j says that every matrix
    of the group is j matrices fused along its rows (gate over up: 2), to be orthogonalised apart.

    The state is `momentum_buffer`, of the parameter's shape. A parameter without a gradient is left alone; a zero
    gradient with zero momentum only decays the weight. Matrices of one size, whatever tensor they come from and
    whichever way they lie, go through Newton-Schulz in one batch.

    Raises:
        AssertionError: a parameter is neither 2-D nor 3-D, or its rows do not divide by `split`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        split: int = 1,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "ns_steps": ns_steps,
                "split": split,
            },
        )
        for group in self.param_groups:
            for p in group["params"]:
                assert p.ndim in (2, 3) and p.shape[-2] % group["split"] == 0, (tuple(p.shape), group["split"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
            stacks = [_Stack.of(p, p.grad, self.state[p]["momentum_buffer"], group["split"]) for p in params]
            for batch in _batches(stacks):
                self._update(batch, group)

    @staticmethod
    def _update(batch: "list[_Stack]", group: dict[str, Any]) -> None:
        if group["nesterov"]:
            direction_Bsl = torch.cat([torch.add(x.grad, x.momentum, alpha=group["momentum"]) for x in batch])
        else:
            direction_Bsl = torch.cat([x.momentum for x in batch])
        ortho_Bsl = newton_schulz(direction_Bsl, group["ns_steps"])
        rate = group["lr"] * 0.2 * math.sqrt(direction_Bsl.shape[-1])
        for x, update_Bsl in zip(batch, torch.split(ortho_Bsl, [len(x.weight) for x in batch]), strict=True):
            x.weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update_Bsl, alpha=-rate)


@torch.no_grad()
def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Push the singular values of every matrix of `G` `[..., n, m]` towards one, keeping its singular vectors.

    `X = G/‖G‖_F`, then `steps` times `X ← aX + (bA + cA²)X` with `A = XXᵀ` of the smaller side. After five steps the
    values lie in about 0.68–1.2, not at 1; tiny ones stay small. A zero matrix stays zero.

    Args:
        G: `[..., n, m]`, any floating dtype.
        dtype: of the arithmetic; None: bfloat16 on CUDA, where it is cheap, float32 elsewhere.

    Returns:
        A tensor of `G`'s shape and dtype.
    """
    dtype = dtype or (torch.bfloat16 if G.is_cuda else torch.float32)
    tall = G.shape[-2] > G.shape[-1]
    wide = G.mT if tall else G
    norm = torch.linalg.matrix_norm(wide, keepdim=True).clamp_(min=EPS)
    X_Bsl = (wide / norm).to(dtype).reshape(-1, *wide.shape[-2:]).contiguous()
    # Squaring the condition number is safe only with bits to spare; measured faster from l = 2s on.
    if dtype != torch.bfloat16 and X_Bsl.shape[2] >= 2 * X_Bsl.shape[1]:
        X_Bsl = _iterate_gram(X_Bsl, steps)
    else:
        X_Bsl = _iterate(X_Bsl, steps)
    out = X_Bsl.reshape(wide.shape).to(G.dtype)
    return out.mT if tall else out


def _iterate(X_Bsl: Tensor, steps: int) -> Tensor:
    """The definition: `(2l + s)s²` multiply-adds per step and matrix. Overwrites `X_Bsl`."""
    A_Bss = X_Bsl.new_empty(X_Bsl.shape[0], X_Bsl.shape[1], X_Bsl.shape[1])
    P_Bss, Y_Bsl = torch.empty_like(A_Bss), torch.empty_like(X_Bsl)
    for _ in range(steps):
        torch.bmm(X_Bsl, X_Bsl.mT, out=A_Bss)
        torch.baddbmm(A_Bss, A_Bss, A_Bss, beta=B, alpha=C, out=P_Bss)
        torch.baddbmm(X_Bsl, P_Bss, X_Bsl, beta=A, out=Y_Bsl)
        X_Bsl, Y_Bsl = Y_Bsl, X_Bsl
    return X_Bsl


def _iterate_gram(X_Bsl: Tensor, steps: int) -> Tensor:
    """The same polynomial, evaluated on `R = XXᵀ`: the long side is touched twice instead of `2·steps` times.

    Every step multiplies X by `P(R) = aI + bR + cR²`, and all these matrices are polynomials of one R, so they
    commute: `X ← QX` with `Q = P₅⋯P₁`, and `R ← PRP`. Five steps cost `(2l + 17s)s²` multiply-adds, not `(10l + 5s)s²`.
    In blocks of five steps, because rounding in R grows by a² ≈ 12 per step.
    """
    for start in range(0, steps, 5):
        R_Bss = torch.bmm(X_Bsl, X_Bsl.mT)
        P_Bss, S_Bss, Q_Bss, T_Bss = (torch.empty_like(R_Bss) for _ in range(4))
        last = min(5, steps - start) - 1
        for i in range(last + 1):
            torch.baddbmm(R_Bss, R_Bss, R_Bss, beta=B, alpha=C, out=P_Bss)  # P − aI; the aI is in `beta` below
            if i == 0:
                Q_Bss.copy_(P_Bss).diagonal(dim1=-2, dim2=-1).add_(A)
            else:
                torch.baddbmm(Q_Bss, P_Bss, Q_Bss, beta=A, out=T_Bss)
                Q_Bss, T_Bss = T_Bss, Q_Bss
            if i < last:
                torch.baddbmm(R_Bss, P_Bss, R_Bss, beta=A, out=S_Bss)
                torch.baddbmm(S_Bss, S_Bss, P_Bss, beta=A, out=R_Bss)
        X_Bsl = torch.bmm(Q_Bss, X_Bsl)
    return X_Bsl


class _Stack(NamedTuple):
    """A parameter, its gradient and its momentum as `[B, s, l]`: views of them, lying on their long side."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor

    @staticmethod
    def of(weight: Tensor, grad: Tensor, momentum: Tensor, split: int) -> "_Stack":
        rows, columns = weight.shape[-2] // split, weight.shape[-1]
        stacked = (weight.view(-1, rows, columns), grad.reshape(-1, rows, columns), momentum.view(-1, rows, columns))
        return _Stack(*(x.mT if rows > columns else x for x in stacked))

    def cut(self, size: int) -> "Iterator[_Stack]":
        """Pieces of at most `size` matrices."""
        yield from map(_Stack._make, zip(*(torch.split(x, size) for x in self), strict=True))


def _batches(stacks: list[_Stack]) -> Iterator[list[_Stack]]:
    """Gather matrices of equal size, up to the limit above but at least one matrix at a time."""
    by_size: dict[tuple[object, ...], list[_Stack]] = {}
    for stack in stacks:
        key = (stack.weight.shape[1:], stack.weight.dtype, stack.weight.device)
        by_size.setdefault(key, []).append(stack)
    for alike in by_size.values():
        limit = CPU_BATCH_ELEMENTS if alike[0].weight.device.type == "cpu" else GPU_BATCH_ELEMENTS
        room = max(1, limit // alike[0].weight[0].numel())
        batch: list[_Stack] = []
        for piece in (piece for stack in alike for piece in stack.cut(room)):
            if batch and sum(len(x.weight) for x in batch) + len(piece.weight) > room:
                yield batch
                batch = []
            batch.append(piece)
        yield batch
