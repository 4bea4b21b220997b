"""Parameters of the systems that no family of ours reads, counted from the catalogue's shapes.

D model width, F feed-forward width, H query heads, G key/value heads, d head width, E experts, K experts per token.
"""

from collections import Counter

from manyhands.catalog.shape import (
    AttentionShape,
    DecoderShape,
    EncoderDecoderShape,
    ExpertsShape,
    LstmShape,
    MambaShape,
    MoEShape,
    Shape,
)
from manyhands.config.activation import Form
from manyhands.plan.count import Counts


def count_shape(shape: Shape) -> Counts:
    """Count every parameter of `shape`."""
    match shape:
        case DecoderShape():
            return _decoder(shape)
        case EncoderDecoderShape():
            return _encoder_decoder(shape)
        case LstmShape():
            return _lstm(shape)
        case ExpertsShape():
            return _experts(shape)


def experts_in_model(shape: Shape) -> int:
    """Expert networks in all layers together."""
    match shape:
        case DecoderShape():
            return shape.moe.num_experts * shape.moe.layers if shape.moe else 0
        case EncoderDecoderShape():
            return shape.num_experts * (shape.encoder_moe_layers + shape.decoder_moe_layers)
        case LstmShape():
            return shape.num_experts
        case ExpertsShape():
            return shape.num_experts * shape.moe_layers


def sequence_flops(shape: EncoderDecoderShape, tokens_in: int, tokens_out: int) -> int:
    """Forward FLOPs of one pair of sequences, routers left out: 2 · weights · tokens, attention, and the head.

    A decoder's token sees half of the outputs and all of the inputs. With 512 and 114 this is the "FLOPs/seq" of
    arXiv 2101.03961, table 9, to about 5 %.
    """
    D, wide = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    routers = D * shape.num_experts
    encoder, decoder = _stack(shape, decoder=False)[1], _stack(shape, decoder=True)[1]
    encoder -= routers * shape.encoder_moe_layers
    decoder -= routers * shape.decoder_moe_layers
    weights = tokens_in * encoder + tokens_out * (decoder + D * shape.vocab_size)
    seen_in = tokens_in * tokens_in * shape.encoder_layers
    seen_out = (tokens_out * tokens_out // 2 + tokens_out * tokens_in) * shape.decoder_layers
    return 2 * weights + 2 * 2 * wide * (seen_in + seen_out)


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
    parts["dense feed-forward"] = s.dense_layers * _feed_forward(D, s.intermediate_size, s.gated, s.mlp_bias)
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
    expert = _feed_forward(D, m.moe_intermediate_size, m.gated)
    parts["routed experts"] += m.layers * m.num_experts * expert
    parts["router"] += m.layers * (D * m.num_experts + (D if m.output_bias else 0))
    parts["shared experts"] += m.layers * _feed_forward(D, m.shared_intermediate_size, True)
    parts["dense feed-forward"] += m.layers * _feed_forward(D, m.residual_intermediate_size, True)
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


def _feed_forward(D: int, F: int, gated: bool, bias: bool = False) -> int:
    matrices = Form(gated).matrices
    return matrices * D * F + ((matrices - 1) * F + D if bias and F else 0)


def _encoder_decoder(s: EncoderDecoderShape) -> Counts:
    embedding = s.vocab_size * s.hidden_size
    head = 0 if s.tie_word_embeddings else embedding
    parts, body = Counter({"embedding": embedding, "head": head}), 0
    for decoder in (False, True):
        stack, active = _stack(s, decoder=decoder)
        parts.update(stack)
        body += active
    # one table of relative positions each for encoder and decoder: looked up, so no part of the active counts
    tables = 2 * s.relative_buckets * s.num_attention_heads
    parts["attention"] += tables
    idle = {"attention": tables, "routed experts": sum(parts.values()) - tables - embedding - head - body}
    return Counts(
        total=sum(parts.values()),
        active=body + embedding + head,
        active_without_embedding=body + (head or embedding),
        body=body,
        embedding=embedding,
        by_component={name: count for name, count in parts.items() if count},
        idle={name: count for name, count in idle.items() if count},
    )


def _stack(s: EncoderDecoderShape, *, decoder: bool) -> tuple[Counter[str], int]:
    """(parts, active) of the encoder or the decoder."""
    D, layers = s.hidden_size, s.decoder_layers if decoder else s.encoder_layers
    sparse, extra = s.encoder_moe_layers, s.encoder_extra_dense
    if decoder:
        sparse, extra = s.decoder_moe_layers, s.decoder_extra_dense
    network = _feed_forward(D, s.intermediate_size, s.gated)
    parts = Counter(
        {
            "attention": (2 if decoder else 1) * layers * 4 * D * s.num_attention_heads * s.head_dim,
            "dense feed-forward": (layers - sparse + extra) * network,
            "routed experts": sparse * s.num_experts * network,
            "router": sparse * D * s.num_experts,
            "norms": ((3 if decoder else 2) * layers + extra + 1) * D,
        }
    )
    return parts, sum(parts.values()) - sparse * (s.num_experts - s.num_experts_per_tok) * network


def _lstm(s: LstmShape) -> Counts:
    """Gates and noise at both levels; a token evaluates the first and its groups' part of the second."""
    D, expert = s.hidden_size, _feed_forward(s.hidden_size, s.moe_intermediate_size, gated=False)
    recurrent = s.lstm_layers * 4 * 2 * D * D
    gates = 2 * D * (s.num_groups + s.num_experts)
    gates_used = 2 * D * (s.num_groups + s.groups_per_tok * s.num_experts // s.num_groups)
    body = recurrent + s.num_experts_per_tok * expert + gates_used
    parts = {"recurrent": recurrent, "router": gates, "routed experts": s.num_experts * expert}
    idle = {"router": gates - gates_used, "routed experts": (s.num_experts - s.num_experts_per_tok) * expert}
    return Counts(sum(parts.values()), body, body, body, embedding=0, by_component=parts, idle=idle)


def _experts(s: ExpertsShape) -> Counts:
    layer = s.moe_layers * _feed_forward(s.hidden_size, s.moe_intermediate_size, s.gated)
    total, active = layer * s.num_experts, layer * s.num_experts_per_tok
    parts, idle = {"routed experts": total}, {"routed experts": total - active}
    return Counts(total, active, active, active, embedding=0, by_component=parts, idle=idle)
