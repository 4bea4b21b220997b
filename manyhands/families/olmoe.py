"""OLMoE-1B-7B (arXiv 2409.02060): RMSNorm over the full width of queries and keys, weights not renormalised.

Source: transformers `models/olmoe`. `intermediate_size` is the width of one expert.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout, pooled_over_experts
from manyhands.families.fields import Fields, decoder_fields, head_fields, norm_top1, written


def read(f: Fields) -> ModelConfig:
    f.activation()
    f.only("clip_qkv", None)
    k, norm, bias = f.integer("num_experts_per_tok"), f.flag("norm_topk_prob", False), f.flag("attention_bias", False)
    width = f.integer("intermediate_size")
    router = {
        "num_experts": f.integer("num_experts"),
        "num_experts_per_tok": k,
        "norm_topk_prob": norm,
        "norm_top1": norm_top1(k, norm),
    }
    values = decoder_fields(f, eps=1e-5) | {
        "intermediate_size": width,
        "attention": head_fields(f, head_dim=False, qk_norm="full", attention_bias=bias, output_bias=bias),
        "rope": f.rope(),
        "moe": {"router": router, "moe_intermediate_size": width},
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    router = config.moe.router
    return written(config, head_dim=False) | {
        "intermediate_size": config.moe.moe_intermediate_size,
        "attention_bias": config.attention.attention_bias,
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.num_experts_per_tok,
        "norm_topk_prob": router.norm_topk_prob,
    }


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    published="OLMoE-1B-7B",
    read=read,
    write=write,
    pieces=Layout(LLAMA_EXPERTS, {"mlp.router.weight": "mlp.gate.weight"}),
    aux_loss_scale=pooled_over_experts,
)
