"""Muon: momentum whose update is made (almost) orthogonal before it is applied, matrix by matrix.

    M = μM + G        O = NS(M) · 0.2·√max(n, m)        W = W − η(O + λW)

Of parameters that are shared out over processes, a stack of matrices lies there as some whole ones, and each process
updates its own; rows of one matrix are brought together first (`muon_sharded.py`).

Letters: B matrices in a batch, n × m one matrix, s = min(n, m), l = max(n, m).
Sources: Muon (Keller Jordan, 2024); scaling to AdamW's RMS and the form above: Moonlight, arXiv 2502.16982 §2;
Kimi K2, arXiv 2507.20534 §2.1.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from manyhands.parallel.shards import cuts_rows, local
from manyhands.train.muon_sharded import orthogonal_rows

A, B, C = 3.4445, -4.7750, 2.0315
"""The quintic's coefficients: steepest at zero, so small singular values grow fastest (Keller Jordan)."""
EPS = 1e-7
CPU_BATCH_ELEMENTS = 1 << 18
"""Matrices orthogonalised together hold at most this many elements: the batch then stays in cache through all steps.
Measured on two AVX2 cores: as fast as or faster than one at a time, and 10 to 30 % faster than no limit."""
GPU_BATCH_ELEMENTS = 1 << 25
"""The same elsewhere, where launches cost more than memory traffic. A guess, not measured."""

_Cut = tuple[DeviceMesh, torch.Size, torch.dtype]
"""What matrices of which each process holds rows have in common when they go through together."""


class Muon(torch.optim.Optimizer):
    """Muon for matrices `[n, m]` and stacks of matrices `[E, n, m]`, each matrix orthogonalised by itself.

    Group options beside `lr`, `momentum`, `nesterov`, `weight_decay`, `ns_steps`: `split` = j says that every matrix
    of the group is j matrices fused along its rows (gate over up: 2), to be orthogonalised apart.

    The state is `momentum_buffer`, of the parameter's shape. A parameter without a gradient is left alone; a zero
    gradient with zero momentum only decays the weight. Matrices of one size, whatever tensor they come from and
    whichever way they lie, go through Newton-Schulz in one batch.

    Of processes that hold the parameters as DTensors, cut along the first dimension, all must call `step` with
    gradients for the same parameters; a process may hold no matrix of a stack, or no row of a matrix.

    Raises:
        AssertionError: a parameter is neither 2-D nor 3-D, its rows do not divide by `split`, or it is a DTensor that
            is cut in another way.
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
                if isinstance(p, DTensor):
                    assert all(map(cuts_rows, p.placements)) and (p.ndim == 3 or p.device_mesh.ndim == 1), p.placements

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            stacks: list[_Stack] = []
            cut: dict[_Cut, list[_Stack]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                here = _Stack(*map(local, (p, p.grad, self.state[p]["momentum_buffer"])))
                here.momentum.mul_(group["momentum"]).add_(here.grad)
                if p.ndim == 2 and isinstance(p, DTensor):
                    cut.setdefault((p.device_mesh, p.shape, p.dtype), []).append(here)
                elif here.weight.numel():
                    stacks.append(here.lying(group["split"]))
            for batch in _batches(stacks):
                ortho_Bsl = newton_schulz(torch.cat([x.direction(group) for x in batch]), group["ns_steps"])
                for x, update in zip(batch, torch.split(ortho_Bsl, [len(x.weight) for x in batch]), strict=True):
                    x.update(update, ortho_Bsl.shape[-1], group)
            self._update_rows(cut, group)

    @staticmethod
    def _update_rows(cut: "dict[_Cut, list[_Stack]]", group: dict[str, Any]) -> None:
        """Update matrices of which each process holds rows."""
        first = 0  # who gets the next matrix: the sizes of which there are few do not all go to the same process
        orthogonalize = partial(_orthogonal, split=group["split"], steps=group["ns_steps"])
        for (mesh, (n, m), _), alike in cut.items():
            processes = mesh.get_group()
            at_once = processes.size() * _room(alike[0].weight, n * m)
            for start in range(0, len(alike), at_once):
                some = alike[start : start + at_once]
                updates = orthogonal_rows([x.direction(group) for x in some], n, processes, orthogonalize, first)
                for x, update in zip(some, updates, strict=True):
                    x.update(update, max(n // group["split"], m), group)
                first += len(some)


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
    """What this process holds of a parameter, its gradient and its momentum: matrices, or rows of one."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor

    def lying(self, split: int) -> "_Stack":
        """Views of them as `[B, s, l]`."""
        rows, columns = self.weight.shape[-2] // split, self.weight.shape[-1]
        shape = -1, rows, columns
        stacked = self.weight.view(shape), self.grad.reshape(shape), self.momentum.view(shape)
        return _Stack(*(x.mT if rows > columns else x for x in stacked))

    def cut(self, size: int) -> "Iterator[_Stack]":
        """Pieces of at most `size` matrices."""
        yield from map(_Stack._make, zip(*(torch.split(x, size) for x in self), strict=True))

    def direction(self, group: dict[str, Any]) -> Tensor:
        """What is made orthogonal."""
        return torch.add(self.grad, self.momentum, alpha=group["momentum"]) if group["nesterov"] else self.momentum

    def update(self, ortho: Tensor, side: int, group: dict[str, Any]) -> None:
        """Decay the weight and go along `ortho`, of matrices whose long side is `side`."""
        rate = group["lr"] * 0.2 * math.sqrt(side)
        self.weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(ortho, alpha=-rate)


def _orthogonal(whole_Bnm: Tensor, split: int, steps: int) -> Tensor:
    """Newton-Schulz of whole matrices, each of `split` fused ones, with the arithmetic that a batch above has."""
    n, m = whole_Bnm.shape[-2] // split, whole_Bnm.shape[-1]
    fused = whole_Bnm.view(-1, n, m)
    ortho = newton_schulz(fused.mT.contiguous(), steps).mT if n > m else newton_schulz(fused, steps)
    return ortho.reshape(whole_Bnm.shape)


def _batches(stacks: list[_Stack]) -> Iterator[list[_Stack]]:
    """Gather matrices of equal size, up to the limit above but at least one matrix at a time."""
    by_size: dict[tuple[object, ...], list[_Stack]] = {}
    for stack in stacks:
        key = (stack.weight.shape[1:], stack.weight.dtype, stack.weight.device)
        by_size.setdefault(key, []).append(stack)
    for alike in by_size.values():
        room = _room(alike[0].weight, alike[0].weight[0].numel())
        batch: list[_Stack] = []
        for piece in (piece for stack in alike for piece in stack.cut(room)):
            if batch and sum(len(x.weight) for x in batch) + len(piece.weight) > room:
                yield batch
                batch = []
            batch.append(piece)
        yield batch


def _room(weight: Tensor, elements: int) -> int:
    """Matrices of so many elements that go through Newton-Schulz together where `weight` lies."""
    return max(1, (CPU_BATCH_ELEMENTS if weight.device.type == "cpu" else GPU_BATCH_ELEMENTS) // elements)
