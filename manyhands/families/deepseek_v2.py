"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): latent attention; groups scored by their best expert.

Source: transformers `models/deepseek_v2`. Adjacent pairs are rotated. The norms inside latent attention
have ε = 1e-6 whatever `rms_norm_eps` says.
"""

from typing import Any

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout
from manyhands.families.deepseek import RENAME, dense_first, dense_first_fields
from manyhands.families.fields import Fields, decoder_fields, written


def latent_attention(f: Fields) -> dict[str, Any]:
    """The fields of multi-head latent attention."""
    heads = f.integer("num_attention_heads")
    if f.integer("num_key_value_heads", heads) != heads:
        raise f.wrong("num_key_value_heads", f"latent attention has as many as num_attention_heads = {heads}")
    f.ignore("head_dim", "qk_head_dim")  # derived, and written by transformers
    return {
        "kind": "mla",
        "num_attention_heads": heads,
        "attention_bias": f.flag("attention_bias", False),
        "q_lora_rank": f.integer("q_lora_rank", None),
        "latent_norm_eps": 1e-6,
        **{n: f.integer(n) for n in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    }


def latent_attention_fields(config: ModelConfig) -> Json:
    """The same as fields."""
    a = config.attention
    names = ("attention_bias", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {name: getattr(a, name) for name in names}


def read(f: Fields) -> ModelConfig:
    f.absent(q_lora_rank=1536, n_shared_experts=2)
    f.activation()
    f.only("scoring_func", "softmax")
    f.only("mlp_bias", False)
    f.only("norm_topk_prob", False)  # true means different things in DeepSeek's own code and in transformers
    grouped = f.only("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    groups, kept = f.integer("n_group", 1), f.integer("topk_group", 1)
    router = {
        "num_experts": f.integer("n_routed_experts"),
        "num_experts_per_tok": f.integer("num_experts_per_tok"),
        "norm_topk_prob": False,
        "routed_scaling_factor": f.number("routed_scaling_factor", 1.0),
        "n_group": groups if grouped else 1,
        "topk_group": kept if grouped else 1,
        "group_score": "max",
    }
    moe = {
        "router": router,
        "moe_intermediate_size": f.integer("moe_intermediate_size"),
        "n_shared_experts": f.integer("n_shared_experts", 0),
        "first_k_dense_replace": dense_first(f),
    }
    values = decoder_fields(f) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": latent_attention(f),
        "rope": f.rope(interleave=True),
        "moe": moe,
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    moe, router = config.moe, config.moe.router
    return written(config, head_dim=False) | {
        "intermediate_size": config.intermediate_size,
        **latent_attention_fields(config),
        "n_routed_experts": router.num_experts,
        "num_experts_per_tok": router.num_experts_per_tok,
        "norm_topk_prob": False,
        "routed_scaling_factor": router.routed_scaling_factor,
        "topk_method": "greedy" if router.n_group == 1 else "group_limited_greedy",
        "n_group": router.n_group,
        "topk_group": router.topk_group,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "n_shared_experts": moe.shared_width // moe.moe_intermediate_size,
        **dense_first_fields(config),
    }


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    published="DeepSeek-V2, V2-Lite",
    read=read,
    write=write,
    pieces=Layout(LLAMA_EXPERTS, RENAME),
)
