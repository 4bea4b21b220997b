"""Capacity: which (token, expert) pairs fit, when an expert has room for only so many tokens.

Without a capacity factor nothing is dropped and this file is not used. A dropped pair contributes nothing, and its
weight is not given to the others: the token passes through the residual connection.

T tokens, K experts per token, E experts.
"""

import math

import torch
from torch import Tensor

from manyhands.config import RouterConfig


def capacity(num_tokens: int, config: RouterConfig, factor: float) -> int:
    """Rows per expert: ⌊factor · T·K / E⌋, at least `min_capacity`, at most T. T=64, E=8, K=1, 1.25 gives 10."""
    fair = num_tokens * config.num_experts_per_tok / config.num_experts
    return min(num_tokens, max(config.min_capacity, math.floor(factor * fair)))


def apply_capacity(
    ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, token_mask_T: Tensor, config: RouterConfig, factor: float
) -> Tensor:
    """`kept` [T, K] with the overflow of every expert removed. Padding takes no room.

    Policy `position`: first choices are served before second choices, earlier tokens before later ones (GShard,
    Switch); a pair already dropped before (GShard's unsampled second expert) takes no room. Policy
    `probability`: the highest weights are served first, ties to the earlier token (batch-prioritised routing).
    """
    T, K = ids_TK.shape
    E = config.num_experts
    wants_TK = kept_TK & token_mask_T[:, None]
    room = capacity(int(token_mask_T.sum()), config, factor)
    # Pairs in order of service: all first choices, then all second choices, …
    ids = ids_TK.t().flatten()
    wants = wants_TK.t().flatten()
    if config.drop_policy == "probability":
        by_weight = weights_TK.detach().t().flatten().argsort(descending=True, stable=True)
    else:
        by_weight = torch.arange(T * K, device=ids.device)
    keys = torch.where(wants, ids, E)[by_weight]
    by_expert = keys.argsort(stable=True)
    counts = torch.bincount(keys, minlength=E + 1)
    starts = counts.cumsum(0) - counts
    sorted_keys = keys[by_expert]
    place = torch.arange(T * K, device=ids.device) - starts[sorted_keys]
    fits = (place < room) & (sorted_keys < E)
    kept = torch.empty_like(wants)
    kept[by_weight[by_expert]] = fits
    return kept.view(K, T).t().contiguous()
