"""Qwen3-30B-A3B and 235B-A22B (arXiv 2505.09388): RMSNorm of each query and key head, optional renormalisation.

Source: transformers `models/qwen3_moe`.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout, pooled_over_experts
from manyhands.families.fields import Fields, decoder_fields, dense_layers, head_fields, norm_top1, written


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=4, sliding_window=4096)
    f.activation()
    f.ignore("max_window_layers")  # every layer has the window, if there is one
    f.only("use_qk_norm", True)  # these three stand in Qwen3-Coder's files
    f.only("qkv_bias", False)
    f.only("shared_expert_intermediate_size", 0)
    k, norm, bias = f.integer("num_experts_per_tok"), f.flag("norm_topk_prob", False), f.flag("attention_bias", False)
    window = f.integer("sliding_window", None)
    moe = {
        "router": {
            "num_experts": f.integer("num_local_experts" if "num_local_experts" in f.values else "num_experts"),
            "num_experts_per_tok": k,
            "norm_topk_prob": norm,
            "norm_top1": norm_top1(k, norm),
        },
        "moe_intermediate_size": f.integer("moe_intermediate_size"),
        **dense_layers(f),
    }
    values = decoder_fields(f) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(
            f,
            qk_norm="head",
            attention_bias=bias,
            output_bias=bias,
            sliding_window=window if f.flag("use_sliding_window", False) else None,
        ),
        "rope": f.rope(),
        "moe": moe,
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    a, moe = config.attention, config.moe
    return written(config) | {
        "intermediate_size": config.intermediate_size,
        "attention_bias": a.attention_bias,
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.num_experts_per_tok,
        "norm_topk_prob": moe.router.norm_topk_prob,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": config.dense_layers,
        "use_sliding_window": a.sliding_window is not None,
        "sliding_window": a.sliding_window,
    }


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    published="Qwen3-30B-A3B, Qwen3-235B-A22B",
    read=read,
    write=write,
    pieces=Layout(LLAMA_EXPERTS, {"mlp.router.weight": "mlp.gate.weight"}),
    aux_loss_scale=pooled_over_experts,
)
