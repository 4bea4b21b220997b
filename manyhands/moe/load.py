"""Load: how evenly the experts are used, per layer. Integers are collected, ratios are computed when read.

E experts, T tokens, K experts per token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.moe.routing import Routing
from manyhands.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """One layer's load over some tokens."""

    load: list[float]
    """[E] share of the pairs each expert was chosen for; sums to 1."""
    max_vio: float
    """max_e count_e / mean − 1: 0 is perfect (arXiv 2408.15664)."""
    cv2: float
    """Population variance of the counts / mean²: 0 is perfect."""
    entropy: float
    """Entropy of the load / ln E: 1 is perfect, 0 is one expert for all."""
    dead: int
    """Experts that no token chose."""
    dropped: float
    """Share of chosen pairs that overflowed a capacity."""
    top1_weight: float
    """Mean weight of a token's first choice."""


@dataclass(slots=True)
class LoadCounter:
    """Adds up routings of one layer. Padding is not counted; nothing is stored in the model."""

    counts: Tensor
    """[E] int64: pairs that chose each expert, before capacity."""
    dropped: Tensor
    """[] int64: chosen pairs that overflowed a capacity."""
    top1_weight: Tensor
    """[] float64: sum over tokens of the largest weight."""
    tokens: Tensor
    """[] int64"""

    @classmethod
    def empty(cls, num_experts: int, device: torch.device | str = "cpu") -> "LoadCounter":
        """A counter for E experts."""
        zero = torch.zeros((), dtype=torch.int64, device=device)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        return cls(counts, zero, zero.double(), zero)

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Count one more micro-batch."""
        mask_T = routing.token_mask
        chosen = (routing.expert_ids >= 0) & mask_T[:, None]
        self.counts = self.counts + routing.expert_counts()
        self.dropped = self.dropped + (chosen & ~routing.kept).sum()
        self.top1_weight = self.top1_weight + (routing.weights * chosen).amax(1).sum()
        self.tokens = self.tokens + mask_T.sum()

    def summary(self) -> LoadSummary:
        """The ratios. Without any token all are those of perfect balance except `dead`."""
        counts = self.counts.double()
        E, total = counts.numel(), float(counts.sum())
        if total == 0.0:
            return LoadSummary([1.0 / E] * E, 0.0, 0.0, 1.0, E, 0.0, 0.0)
        share = counts / total
        entropy = float(-(share * share.clamp(min=1e-300).log()).sum()) / math.log(E) if E > 1 else 1.0
        return LoadSummary(
            load=share.tolist(),
            max_vio=float(share.max()) * E - 1.0,
            cv2=float(share.var(correction=0)) * E * E,
            entropy=entropy,
            dead=int((counts == 0).sum()),
            dropped=float(self.dropped) / total,
            top1_weight=float(self.top1_weight) / max(int(self.tokens), 1),
        )


def summed(counters: Mapping[int, LoadCounter], ranks: Ranks) -> dict[int, LoadCounter]:
    """The sum of every rank's counter of each layer, in two exchanges for all of them."""
    if ranks.size == 1 or not counters:
        return dict(counters)
    integers = [torch.cat((c.counts, c.dropped[None], c.tokens[None])) for c in counters.values()]
    *counts_EL, dropped_L, tokens_L = ranks.sum(torch.stack(integers)).unbind(1)
    weights_L = ranks.sum(torch.stack([c.top1_weight for c in counters.values()]))
    columns = zip(torch.stack(counts_EL, 1), dropped_L, weights_L, tokens_L, strict=True)
    return {layer: LoadCounter(*column) for layer, column in zip(counters, columns, strict=True)}
