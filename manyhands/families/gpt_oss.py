"""gpt-oss-20b and 120b (arXiv 2508.10925): sinks, a window in every other layer, biases everywhere, clamped SwiGLU.

Source: transformers `models/gpt_oss`. In files the experts are [E, D, 2F] with gate and up interleaved; ours are
[E, 2F, D] with the gate first. The published weights are MXFP4; `checkpoint/quantized/` reads them as this layout.
"""

from collections.abc import Iterator

from manyhands.config import ModelConfig, parse
from manyhands.config.activation import ACTIVATIONS
from manyhands.families.base import Family, Json, Layout, Piece, pooled_over_experts
from manyhands.families.fields import Fields, decoder_fields, head_fields, norm_top1, written

YARN: Json = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""The rotation where the file has none."""
_SWIGLU = ACTIVATIONS["swiglu_oai"]


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=8, head_dim=64, sliding_window=128)
    if f.values.get("rope_parameters") is None and not f.values.get("rope_scaling"):
        f.values["rope_parameters"] = YARN
    f.activation()
    f.only("swiglu_limit", _SWIGLU.limit)
    f.only("swiglu_alpha", _SWIGLU.alpha)
    f.ignore("experts_per_token")  # an older name of num_experts_per_tok, beside it
    k, width, layers = f.integer("num_experts_per_tok"), f.integer("intermediate_size"), f.integer("num_hidden_layers")
    types = f.layers("layer_types", layers)
    if types is None:
        types = [("sliding" if i % 2 == 0 else "full") + "_attention" for i in range(min(max(layers, 0), 4096))]
    bias, window = f.flag("attention_bias", True), f.integer("sliding_window", None)
    router = {
        "num_experts": f.integer("num_local_experts"),
        "num_experts_per_tok": k,
        "norm_top1": norm_top1(k),
        "logit_bias": True,
    }
    values = decoder_fields(f, eps=1e-5) | {
        "intermediate_size": width,
        "hidden_act": "swiglu_oai",
        "attention": head_fields(
            f,
            attention_bias=bias,
            output_bias=bias,
            sinks=True,
            sliding_window=window,
            layer_types=None if window is None else types,
        ),
        "rope": f.rope(150_000.0),
        "moe": {"router": router, "moe_intermediate_size": width, "hidden_act": "swiglu_oai", "expert_bias": True},
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    a = config.attention
    return written(config) | {
        "intermediate_size": config.moe.moe_intermediate_size,
        "num_local_experts": config.moe.router.num_experts,
        "num_experts_per_tok": config.moe.router.num_experts_per_tok,
        "attention_bias": a.attention_bias,
        "sliding_window": a.sliding_window,
        "layer_types": config.layer_types,
        "swiglu_limit": _SWIGLU.limit,
        "swiglu_alpha": _SWIGLU.alpha,
    }


def _experts(tail: str, where: str, config: ModelConfig) -> Iterator[Piece]:
    assert config.moe is not None
    width = config.moe.moe_intermediate_size
    every = slice(None)
    gate, up = (every, slice(0, width)), (every, slice(width, 2 * width))
    name = where + tail
    if tail == "mlp.experts.gate_up_proj":
        yield Piece("", name, gate, (every, every, slice(0, None, 2)), transpose=True)
        yield Piece("", name, up, (every, every, slice(1, None, 2)), transpose=True)
    elif tail == "mlp.experts.gate_up_proj_bias":
        yield Piece("", name, gate, (every, slice(0, None, 2)))
        yield Piece("", name, up, (every, slice(1, None, 2)))
    else:
        yield Piece("", name, transpose=tail == "mlp.experts.down_proj")


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    published="gpt-oss-20b, gpt-oss-120b",
    read=read,
    write=write,
    pieces=Layout(_experts),
    aux_loss_scale=pooled_over_experts,
)
