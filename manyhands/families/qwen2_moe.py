"""Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B: biased queries, keys and values, and a shared expert behind a sigmoid gate.

Source: transformers `models/qwen2_moe`. The name `shared_expert` is singular and its width is a field of its own.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout, pooled_over_experts
from manyhands.families.fields import Fields, decoder_fields, dense_layers, head_fields, norm_top1, windows, written


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=16, sliding_window=4096, max_window_layers=28)
    f.activation()
    k, norm = f.integer("num_experts_per_tok"), f.flag("norm_topk_prob", False)
    moe = {
        "router": {
            "num_experts": f.integer("num_experts"),
            "num_experts_per_tok": k,
            "norm_topk_prob": norm,
            "norm_top1": norm_top1(k, norm),
        },
        "moe_intermediate_size": f.integer("moe_intermediate_size"),
        "n_shared_experts": 1,
        "shared_expert_intermediate_size": f.integer("shared_expert_intermediate_size"),
        "shared_expert_gate": True,
        **dense_layers(f),
    }
    values = decoder_fields(f) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(f, attention_bias=f.flag("qkv_bias", True), **windows(f, late=False)),
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
        "qkv_bias": a.attention_bias,
        "num_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.num_experts_per_tok,
        "norm_topk_prob": moe.router.norm_topk_prob,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "shared_expert_intermediate_size": moe.shared_width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": config.dense_layers,
        "use_sliding_window": a.sliding_window is not None,
        "sliding_window": a.sliding_window,
        "layer_types": config.layer_types,
    }


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    published="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    read=read,
    write=write,
    pieces=Layout(
        LLAMA_EXPERTS,
        {"mlp.router.weight": "mlp.gate.weight", "mlp.shared_experts.": "mlp.shared_expert."},
    ),
    aux_loss_scale=pooled_over_experts,
)
