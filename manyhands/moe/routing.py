"""`Routing`: who goes where. The router returns it; balance, load, traces and reports read it.

T tokens, K experts per token, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from manyhands.kernels.policy import FEW_SCORES


@dataclass(frozen=True, slots=True, repr=False)
class Routing:
    """The router's decision for one layer and one batch of tokens, flattened over batch and sequence."""

    expert_ids: Tensor
    """[T, K] int64, best first; -1 for no expert (GShard's unsampled second, expert choice's untaken pairs)."""
    weights: Tensor
    """[T, K] float32: what each chosen expert's output is multiplied by. Carries gradient to the router."""
    scores: Tensor
    """[T, E] float32: softmax or sigmoid of the logits, without balancing bias. Carries gradient."""
    logits: Tensor
    """[T, E] float32, without noise. Carries gradient."""
    kept: Tensor
    """[T, K] bool: whether the pair is computed. False for id -1 and for what overflowed an expert's capacity."""
    token_mask: Tensor
    """[T] bool: false for padding, which no loss or statistic counts."""
    noisy_logits: Tensor | None = None
    """[T, E] float32: the logits the experts were chosen by, when the router added noise (Shazeer)."""
    noise_std: Tensor | None = None
    """[T, E] float32: standard deviation of that noise. Carries gradient."""

    expert_outputs: Tensor | None = None
    """[T, K, D]: what each chosen expert said, unweighted; only when asked for (orthogonality loss)."""

    groups: "Routing | None" = None
    """The first level of a hierarchical gate (`moe/hierarchy.py`): a routing whose experts are the groups."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.scores.shape[-1]

    def __repr__(self) -> str:
        """Sizes, not numbers."""
        T, K = self.expert_ids.shape
        return f"Routing({T} tokens, {K} of {self.num_experts} experts each)"

    def expert_counts(self) -> Tensor:
        """[E] int64: real tokens that chose each expert, before any capacity was applied."""
        return count_experts(self.expert_ids, self.token_mask, self.num_experts)

    def rows(self, tokens: slice | Tensor) -> "Routing":
        """The routing of some of the tokens: views for a slice, a copy for indices or a mask."""
        return Routing(*(_rows(part, tokens) for part in self._parts()))

    @staticmethod
    def cat(routings: Sequence["Routing"]) -> "Routing":
        """The tokens of several, one after the other. What only some of them hold is left out."""
        every = zip(*(routing._parts() for routing in routings), strict=True)
        return Routing(*map(_together, every))

    def _parts(self) -> list[Any]:
        """Every field, in the order of the constructor: each is a tensor whose first dimension is T, a routing of the
        same tokens, or None."""
        return [getattr(self, name) for name in _NAMES]


def _rows(part: Any, tokens: slice | Tensor) -> Any:
    if part is None:
        return None
    return part.rows(tokens) if isinstance(part, Routing) else part[tokens]


def _together(parts: Sequence[Any]) -> Any:
    """One field of several routings as one; None where any lacks it."""
    if any(part is None for part in parts):
        return None
    return Routing.cat(parts) if isinstance(parts[0], Routing) else torch.cat(list(parts))


_NAMES = tuple(field.name for field in fields(Routing))

pytree.register_dataclass(Routing)  # what torch.export, vmap and the like may return


def count_experts(ids_TK: Tensor, token_mask_T: Tensor, num_experts: int) -> Tensor:
    """[E] int64: how often each expert is chosen by tokens whose mask is true. Integers: bf16 would lose counts."""
    real = torch.where(token_mask_T[:, None] & (ids_TK >= 0), ids_TK, num_experts).flatten()
    return torch.bincount(real, minlength=num_experts + 1)[:num_experts]


def top_k_stable(scores_TE: Tensor, k: int) -> Tensor:
    """[T, k] int64: the k highest entries of each row, best first, ties to the lower index, on every device.

    `torch.topk` breaks ties as it likes. Here float32 scores become integers of the same order, with the index
    in the low bits, so that no two are equal. A row of NaN still gets k different, valid indices.
    """
    scores = scores_TE.detach().float() + 0.0  # -0.0 becomes 0.0: equal floats must have equal bits
    if scores.numel() <= FEW_SCORES:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    E = scores.shape[-1]
    keys = (ordered << 32) + torch.arange(E - 1, -1, -1, device=scores.device)
    return keys.topk(k, dim=-1).indices
