"""Expert parallelism on paper: how often a token travels, how many devices hold the model.

E experts, K per token, R equal shards of them (devices or nodes).
"""

from math import ceil, comb

DISPATCH_BYTES = 1 + 4 / 128
"""FP8 with one float32 scale per 128 values (arXiv 2412.19437 §3.3.2)."""
COMBINE_BYTES = 2.0
"""bf16."""


def distinct_shards(num_experts: int, per_token: int, shards: int) -> float:
    """Expected distinct shards that one token's K distinct experts lie in: R·(1 - C(E - E/R, K) / C(E, K))."""
    if num_experts % shards:
        raise ValueError(f"{shards} shards do not divide {num_experts} experts")
    outside = num_experts - num_experts // shards
    return shards * (1 - comb(outside, per_token) / comb(num_experts, per_token))


def remote_copies(num_experts: int, per_token: int, shards: int, limit: int | None = None) -> float:
    """Copies of a token that leave its own shard: (distinct, at most `limit`)·(R-1)/R.

    Node-limited routing (arXiv 2412.19437 §2.1.2) caps the distinct nodes at `limit`.
    """
    distinct = distinct_shards(num_experts, per_token, shards)
    return (min(distinct, limit) if limit else distinct) * (shards - 1) / shards


def smallest_count(weights: float, memory: float, reserve: float = 0.1) -> int:
    """Devices that hold the weights, split evenly, with the share `reserve` of each kept for caches and work space."""
    return max(1, ceil(weights / (memory * (1 - reserve))))


def per_device(experts: float, others: float, num_experts: int, devices: int) -> float:
    """Weight bytes of the fullest device: its share of the experts (whole ones), and a copy of everything else."""
    return experts * ceil(num_experts / devices) / num_experts + others
