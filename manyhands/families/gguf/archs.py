"""GGUF's architectures and ours: which key is which field of `config.json`, and what llama.cpp's code fixes.

A key stands in the file as `ARCH.KEY`. `keys` and `COMMON` are read both ways; what is not one number for one number
(rotation, latent attention, which layers are dense) is in `fields.py`. `fixed` is what llama.cpp does whatever the file
says: a model that needs anything else cannot be written in that architecture.

Source: `src/models/*.cpp` and `conversion/*.py` of llama.cpp, August 2026.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMMON = {
    "embedding_length": "hidden_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
}
"""Of every architecture. `block_count` is `num_hidden_layers` (and the MTP layers, where there are any)."""


@dataclass(frozen=True, slots=True)
class Arch:
    """One family in GGUF."""

    name: str
    """`general.architecture`."""
    model_type: str
    """The family, by its name in `config.json`."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Beside `COMMON`: key -> field of `config.json`."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Field of `config.json` -> the value that llama.cpp's code has."""
    gating: str = "softmax"
    """What the router's scores are, if the file does not say it (`expert_gating_func`)."""
    gating_required: bool = False
    """llama.cpp stops if the file does not say it."""
    permuted: bool = False
    """Rows of queries and keys are stored in pairs to be rotated: [h, d/2, 2] for our [h, 2, d/2]."""
    mla: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Our name in a layer, without its ending, -> GGUF's, where it is not the usual one."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key -> what it may be, for keys that change nothing then."""
    scales: bool = False
    """Weights are multiplied by `expert_weights_scale` and renormalised if `expert_weights_norm` is true."""

    @property
    def dense(self) -> bool:
        """It has no experts."""
        return self.model_type in ("llama", "qwen3")


_SCALED = {"expert_weights_scale": "routed_scaling_factor", "expert_weights_norm": "norm_topk_prob"}
_DEEPSEEK = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
}
_GROUPS = {"expert_group_count": "n_group", "expert_group_used_count": "topk_group"}
_LATENT = {"attention.kv_lora_rank": "kv_lora_rank", "attention.q_lora_rank": "q_lora_rank"}
_MLP_NORM_AFTER_ATTENTION = {"post_attention_layernorm": "post_attention_norm"}
_NO_SCALE = {"expert_weights_scale": (1.0, 0.0)}

ARCHS: dict[str, Arch] = {
    arch.model_type: arch
    for arch in (
        Arch("llama", "llama", permuted=True),
        Arch("qwen3", "qwen3"),
        Arch(
            "llama",
            "mixtral",
            {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
            permuted=True,
            only=_NO_SCALE,
        ),
        Arch("deepseek", "deepseek", _DEEPSEEK, {"norm_topk_prob": False}, permuted=True, only=_NO_SCALE),
        Arch(
            "deepseek2",
            "deepseek_v2",
            _DEEPSEEK | _SCALED | _GROUPS | _LATENT,
            {"group_score": "top2_sum"},
            mla=True,
            scales=True,
        ),
        Arch(
            "deepseek2", "deepseek_v3", _DEEPSEEK | _SCALED | _GROUPS | _LATENT, gating="sigmoid", mla=True, scales=True
        ),
        Arch(
            "qwen2moe",
            "qwen2_moe",
            {
                "expert_count": "num_experts",
                "expert_used_count": "num_experts_per_tok",
                "expert_feed_forward_length": "moe_intermediate_size",
                "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
            },
            {"norm_topk_prob": False},
            only=_NO_SCALE,
        ),
        Arch(
            "qwen3moe",
            "qwen3_moe",
            {
                "expert_count": "num_experts",
                "expert_used_count": "num_experts_per_tok",
                "expert_feed_forward_length": "moe_intermediate_size",
            },
            {"norm_topk_prob": True},
            only=_NO_SCALE | {"expert_shared_feed_forward_length": (0,)},
        ),
        Arch(
            "olmoe",
            "olmoe",
            {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
            {"norm_topk_prob": False},
            only=_NO_SCALE,
        ),
        Arch(
            "gpt-oss",
            "gpt_oss",
            {
                "expert_count": "num_local_experts",
                "expert_used_count": "num_experts_per_tok",
                "expert_feed_forward_length": "intermediate_size",
                "attention.sliding_window": "sliding_window",
            },
            gating="softmax over the chosen",
            renamed=_MLP_NORM_AFTER_ATTENTION,
            only=_NO_SCALE | {"attention.sliding_window_pattern": (2,)},
        ),
        Arch(
            "glm4moe",
            "glm4_moe",
            _DEEPSEEK | _SCALED | _GROUPS,
            gating="sigmoid",
            renamed=_MLP_NORM_AFTER_ATTENTION,
            scales=True,
        ),
        Arch("dots1", "dots1", _DEEPSEEK | _SCALED | _GROUPS, gating="sigmoid", gating_required=True, scales=True),
        Arch(
            "granitemoe",
            "granitemoe",
            {
                "expert_count": "num_local_experts",
                "expert_used_count": "num_experts_per_tok",
                "attention.scale": "attention_multiplier",
                "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling",
            },
            permuted=True,
            only=_NO_SCALE,
        ),
        Arch(
            "ernie4_5-moe",
            "ernie4_5_moe",
            {
                "expert_count": "moe_num_experts",
                "expert_used_count": "moe_k",
                "expert_feed_forward_length": "moe_intermediate_size",
                "expert_shared_count": "moe_num_shared_experts",
                "leading_dense_block_count": "moe_layer_start_index",
                "interleave_moe_layer_step": "moe_layer_interval",
            },
            only=_NO_SCALE,
        ),
        Arch(
            "hunyuan-moe",
            "hunyuan_v1_moe",
            {
                "expert_count": "num_experts",
                "expert_used_count": "moe_topk",
                "expert_feed_forward_length": "moe_intermediate_size",
                "expert_shared_count": "num_shared_expert",
            },
            only=_NO_SCALE,
        ),
        Arch(
            "minimax-m2",
            "minimax_m2",
            {
                "expert_count": "num_local_experts",
                "expert_used_count": "num_experts_per_tok",
                "expert_feed_forward_length": "intermediate_size",
                "rope.dimension_count": "rotary_dim",
            },
            gating="sigmoid",
            gating_required=True,
            only=_NO_SCALE,
        ),
        Arch(
            "grok",
            "grok-1",
            {
                "expert_count": "num_experts",
                "expert_used_count": "num_experts_per_tok",
                "embedding_scale": "embedding_multiplier_scale",
                "logit_scale": "output_multiplier_scale",
                "attention.output_scale": "attn_output_multiplier",
                "attn_logit_softcapping": "max_attn_value",
            },
            {"hidden_act": "gelu"},
            only=_NO_SCALE | {"final_logit_softcapping": (0.0,), "router_logit_softcapping": (30.0, 0.0)},
        ),
    )
}
"""By `model_type`. Kimi K2 is `deepseek_v3` here, as it is in GGUF."""
GATINGS = {1: "softmax", 2: "sigmoid", 3: "softmax over the chosen", 4: "square root of softplus"}
"""`expert_gating_func`."""
