"""Working memory of a forward pass: what lies beside weights and caches while a prompt is read.

An estimate of this package's own engine with the `grouped_mm` experts; other engines differ.
T tokens, N = T·K routed pairs, D width, F expert width, H heads, G key/value heads, d head width.
"""

from manyhands.config import ModelConfig

ROUTER_BYTES = 4


def working_bytes(config: ModelConfig, tokens: int, bits: float = 32) -> float:
    """Of one pass over `tokens`, at `bits` per activation: a layer at its fullest, the residual stream beside it.

    The routings of all layers stay until the end: scores and logits [T, E] in float32.
    """
    D, T = config.hidden_size, tokens
    a = config.attention
    if a.kind == "mla":
        heads = a.num_attention_heads * (2 * (a.qk_nope_head_dim + a.qk_rope_head_dim) + a.v_head_dim)
    else:
        heads = (a.num_attention_heads + 2 * a.kv_heads) * a.head_dim
    moments = [2 * T * heads]  # before and after the rotation
    kept = 0.0
    if config.dense_layers:
        moments.append(3 * T * config.intermediate_size)
    if config.moe is not None:
        F, router = config.moe.moe_intermediate_size, config.moe.router
        N = T * router.num_experts_per_tok
        moments.append(N * max(D + 2 * F, 4 * F, F + 2 * D))  # gathered; gated; gathered back
        moments.append(3 * T * config.moe.shared_width)
        kept = 2 * T * router.num_experts * ROUTER_BYTES * len(config.sparse_layers)
    return (max(moments) + 4 * T * D) * bits / 8 + kept
