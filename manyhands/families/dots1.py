"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's router on grouped-query attention with QK-norm.

Source: transformers `models/dots1`.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout
from manyhands.families.deepseek import RENAME, dense_first, dense_first_fields
from manyhands.families.fields import Fields, decoder_fields, head_fields, norm_top1, windows, written


def read(f: Fields) -> ModelConfig:
    f.activation()
    f.only("scoring_func", "noaux_tc", "sigmoid")
    f.only("topk_method", "noaux_tc")
    f.only("use_sliding_window", False, True)  # `sliding_window` and `max_window_layers` say it
    k, norm, bias = f.integer("num_experts_per_tok"), f.flag("norm_topk_prob", False), f.flag("attention_bias", False)
    router = {
        "num_experts": f.integer("n_routed_experts"),
        "num_experts_per_tok": k,
        "score": "sigmoid",
        "bias": True,
        "norm_topk_prob": norm,
        "norm_top1": norm_top1(k, norm),
        "routed_scaling_factor": f.number("routed_scaling_factor", 1.0),
        "n_group": f.integer("n_group", 1),
        "topk_group": f.integer("topk_group", 1),
    }
    moe = {
        "router": router,
        "moe_intermediate_size": f.integer("moe_intermediate_size"),
        "n_shared_experts": f.integer("n_shared_experts", 0),
        "first_k_dense_replace": dense_first(f),
    }
    values = decoder_fields(f) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(f, qk_norm="head", attention_bias=bias, output_bias=bias, **windows(f, flag=False)),
        "rope": f.rope(),
        "moe": moe,
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    a, moe, router = config.attention, config.moe, config.moe.router
    return written(config) | {
        "intermediate_size": config.intermediate_size,
        "attention_bias": a.attention_bias,
        "sliding_window": a.sliding_window,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": config.layer_types,
        "n_routed_experts": router.num_experts,
        "num_experts_per_tok": router.num_experts_per_tok,
        "norm_topk_prob": router.norm_topk_prob,
        "routed_scaling_factor": router.routed_scaling_factor,
        "n_group": router.n_group,
        "topk_group": router.topk_group,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "n_shared_experts": moe.shared_width // moe.moe_intermediate_size,
        **dense_first_fields(config),
    }


DOTS1 = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    published="dots.llm1",
    read=read,
    write=write,
    pieces=Layout(LLAMA_EXPERTS, RENAME),
)
