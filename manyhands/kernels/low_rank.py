"""Experts W + s·B·A without ever making B·A: beside each product with W two thin ones, on the same sorted rows.

LoRA (Hu et al. 2021, arXiv 2106.09685). W is a constant: stacked weights, or packed records. Gradients go to x, to the
router's weights, to A and to B; an expert without tokens has zeros. Where gradients are wanted records are unpacked, an
expert at a time, forward and back, exactly; else they are read natively, which rounds rows beside int8 and int4.

T tokens, K experts per token, E experts, N kept pairs, D width, F expert width, r rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.kernels.experts import Bank, ExpertWeights, activate
from manyhands.kernels.frozen import Fetch, frozen_products
from manyhands.kernels.native import step
from manyhands.kernels.native.packed import matrix_product
from manyhands.kernels.permute import Permutation, combine, gather, sort_pairs
from manyhands.quant import PackedExperts

GROUPED = (torch.float32, torch.bfloat16, torch.float16)
"""What `grouped_mm` multiplies, in rows of whole multiples of `ALIGN` bytes."""
ALIGN = 16


class LowRankWeights(NamedTuple):
    """s·B·A of each expert."""

    A: Tensor
    """[E, r, in]"""
    B: Tensor
    """[E, out, r]"""
    scale: float
    """s"""

    def added_to(self, weight: Tensor, ids: Sequence[int]) -> Tensor:
        """W + s·B·A of these experts, whose W is `weight`; float32 at least."""
        which = list(ids)
        wide = torch.promote_types(weight.dtype, self.A.dtype)
        return weight.detach().to(wide) + self.scale * (self.B[which] @ self.A[which])


class AdaptedWeights(NamedTuple):
    """A bank (`kernels.experts.Bank`) and what LoRA adds to it. `grouped_mm` runs it by the thin products, `eager` by
    making one expert's W + s·B·A at a time."""

    base: Bank
    up: LowRankWeights | None
    """Added to gate and up together; None: nothing is."""
    down: LowRankWeights | None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.base.num_experts

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.base.hidden_size

    @property
    def activation(self) -> str:
        """Between the two products."""
        return self.base.activation

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        """W + s·B·A of these experts, in that order, float32 at least; gradients go to A and B."""
        own = self.base.stacked(ids)
        up = own.up if self.up is None else self.up.added_to(own.up, ids)
        down = own.down if self.down is None else self.down.added_to(own.down, ids)
        return own._replace(up=up, down=down)

    def in_memory(self) -> None:
        """They are made when asked."""
        return None


def low_rank_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: AdaptedWeights
) -> Tensor:
    """y_t = Σ_k weights_tk · Expert'_{ids_tk}(x_t) over the kept pairs: [T, D] in x's dtype, which may be any float."""
    base, up, down = experts
    p = sort_pairs(ids_TK, kept_TK, base.num_experts)
    ends: list[int] = p.offsets_E.tolist()
    h_N = _product(gather(x_TD, p), base, "up", up, p, ends)
    y_ND = _product(activate(h_N, base.activation), base, "down", down, p, ends)
    return combine(y_ND, weights_TK, p)


def _product(
    x_N: Tensor, base: Bank, name: str, added: LowRankWeights | None, p: Permutation, ends: Sequence[int]
) -> Tensor:
    """[N, in] -> [N, out]."""
    y_N = _base_product(x_N, base, name, p, ends)
    if added is None:
        return y_N
    A, B = (t.to(x_N.dtype) for t in (added.A, added.B))
    if (missing := -A.shape[1] % (ALIGN // x_N.element_size())) and _grouped(x_N):  # its rows must be aligned too
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    low_Nr = added.scale * _products(x_N, A, p, ends)
    return y_N + _products(low_Nr, B, p, ends)


def _base_product(x_N: Tensor, base: Bank, name: str, p: Permutation, ends: Sequence[int]) -> Tensor:
    """[N, in] -> [N, out] with the constant weights, and their biases."""
    lie = base.in_memory()
    if isinstance(lie, ExpertWeights):
        weight, bias = (lie.up, lie.up_bias) if name == "up" else (lie.down, lie.down_bias)
        if weight.dtype == x_N.dtype and _fits(x_N, weight):
            y_N = _products(x_N, weight.detach(), p, ends)
            return y_N if bias is None else y_N + bias.detach().repeat_interleave(_counts(p), 0).to(x_N.dtype)
        return frozen_products(x_N, lambda e: (weight[e], None if bias is None else bias[e]), ends, weight.shape[1])
    if isinstance(lie, PackedExperts) and step.direct(x_N) and lie.records.device.type == "cpu":
        return _native_products(x_N, lie, name, ends)
    return frozen_products(x_N, _made(base, name), ends, _width(base, name))


def _native_products(x_N: Tensor, packed: PackedExperts, name: str, ends: Sequence[int]) -> Tensor:
    """Where no gradient will come: records as they lie, rows rounded to 8 bits beside int8 and int4."""
    starts = (0, *ends[:-1])
    rows = [(e, slice(start, end)) for e, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]
    if not rows:
        return x_N.new_empty(0, _rows_of(packed, name))
    return torch.cat([matrix_product(x_N[of], packed, e, name) for e, of in rows])


def _rows_of(packed: PackedExperts, name: str) -> int:
    matrix = packed.layout.matrices[("up", "down").index(name)]
    return matrix.parts * matrix.outputs


def _made(base: Bank, name: str) -> Fetch:
    """The weights of a bank that are not stacked, an expert at a time."""
    lie = base.in_memory()
    if isinstance(lie, PackedExperts):
        return lambda e: (lie.weights(e, name), lie.bias(e, name))

    def fetch(e: int) -> tuple[Tensor, Tensor | None]:
        one = base.stacked([e])
        weight, bias = (one.up, one.up_bias) if name == "up" else (one.down, one.down_bias)
        return weight[0], None if bias is None else bias[0]

    return fetch


def _width(base: Bank, name: str) -> int:
    if name == "down":
        return base.hidden_size
    lie = base.in_memory()
    if isinstance(lie, PackedExperts):
        return _rows_of(lie, name)
    return base.stacked([0]).up.shape[1]


def _counts(p: Permutation) -> Tensor:
    """[E] int64: rows of each expert."""
    return p.offsets_E.diff(prepend=p.offsets_E.new_zeros(1)).long()


def _grouped(x: Tensor) -> bool:
    """Whether `grouped_mm` multiplies rows like these."""
    return x.dtype in GROUPED and x.shape[-1] * x.element_size() % ALIGN == 0


def _fits(x: Tensor, weight: Tensor) -> bool:
    return _grouped(x) and weight.shape[1] * x.element_size() % ALIGN == 0


def _products(x_N: Tensor, weight_E: Tensor, p: Permutation, ends: Sequence[int]) -> Tensor:
    """[N, in] -> [N, out] with each row's expert of weight [E, out, in]; gradients go to both."""
    if _fits(x_N, weight_E):
        return F.grouped_mm(x_N, weight_E.transpose(-2, -1), offs=p.offsets_E)
    starts = (0, *ends[:-1])
    rows = [x_N[start:end] @ weight_E[e].T for e, (start, end) in enumerate(zip(starts, ends, strict=True))]
    return torch.cat(rows)
