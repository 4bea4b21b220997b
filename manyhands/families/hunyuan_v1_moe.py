"""Hunyuan-A13B: renormalised softmax, one shared network, QK-norm after the rotation, a fixed "NTK alpha" base.

Source: transformers `models/hunyuan_v1_moe`. Lists with one entry per layer are read when all entries agree.
"""

from typing import Any

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout
from manyhands.families.fields import MISSING, Fields, decoder_fields, head_fields, norm_top1, written


def _same(f: Fields, name: str, default: Any = MISSING) -> int:
    """A number, or a list of equal numbers, one per layer."""
    value = f.take(name, default)
    if isinstance(value, list):
        if any(type(v) is not int or v != value[0] for v in value) or not value:
            raise f.wrong(name, "only the same number in every layer is supported")
        f.values[name] = value[0]
    return int(f.integer(name, default))


_ONLY: dict[str, Any] = {
    "use_qk_norm": True,
    "use_cla": False,
    "use_mla": False,
    "mlp_bias": False,
    "norm_topk_prob": True,
    "moe_layer_num_skipped": 0,
    "use_mixed_mlp_moe": True,
    "use_rotary_pos_emb": True,
    "position_embedding_xdrope": False,
    "norm_type": "rms",
    "group_limited_greedy": False,
    "routed_scaling_factor": 1.0,
    "add_classification_head": False,
    "moe_drop_tokens": False,
    "moe_random_routing_dropped_token": False,
}
_UNUSED = (
    "cla_share_factor", "class_num", "dense_list", "pool_type", "n_group", "topk_group", "org_vocab_size", "pad_id",
    "mask_init_id", "im_start_id", "im_end_id", "im_newline_id", "image_token_id", "text_start_id", "text_end_id",
    "video_start_id", "video_end_id", "num_media_embeds",
)  # fmt: skip
"""Of the publisher's other models, which the same file describes; without effect given what `_ONLY` requires."""


def read(f: Fields) -> ModelConfig:
    f.activation()
    for name, value in _ONLY.items():
        f.only(name, value)
    f.ignore(*_UNUSED)
    f.only("num_shared_expert", 1, [1] * max(0, min(4096, f.integer("num_hidden_layers"))))
    k, width, bias = _same(f, "moe_topk"), f.integer("intermediate_size"), f.flag("attention_bias", False)
    if _same(f, "moe_intermediate_size", width) != width:
        raise f.wrong("moe_intermediate_size", f"only intermediate_size = {width} is supported")
    router = {"num_experts": _same(f, "num_experts"), "num_experts_per_tok": k, "norm_top1": norm_top1(k)}
    head_dim = f.integer("attention_head_dim", None)
    if head_dim is not None:
        f.values.setdefault("head_dim", head_dim)
    attention = head_fields(f, qk_norm="head_after_rope", attention_bias=bias, output_bias=bias)
    _fixed_alpha(f, attention["head_dim"])
    values = decoder_fields(f, eps=1e-5) | {
        "intermediate_size": width,
        "attention": attention,
        "rope": f.rope(),
        "moe": {
            "router": router,
            "moe_intermediate_size": width,
            "n_shared_experts": 1,
        },
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def _fixed_alpha(f: Fields, head_dim: int) -> None:
    """`dynamic` with an `alpha` is a larger base once and for all: θ·α^(d/(d−2))."""
    for name in ("rope_parameters", "rope_scaling"):
        scaling = f.section(name)
        if scaling is None:
            continue
        kind = scaling.take("rope_type", None) or scaling.take("type", None)
        if kind != "dynamic":
            continue
        alpha = scaling.number("alpha", 0.0)
        theta = scaling.number("rope_theta", None) or f.number("rope_theta", 10_000.0)
        if not alpha or head_dim <= 2:
            raise scaling.wrong("alpha", "'dynamic' is supported with an alpha only")
        scaling.ignore("type", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # unused
        scaling.close()
        f.values[name] = None
        f.values["rope_theta"] = theta * alpha ** (head_dim / (head_dim - 2))


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    return written(config) | {
        "intermediate_size": config.moe.moe_intermediate_size,
        "attention_bias": config.attention.attention_bias,
        "num_experts": config.moe.router.num_experts,
        "moe_topk": config.moe.router.num_experts_per_tok,
    }


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    published="Hunyuan-A13B",
    read=read,
    write=write,
    pieces=Layout(
        LLAMA_EXPERTS,
        {
            "self_attn.q_norm.": "self_attn.query_layernorm.",
            "self_attn.k_norm.": "self_attn.key_layernorm.",
            "mlp.router.weight": "mlp.gate.wg.weight",
            "mlp.shared_experts.": "mlp.shared_mlp.",
        },
    ),
)
