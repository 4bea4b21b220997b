"""The tensors of a model, from its description alone: every name in its `state_dict`, with its shape.

V vocabulary, D width, L layers, E experts, F expert width, H heads, G key/value heads, d head width.
"""

from collections.abc import Iterator

from manyhands.config.activation import GATED
from manyhands.config.attention import AttentionConfig
from manyhands.config.decoder import ModelConfig
from manyhands.config.encoder_decoder import EncoderDecoderConfig
from manyhands.config.kinds import BuiltConfig
from manyhands.config.moe import MoEConfig
from manyhands.config.recurrent import RecurrentConfig

Shape = tuple[int, ...]


def tensor_shapes(config: BuiltConfig) -> dict[str, Shape]:
    """Parameters and buffers by name. Equal to the built model's, name by name (a test holds that)."""
    if isinstance(config, EncoderDecoderConfig):
        return encoder_decoder_shapes(config)
    return _decoder(config) if isinstance(config, ModelConfig) else _recurrent(config)


def _decoder(config: ModelConfig) -> dict[str, Shape]:
    D, V = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"embed_tokens.weight": (V, D)}
    for layer in range(config.num_hidden_layers):
        for name, shape in _block(config, layer):
            shapes[f"layers.{layer}.{name}"] = shape
    shapes |= _norm(config, "norm")
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    if config.lm_head_bias:
        shapes["lm_head.bias"] = (V,)
    return shapes


def _norm(config: ModelConfig, name: str) -> dict[str, Shape]:
    parameters = ("weight", "bias") if config.norm == "layer_norm" else ("weight",)
    return {f"{name}.{parameter}": (config.hidden_size,) for parameter in parameters}


def _recurrent(config: RecurrentConfig) -> dict[str, Shape]:
    D, V = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"embed_tokens.weight": (V, D)} if V else {}
    for layer in range(config.num_hidden_layers):
        lstm = {"weight_ih": (4 * D, D), "weight_hh": (4 * D, D)} | ({"bias": (4 * D,)} if config.lstm_bias else {})
        shapes |= {f"layers.{layer}.lstm.{name}": shape for name, shape in lstm.items()}
        if config.is_sparse(layer):
            assert config.moe is not None
            shapes |= {f"layers.{layer}.mlp.{name}": shape for name, shape in _moe(config.moe, D)}
    if V and not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def _block(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    D = config.hidden_size
    yield from _norm(config, "input_layernorm").items()
    attention = _mla if config.attention.kind == "mla" else _gqa
    for name, shape in attention(config.attention, D):
        yield f"self_attn.{name}", shape
    yield from _norm(config, "post_attention_layernorm").items()
    if config.is_sparse(layer):
        assert config.moe is not None
        for name, shape in _moe(config.moe, D):
            yield f"mlp.{name}", shape
    else:
        for name, shape in _feed_forward(D, config.intermediate_size, config.hidden_act):
            yield f"mlp.{name}", shape
    if config.output_norms:
        yield from _norm(config, "attention_output_norm").items()
        yield from _norm(config, "mlp_output_norm").items()


def _gqa(a: AttentionConfig, D: int) -> Iterator[tuple[str, Shape]]:
    H, G, d = a.num_attention_heads, a.kv_heads, a.head_dim
    for name, heads in (("q", H), ("k", G), ("v", G)):
        yield f"{name}_proj.weight", (heads * d, D)
        if a.attention_bias:
            yield f"{name}_proj.bias", (heads * d,)
    yield "o_proj.weight", (D, H * d)
    if a.output_bias:
        yield "o_proj.bias", (D,)
    if a.qk_norm not in ("none", "unweighted_after_rope"):
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
    if router.select == "hierarchical":
        yield "router.group_weight", (router.n_group, D)
        if router.noisy:
            yield "router.group_noise_weight", (router.n_group, D)
    if router.bias:
        yield "router.e_score_correction_bias", (E,)
    if router.select == "positive":
        yield "router.l1_steps", ()
    if moe.unchosen == "average":
        yield "average_outputs", (E, D)
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


def encoder_decoder_shapes(config: EncoderDecoderConfig) -> dict[str, Shape]:
    """`tensor_shapes` of an encoder-decoder."""
    D, V = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"embed_tokens.weight": (V, D)}
    for name, layers, sparse, extra in (
        ("encoder", config.num_hidden_layers, config.sparse_encoder_layers, config.extra_encoder_networks),
        ("decoder", config.num_decoder_layers, config.sparse_decoder_layers, config.extra_decoder_networks),
    ):
        if name == "decoder" and not config.share_embeddings:
            shapes["decoder.embed_tokens.weight"] = (V, D)
        table = config.relative_attention_num_buckets, config.num_attention_heads
        shapes[f"{name}.relative_attention_bias.weight"] = table
        of_sparse, of_dense = (
            dict(_stack_layer(config, name == "decoder", kind, bool(extra))) for kind in (True, False)
        )
        members = set(sparse)
        for layer in range(layers):
            for tail, shape in (of_sparse if layer in members else of_dense).items():
                shapes[f"{name}.layers.{layer}.{tail}"] = shape
        shapes[f"{name}.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def _stack_layer(config: EncoderDecoderConfig, decoder: bool, sparse: bool, extra: bool) -> Iterator[tuple[str, Shape]]:
    D, wide = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = {"q": (wide, D), "k": (wide, D), "v": (wide, D), "o": (D, wide)}
    yield "input_layernorm.weight", (D,)
    yield from ((f"self_attn.{name}_proj.weight", shape) for name, shape in attention.items())
    if decoder:
        yield "cross_attention_layernorm.weight", (D,)
        yield from ((f"cross_attn.{name}_proj.weight", shape) for name, shape in attention.items())
    yield "post_attention_layernorm.weight", (D,)
    dense = list(_feed_forward(D, config.intermediate_size, config.hidden_act))
    mlp = _moe(config.moe, D) if sparse and config.moe is not None else dense
    yield from ((f"mlp.{name}", shape) for name, shape in mlp)
    if sparse and extra:
        yield "extra_layernorm.weight", (D,)
        yield from ((f"extra_mlp.{name}", shape) for name, shape in dense)
