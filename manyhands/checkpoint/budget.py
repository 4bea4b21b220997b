"""What a process may have, shared out: all that a model with experts on disk takes, and the slots that are left.

    budget = share(source, memory=4_000_000_000)
    budget.num_slots, budget.cache_bytes        # of experts' records; for the caches of all requests

T tokens of a pass, E experts of a layer, K experts per token.
"""

import math
from dataclasses import dataclass

from manyhands import format
from manyhands.checkpoint.packed import Record
from manyhands.checkpoint.source import Source
from manyhands.checkpoint.tensors import DTYPES
from manyhands.config import ModelConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import UserError
from manyhands.plan.host import resident_memory

FIXED = 48 << 20
"""Bytes: code that is first run when tokens are made, what threads have on their stacks, Python's own growth."""
MOST_TOKENS = 1024
"""T, where memory is plenty."""
LEAST_CACHED = 256
"""Tokens that the cache has room for at least."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes, which together are `memory`."""

    memory: int
    baseline: int
    """What the process has before it loads: Python, torch and whatever else it holds."""
    weights: int
    """What is not an expert's record: always in memory."""
    cache_bytes: int
    """For keys and values of all requests."""
    scratch: int
    """What a pass of `num_tokens` needs beside them."""
    num_tokens: int
    """Of a pass at most."""
    slot_bytes: int
    num_slots: int
    num_staged: int
    """Slots for records that do not stay. A pass wants no more of one layer than this."""
    num_experts: int
    """In all layers."""
    cycle: int
    """Experts that one token wants, in all layers."""

    @property
    def kept(self) -> int:
        """Experts that can stay."""
        return min(self.num_experts, self.num_slots - self.num_staged)

    def warning(self) -> str | None:
        """What to expect where not even one token's experts stay; None: they do."""
        if self.kept >= self.cycle:
            return None
        token = format.show(self.cycle * self.slot_bytes, "B")
        return (
            f"memory keeps {self.kept} of {self.num_experts} experts, and one token wants {self.cycle}: most of the "
            f"{token} that these take are read from the disk for every token"
        )


def share(source: Source, memory: int, cache_bytes: int | None = None, baseline: int | None = None) -> Budget:
    """Share out `memory` bytes. `cache_bytes` None: one context, at most a quarter of what is left for cache and slots.

    `baseline` None: what this process has now. Raises `UserError` for a model whose experts are not packed, and where
    it is too little, naming the least that runs.
    """
    config, experts = (
        source.decoder("a memory budget"),
        [r for r in source.records.values() if r.num_experts is not None],
    )
    if not experts or config.moe is None:
        raise UserError(
            f"{source.directory}: memory bounds a model whose experts are packed: `manyhands quantize "
            f"{source.directory} DST` packs them, as bf16, int8 or int4"
        )
    baseline = resident_memory() if baseline is None else baseline
    weights = dense_bytes(source, experts)
    K, E = config.moe.router.num_experts_per_tok, config.moe.router.num_experts
    slot = max(record.layout.record_bytes for record in experts)
    rest = memory - baseline - weights
    least = cache_bytes or LEAST_CACHED * token_bytes(source)
    if rest < least + scratch_bytes(config, 1) + K * slot:
        smallest = baseline + weights + least + scratch_bytes(config, 1) + K * slot
        raise UserError(
            f"{source.directory}: {format.show(memory, 'B')} of memory are too little; the least that runs it here is "
            f"{math.ceil(smallest / 1e6)}MB: {format.show(baseline, 'B')} that the process has, "
            f"{format.show(weights, 'B')} of weights that are always needed, {format.show(least, 'B')} of cache, and "
            f"{K} experts of {format.show(slot, 'B')}"
        )
    if cache_bytes is None:
        context = config.max_position_embeddings * token_bytes(source)
        cache_bytes = max(least, min(context, rest // 4))
    tokens = MOST_TOKENS
    while tokens > 1 and scratch_bytes(config, tokens) - FIXED > max(FIXED, rest // 8):
        tokens //= 2
    while tokens > 1 and rest - cache_bytes - scratch_bytes(config, tokens) < K * slot:
        tokens //= 2
    cache_bytes = min(cache_bytes, rest - scratch_bytes(config, tokens) - K * slot)
    total = sum(record.num_experts or 0 for record in experts)
    slots = min((rest - cache_bytes - scratch_bytes(config, tokens)) // slot, total + E)
    staged = E if slots >= 2 * E or slots >= total + E else max(K, min(E, slots // 4 // K * K))
    tokens = tokens if staged >= E else min(tokens, staged // K)
    return Budget(
        memory, baseline, weights, cache_bytes, scratch_bytes(config, tokens), tokens,
        slot, slots, staged, total, K * len(experts),
    )  # fmt: skip


def token_bytes(source: Source) -> int:
    """What a token takes in the cache, with its routing."""
    config = source.decoder("a memory budget")
    assert config.moe is not None
    a = config.attention
    values = a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else 2 * a.kv_heads * a.head_dim
    size = DTYPES[source.logical[source.pieces["embed_tokens.weight"][0].theirs].header.dtype].itemsize
    routing = len(config.sparse_layers) * config.moe.router.num_experts_per_tok * 6
    return config.num_hidden_layers * values * size + routing


def dense_bytes(source: Source, experts: list[Record]) -> int:
    """What is in memory whatever happens: all tensors but the experts' records."""
    inside = {name for record in source.records.values() for name in record.sections}
    total = sum(source.files.stored[r.name].size for r in source.records.values() if r.num_experts is None)
    for name, shape in tensor_shapes(source.config).items():
        if name not in inside:
            theirs = source.pieces[name][0].theirs
            total += math.prod(shape) * DTYPES[source.logical[theirs].header.dtype].itemsize
    return total


def scratch_bytes(config: ModelConfig, tokens: int) -> int:
    """What a pass of so many tokens needs: a program's buffers, what its calls work in, routing, logits of the last."""
    assert config.moe is not None
    a, m, D = config.attention, config.moe, config.hidden_size
    K, E, L = m.router.num_experts_per_tok, m.router.num_experts, len(config.sparse_layers)
    heads = a.num_attention_heads * a.head_dim
    if a.kind == "mla":
        heads = a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim + a.kv_lora_rank)
    wide = 8 * D + 3 * heads + 2 * a.kv_heads * a.head_dim + 4 * max(config.intermediate_size, m.shared_width)
    routed = K * (4 * m.moe_intermediate_size + 2 * D)
    routing = 2 * L * (2 * E + 4 * K)
    rows = min(tokens, 16)
    return FIXED + 4 * (tokens * (wide + routed + routing) + 4 * rows * config.vocab_size)
