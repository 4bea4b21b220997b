"""T5 and its 1.1 (arXiv 1910.10683, 2002.05202): an encoder-decoder without experts.

Source: transformers 5.23 `models/t5`. `gated-gelu` is the tanh form (`gelu_new`). Since transformers 5 a saved 1.1 says
`tie_word_embeddings: true` and `scale_decoder_outputs: false`, and whether head and embedding are one table is decided
by whether the file has `lm_head.weight`; before, `tie_word_embeddings: false` said both. Either is read; what is
written says it both ways.
"""

from collections.abc import Iterator, Mapping

from manyhands.config import EncoderDecoderConfig, parse
from manyhands.config.activation import Activation
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import ConfigError
from manyhands.families.base import Family, Json, Piece
from manyhands.families.fields import Fields

_FEED_FORWARD: dict[str, tuple[Activation, str, bool]] = {
    "relu": ("relu", "relu", False),
    "gelu": ("gelu", "gelu", False),
    "gated-gelu": ("geglu_tanh", "gelu_new", True),
    "gated-gelu_new": ("geglu_tanh", "gelu_new", True),
    "gated-silu": ("swiglu", "silu", True),
}
"""`feed_forward_proj` -> ours, and the two fields that transformers derives from it."""
TOKEN_IDS: Json = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
"""What every T5 has, where no tokenizer says otherwise."""
_WITHIN = {
    "input_layernorm.weight": "layer.0.layer_norm.weight",
    "cross_attention_layernorm.weight": "layer.1.layer_norm.weight",
    **{f"self_attn.{n}_proj.weight": f"layer.0.SelfAttention.{n}.weight" for n in "qkvo"},
    **{f"cross_attn.{n}_proj.weight": f"layer.1.EncDecAttention.{n}.weight" for n in "qkvo"},
}
"""Names within a layer -> within a block; the sublayer of the feed-forward network depends on the stack."""


def stack_fields(f: Fields) -> Json:
    """The fields that T5 and its descendants share, as `EncoderDecoderConfig` wants them."""
    layers = f.integer("num_layers")
    f.ignore("dropout_rate", "n_positions")  # training's; what a tokenizer cuts at
    return {
        "vocab_size": f.integer("vocab_size"),
        "hidden_size": f.integer("d_model"),
        "head_dim": f.integer("d_kv"),
        "intermediate_size": f.integer("d_ff"),
        "num_hidden_layers": layers,
        "num_decoder_layers": f.integer("num_decoder_layers", layers),
        "num_attention_heads": f.integer("num_heads"),
        "relative_attention_num_buckets": f.integer("relative_attention_num_buckets", 32),
        "relative_attention_max_distance": f.integer("relative_attention_max_distance", 128),
        "rms_norm_eps": f.number("layer_norm_epsilon", 1e-6),
        "initializer_factor": f.number("initializer_factor", 1.0),
    }


def written_stack(config: EncoderDecoderConfig) -> Json:
    """The same fields as `config.json` has them."""
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_attention_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": config.rms_norm_eps,
        "initializer_factor": config.initializer_factor,
        "tie_word_embeddings": config.tie_word_embeddings,
        "is_encoder_decoder": True,
    }


def read(f: Fields) -> EncoderDecoderConfig:
    values = stack_fields(f)
    name = f.only("feed_forward_proj", *_FEED_FORWARD)
    values["hidden_act"], dense_act, gated = _FEED_FORWARD[name]
    f.only("dense_act_fn", dense_act)
    f.only("is_gated_act", gated)
    tied = f.flag("tie_word_embeddings", True)
    values["tie_word_embeddings"] = f.flag("scale_decoder_outputs", tied)
    if values["tie_word_embeddings"] and not tied:
        raise f.wrong("scale_decoder_outputs", "an untied head takes the states as they are", True)
    f.close()
    return parse(EncoderDecoderConfig, values, f.where)


def write(config: EncoderDecoderConfig) -> Json:
    names = {ours: name for name, (ours, _, _) in reversed(_FEED_FORWARD.items())}
    if config.hidden_act not in names:
        raise ConfigError(f"this model does not fit t5: hidden_act = {config.hidden_act!r} has no name there")
    if not config.share_embeddings:
        raise ConfigError("this model does not fit t5: share_embeddings = false here, true there")
    fields = {"feed_forward_proj": names[config.hidden_act], "scale_decoder_outputs": config.tie_word_embeddings}
    return written_stack(config) | fields


def within_stack(name: str, mlp: Mapping[str, str]) -> str:
    """Their name for ours of a stack, `decoder.layers.3.self_attn.q_proj.weight`; `mlp` has the network's names."""
    stack, rest = name.split(".", 1)
    if rest == "norm.weight":
        return f"{stack}.final_layer_norm.weight"
    if rest == "relative_attention_bias.weight":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    layer, tail = rest.split(".", 2)[1:]
    block, sublayer = f"{stack}.block.{layer}", "layer.1" if stack == "encoder" else "layer.2"
    if tail in _WITHIN:
        return f"{block}.{_WITHIN[tail]}"
    if tail == "post_attention_layernorm.weight":
        return f"{block}.{sublayer}.layer_norm.weight"
    return f"{block}.{sublayer}.{mlp[tail]}"


_PLAIN = {"mlp.up_proj.weight": "DenseReluDense.wi.weight", "mlp.down_proj.weight": "DenseReluDense.wo.weight"}
_GATED = _PLAIN | {
    "mlp.gate_proj.weight": "DenseReluDense.wi_0.weight",
    "mlp.up_proj.weight": "DenseReluDense.wi_1.weight",
}


def pieces(config: EncoderDecoderConfig) -> Iterator[Piece]:
    """Every tensor, in the order of the model."""
    mlp = _GATED if config.hidden_act in ("geglu_tanh", "swiglu") else _PLAIN
    for ours in tensor_shapes(config):
        if ours == "embed_tokens.weight":
            yield Piece(ours, "shared.weight")
        elif ours == "lm_head.weight":
            yield Piece(ours, ours, otherwise="shared.weight")
        else:
            yield Piece(ours, within_stack(ours, mlp))


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    published="T5, T5 1.1, Flan-T5",
    read=read,
    write=write,
    pieces=pieces,
    kinds=("encoder_decoder",),
    dense=True,
    copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
    token_ids=TOKEN_IDS,
)
