"""The tensors of a model, from its description alone: every name in the decoder's `state_dict`, with its shape.

V vocabulary, D width, L layers, E experts, F expert width, H heads, G key/value heads, d head width.
"""

from collections.abc import Iterator

from manyhands.config.activation import GATED
from manyhands.config.attention import AttentionConfig
from manyhands.config.decoder import ModelConfig
from manyhands.config.moe import MoEConfig

Shape = tuple[int, ...]


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Parameters and buffers by name. Equal to the built model's, name by name (a test holds that)."""
    D, V = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"embed_tokens.weight": (V, D)}
    for layer in range(config.num_hidden_layers):
        for name, shape in _block(config, layer):
            shapes[f"layers.{layer}.{name}"] = shape
    shapes["norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def _block(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    D = config.hidden_size
    yield "input_layernorm.weight", (D,)
    attention = _mla if config.attention.kind == "mla" else _gqa
    for name, shape in attention(config.attention, D):
        yield f"self_attn.{name}", shape
    yield "post_attention_layernorm.weight", (D,)
    if config.is_sparse(layer):
        assert config.moe is not None
        for name, shape in _moe(config.moe, D):
            yield f"mlp.{name}", shape
    else:
        for name, shape in _feed_forward(D, config.intermediate_size, config.hidden_act):
            yield f"mlp.{name}", shape
    if config.output_norms:
        yield "attention_output_norm.weight", (D,)
        yield "mlp_output_norm.weight", (D,)


def _gqa(a: AttentionConfig, D: int) -> Iterator[tuple[str, Shape]]:
    H, G, d = a.num_attention_heads, a.kv_heads, a.head_dim
    for name, heads in (("q", H), ("k", G), ("v", G)):
        yield f"{name}_proj.weight", (heads * d, D)
        if a.attention_bias:
            yield f"{name}_proj.bias", (heads * d,)
    yield "o_proj.weight", (D, H * d)
    if a.output_bias:
        yield "o_proj.bias", (D,)
    if a.qk_norm != "none":
        full = a.qk_norm == "full"
        yield "q_norm.weight", (H * d if full else d,)
        yield "k_norm.weight", (G * d if full else d,)
    if a.sinks:
        yield "sinks", (H,)


def _mla(a: AttentionConfig, D: int) -> Iterator[tuple[str, Shape]]:
    H, R, n, r, v = a.num_attention_heads, a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim
    if a.q_lora_rank is None:
        yield "q_proj.weight", (H * (n + r), D)
    else:
        yield "q_a_proj.weight", (a.q_lora_rank, D)
        if a.attention_bias:
            yield "q_a_proj.bias", (a.q_lora_rank,)
        yield "q_a_layernorm.weight", (a.q_lora_rank,)
        yield "q_b_proj.weight", (H * (n + r), a.q_lora_rank)
    yield "kv_a_proj_with_mqa.weight", (R + r, D)
    if a.attention_bias:
        yield "kv_a_proj_with_mqa.bias", (R + r,)
    yield "kv_a_layernorm.weight", (R,)
    yield "kv_b_proj.weight", (H * (n + v), R)
    yield "o_proj.weight", (D, H * v)
    if a.output_bias or a.attention_bias:
        yield "o_proj.bias", (D,)


def _feed_forward(D: int, F: int, activation: str) -> Iterator[tuple[str, Shape]]:
    if activation in GATED:
        yield "gate_proj.weight", (F, D)
    yield "up_proj.weight", (F, D)
    yield "down_proj.weight", (D, F)


def _moe(moe: MoEConfig, D: int) -> Iterator[tuple[str, Shape]]:
    E, F, router = moe.router.num_experts, moe.moe_intermediate_size, moe.router
    yield "router.weight", (E, D)
    if router.logit_bias:
        yield "router.bias", (E,)
    if router.noisy:
        yield "router.noise_weight", (E, D)
    if router.bias:
        yield "router.e_score_correction_bias", (E,)
    if router.select == "positive":
        yield "router.l1_steps", ()
    gated = moe.hidden_act in GATED
    up, rows = ("gate_up_proj", 2 * F) if gated else ("up_proj", F)
    yield f"experts.{up}", (E, rows, D)
    yield "experts.down_proj", (E, D, F)
    if moe.expert_bias:
        yield f"experts.{up}_bias", (E, rows)
        yield "experts.down_proj_bias", (E, D)
    if moe.n_shared_experts:
        for name, shape in _feed_forward(D, moe.shared_width, moe.hidden_act):
            yield f"shared_experts.{name}", shape
    if moe.shared_expert_gate:
        yield "shared_expert_gate.weight", (1, D)
