"""Parameters of the systems that none of our families reads, counted from the catalogue's shapes.

D model width, F feed-forward width, H query heads, G key/value heads, d head width, E experts, K experts per token.
"""

from collections import Counter

from manyhands.catalog.shape import (
    AttentionShape,
    DecoderShape,
    MambaShape,
    MoEShape,
    Shape,
    TranslatorShape,
)
from manyhands.config import EncoderDecoderConfig, LocalExpertsConfig, RecurrentConfig
from manyhands.plan.count import Counts
from manyhands.plan.count_kind import count_any, feed_forward


def count_shape(shape: Shape) -> Counts:
    """Count every parameter of `shape`."""
    match shape:
        case DecoderShape():
            return _decoder(shape)
        case TranslatorShape():
            return _translator(shape)
        case _:
            return count_any(shape)


def experts_in_model(shape: Shape) -> int:
    """Expert networks in all layers together."""
    match shape:
        case DecoderShape():
            return shape.moe.num_experts * shape.moe.layers if shape.moe else 0
        case EncoderDecoderConfig():
            sparse = len(shape.sparse_layers)
            return shape.router.num_experts * sparse if shape.router else 0
        case RecurrentConfig():
            return shape.moe.router.num_experts * len(shape.sparse_layers) if shape.moe else 0
        case LocalExpertsConfig():
            return shape.num_experts
        case TranslatorShape():
            return shape.num_experts * shape.sparse_layers


def _decoder(s: DecoderShape) -> Counts:
    D, a = s.hidden_size, s.attention
    embedding, positions = s.vocab_size * D, s.position_embeddings * D
    parts = Counter({"embedding": embedding + positions})
    parts["head"] = (0 if s.tie_word_embeddings else embedding) + (s.vocab_size if s.head_bias else 0)
    attention_layers = a.layers or s.num_hidden_layers
    shared, each = _attention(a, D)
    parts["attention"] = attention_layers * (shared + a.num_experts * each)
    idle = {"attention": attention_layers * (a.num_experts - a.num_experts_per_tok) * each}
    if s.mamba:
        parts["state space"] = s.mamba.layers * _mamba(s.mamba, D)
    parts["dense feed-forward"] = s.dense_layers * feed_forward(D, s.intermediate_size, s.gated, s.mlp_bias)
    parts["norms"] = (s.norms_per_layer * s.num_hidden_layers + 1) * D * (2 if s.norm_bias else 1)
    buffers = 0
    if s.moe:
        idle["routed experts"] = _moe(parts, s.moe, D)
        buffers = s.moe.num_experts * s.moe.layers if s.moe.selection_bias else 0
    total = sum(parts.values())
    active = total - sum(idle.values())
    body = active - parts["embedding"] - parts["head"]
    return Counts(
        total=total,
        active=active,
        active_without_embedding=body + (embedding if s.tie_word_embeddings else parts["head"]),
        body=body,
        embedding=parts["embedding"],
        by_component={name: count for name, count in parts.items() if count},
        idle={name: count for name, count in idle.items() if count},
        buffers=buffers,
    )


def _moe(parts: Counter[str], m: MoEShape, D: int) -> int:
    """Adds the sparse layers to `parts`; returns what does not work for a token."""
    expert = feed_forward(D, m.moe_intermediate_size, m.gated)
    parts["routed experts"] += m.layers * m.num_experts * expert
    parts["router"] += m.layers * (D * m.num_experts + (D if m.output_bias else 0))
    parts["shared experts"] += m.layers * feed_forward(D, m.shared_intermediate_size, True)
    parts["dense feed-forward"] += m.layers * feed_forward(D, m.residual_intermediate_size, True)
    return m.layers * (m.num_experts - m.num_experts_per_tok) * expert


def _attention(a: AttentionShape, D: int) -> tuple[int, int]:
    """(what every token uses, one attention expert's query and output projections)."""
    q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    if a.num_experts:  # JetMoE: each expert has as many heads as keys, one router, one bias on the combined output
        return 2 * D * kv + D * a.num_experts + D, 2 * D * kv
    count = 2 * D * q + 2 * D * kv
    count += (q + 2 * kv if a.attention_bias else 0) + (D if a.output_bias else 0)
    count += {"none": 0, "head": 2 * a.head_dim, "full": q + kv}[a.qk_norm]
    return count, 0


def _mamba(m: MambaShape, D: int) -> int:
    inner, state, rank = m.inner_size, m.state_size, m.time_step_rank
    project_in, convolution = D * 2 * inner, inner * m.conv_kernel + inner
    to_parameters, time_step = inner * (rank + 2 * state), rank * inner + inner
    transition, skip, project_out = inner * state, inner, inner * D
    norms = rank + 2 * state
    return project_in + convolution + to_parameters + time_step + transition + skip + project_out + norms


def _translator(s: TranslatorShape) -> Counts:
    D, layers = s.hidden_size, s.num_encoder_layers + s.num_decoder_layers
    expert = feed_forward(D, s.intermediate_size, gated=False)
    source, target = s.source_vocab_size * D, s.target_vocab_size * D
    # a decoder's layer has two attentions and three norms; after each stack there is one more
    parts = {
        "embedding": source + target,
        "attention": (layers + s.num_decoder_layers) * 4 * D * s.num_attention_heads * s.head_dim,
        "router": s.sparse_layers * D * s.num_experts,
        "routed experts": s.sparse_layers * s.num_experts * expert,
        "dense feed-forward": (layers - s.sparse_layers) * expert,
        "norms": 2 * D * (2 * layers + s.num_decoder_layers + 2),
    }
    idle = {"routed experts": s.sparse_layers * (s.num_experts - s.num_experts_per_tok) * expert}
    total = sum(parts.values())
    body = total - idle["routed experts"] - source - target
    return Counts(
        total=total,
        active=body + source + target,
        active_without_embedding=body + target,
        body=body,
        embedding=source + target,
        by_component=parts,
        idle=idle,
    )
