"""What the oracle says of a routing, as matrices, and what its selections share.

T tokens, K experts per token, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.config import RouterConfig

NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """Float64 copies of one router's state."""

    weight: Tensor
    """[E, D]"""
    bias: Tensor | None
    """[E], for selection only."""
    noise_weight: Tensor | None
    logit_bias: Tensor | None = None
    """[E], added to the logits."""
    l1_steps: Tensor | None = None
    """[], ReMoE's."""
    group_weight: Tensor | None = None
    """[G, D], of a first level."""
    group_noise_weight: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DenseRouting:
    """Who goes where, as matrices [T, E]."""

    logits: Tensor
    scores: Tensor
    chosen: Tensor
    """bool: picked, whether or not there was room."""
    kept: Tensor
    """bool: picked and computed."""
    weights: Tensor
    """float64: combination weight of every chosen pair, 0 elsewhere. Carries gradient."""
    mask: Tensor
    """[T] bool: real tokens."""
    tested_scores: Tensor
    """The scores under test, without gradient: a loss that selects by itself does so from these, since
    rounding may decide."""
    noisy_logits: Tensor | None = None
    noise_std: Tensor | None = None
    flips: int = 0
    """Tokens whose experts differ from ours by no more than rounding; theirs were taken."""
    wrong: int = 0
    """Tokens whose experts differ by more than that; ours were kept."""
    outputs: Tensor | None = None
    """[T, E, D]: every expert's output for every token."""
    router: RouterWeights | None = None
    """Whose routing it is, for losses about the weights themselves."""
    groups: "DenseRouting | None" = None
    """The first level of a two-level gate: its experts are the groups."""

    def counts(self) -> Tensor:
        """[E] int64: real tokens that picked each expert."""
        return (self.chosen & self.mask[:, None]).sum(0)

    def dropped(self) -> Tensor:
        """[] int64: picked pairs of real tokens that found no room."""
        return (self.chosen & ~self.kept & self.mask[:, None]).sum()


def best(values: Tensor, k: int) -> Tensor:
    """Column numbers of the k largest in each row, best first, ties to the lower number."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def weigh(chosen: Tensor, scores: Tensor, config: RouterConfig) -> Tensor:
    """[T, E]: the scores of the chosen, divided by their sum if the router renormalises, scaled; 0 elsewhere."""
    weights = torch.where(chosen, scores, 0.0)
    if config.norm_topk_prob and (config.num_experts_per_tok > 1 or config.norm_top1):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * config.routed_scaling_factor
