"""Capacity: which (token, expert) pairs fit, when an expert has room for only so many tokens.

Without a capacity nothing is dropped and this file is not used. A dropped pair contributes nothing, and its weight is
not given to the others: the token passes through the residual connection.

T tokens, K experts per token, E experts, G groups: an expert has the same room in each, and they do not compete.
"""

import torch
from torch import Tensor

from manyhands.config import RouterConfig


def capacity(tokens_G: Tensor, config: RouterConfig, factor: float | None) -> Tensor:
    """[G] int64 rows per expert in groups of so many real tokens [G]: `capacity_tokens`, or with a factor
    ⌊factor · T·K / E⌋, at least `min_capacity`; at most T. T=64, E=8, K=1, 1.25 gives 10.
    """
    if config.capacity_tokens is not None or factor is None:
        room_G = torch.full_like(tokens_G, config.capacity_tokens or 0)
    else:
        fair_G = tokens_G.double() * config.num_experts_per_tok / config.num_experts
        room_G = (factor * fair_G).floor().long().clamp(min=config.min_capacity)
    return torch.minimum(room_G, tokens_G)


def find_groups(num_tokens: int, config: RouterConfig, sequence_length: int | None) -> tuple[int, int]:
    """G and the tokens of a group, the last of which may have fewer: `capacity_per`.

    A layer that was given no sequences, only tokens, has one sequence.
    """
    size = {"sequence": sequence_length, "group": config.capacity_group}.get(config.capacity_per)
    size = max(1, num_tokens) if size is None else size
    return -(-num_tokens // size), size


def apply_capacity(
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor,
    token_mask_T: Tensor,
    config: RouterConfig,
    factor: float | None,
    sequence_length: int | None = None,
) -> Tensor:
    """`kept` [T, K] with the overflow of every expert removed, group by group. Padding takes no room.

    Policy `position`: first choices are served before second choices, earlier tokens before later ones (GShard,
    Switch); a pair already dropped before (GShard's unsampled second expert) takes no room. Policy
    `probability`: the highest weights are served first, ties to the earlier token (batch-prioritised routing).
    """
    T, K = ids_TK.shape
    E = config.num_experts
    wants_TK = kept_TK & token_mask_T[:, None]
    G, size = find_groups(T, config, sequence_length)
    group_T = torch.arange(T, device=ids_TK.device) // size
    room_G = capacity(torch.bincount(group_T[token_mask_T], minlength=G), config, factor)
    # Pairs in order of service: all first choices, then all second choices, …
    queues = (group_T[:, None] * E + ids_TK).t().flatten()  # one for every expert in every group
    wants = wants_TK.t().flatten()
    if config.drop_policy == "probability":
        by_weight = weights_TK.detach().t().flatten().argsort(descending=True, stable=True)
    else:
        by_weight = torch.arange(T * K, device=queues.device)
    keys = torch.where(wants, queues, G * E)[by_weight]
    by_queue = keys.argsort(stable=True)
    counts = torch.bincount(keys, minlength=G * E + 1)
    starts = counts.cumsum(0) - counts
    sorted_keys = keys[by_queue]
    place = torch.arange(T * K, device=queues.device) - starts[sorted_keys]
    room = torch.cat((room_G.repeat_interleave(E), room_G.new_zeros(1)))  # nothing fits where nobody wants to go
    kept = torch.empty_like(wants)
    kept[by_weight[by_queue]] = place < room[sorted_keys]
    return kept.view(K, T).t().contiguous()
