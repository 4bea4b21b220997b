"""Bytes that one step reads from memory: the fixed weights once, the experts its tokens touch, the caches.

E experts, K experts per token, T tokens of a step (decoding: one per sequence).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from manyhands.plan.cache import sequence_bytes
from manyhands.plan.count import Counts
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import Storage

Load = Sequence[Sequence[float]]
"""Per sparse layer, the share of each expert in the routed pairs (sums to 1)."""


def distinct_experts(num_experts: int, per_token: int, tokens: float) -> float:
    """Expected distinct experts of one layer under uniform routing: E·(1 - (1 - K/E)^T)."""
    return float(num_experts * (1 - (1 - per_token / num_experts) ** tokens))


def distinct_of_load(shares: Sequence[float], per_token: int, tokens: float) -> float:
    """The same for a recorded load: Σ_e 1 - (1 - K·share_e)^T; a token takes an expert at most once."""
    return float(sum(1 - (1 - min(1.0, per_token * share)) ** tokens for share in shares))


def mean_distinct(sizes: Sizes, tokens: float, load: Load | None = None) -> float:
    """Distinct experts per sparse layer, averaged over the layers; 0 for a dense model."""
    E, K = sizes.num_experts, sizes.experts_per_token
    if not E:
        return 0.0
    if load is None:
        return distinct_experts(E, K, tokens)
    return sum(distinct_of_load(shares, K, tokens) for shares in load) / len(load)


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one step over `tokens` tokens reads."""

    tokens: int
    distinct: float
    """Experts touched per sparse layer: expected, were routing uniform or as in a given load."""
    experts: float
    fixed: float
    """Every weight that all tokens share, and a row of the input embedding for each."""
    cache: float
    fewest: float | None = None
    """Experts of a layer, were all tokens sent to the same ones: no routing reads fewer. None: `distinct`."""

    @property
    def total(self) -> float:
        """Bytes per step."""
        return self.experts + self.fixed + self.cache

    @property
    def least(self) -> float:
        """Bytes per step, were all tokens sent to the same experts."""
        if self.fewest is None or not self.distinct:
            return self.total
        return self.total - self.experts * (1 - self.fewest / self.distinct)

    @property
    def per_token(self) -> float:
        """Bytes per token."""
        return self.total / self.tokens


def expert_bytes(sizes: Sizes, counts: Counts, storage: Storage) -> float:
    """One expert of one layer."""
    if not sizes.num_experts:
        return 0.0
    routed = counts.by_component["routed experts"]
    return routed / (sizes.num_experts * sizes.sparse_layers) * storage.routed / 8


def fixed_bytes(counts: Counts, storage: Storage) -> float:
    """Every weight but the routed experts; an untied input embedding is looked up, row by row."""
    parts = counts.by_component
    total = sum(n * storage.bits(name) for name, n in parts.items() if name not in ("routed experts", "embedding")) / 8
    embedding = counts.embedding * storage.bits("embedding") / 8
    return total + (embedding if "head" not in parts else 0.0)


def decode_bytes(
    sizes: Sizes,
    counts: Counts,
    storage: Storage,
    *,
    batch: int = 1,
    context: float = 0,
    kv_bits: float = 16,
    load: Load | None = None,
) -> StepBytes:
    """One decoding step of `batch` sequences of `context` positions each."""
    distinct = mean_distinct(sizes, batch, load)
    rows = batch * sizes.hidden_size * storage.embedding / 8
    return StepBytes(
        tokens=batch,
        distinct=distinct,
        experts=distinct * sizes.sparse_layers * expert_bytes(sizes, counts, storage),
        fixed=fixed_bytes(counts, storage) + rows,
        cache=batch * sequence_bytes(sizes, context, kv_bits),
        fewest=min(distinct, sizes.experts_per_token),
    )


def prefill_bytes(sizes: Sizes, counts: Counts, storage: Storage, length: int, load: Load | None = None) -> StepBytes:
    """One pass over a prompt of `length` tokens; the cache is written, not read back."""
    return decode_bytes(sizes, counts, storage, batch=length, context=0, load=load)
