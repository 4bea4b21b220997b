"""Mixtral 8x7B, 8x22B (arXiv 2401.04088): softmax over the two chosen logits, that is over all and renormalised.

transformers 5 renames `block_sparse_moe` in memory only; files keep the old names.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import MIXTRAL_EXPERTS, Family, Json, Layout, pooled_over_experts
from manyhands.families.fields import Fields, decoder_fields, head_fields, norm_top1, written


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=8)
    f.activation()
    k, width = f.integer("num_experts_per_tok"), f.integer("intermediate_size")
    router = {"num_experts": f.integer("num_local_experts"), "num_experts_per_tok": k, "norm_top1": norm_top1(k)}
    values = decoder_fields(f, eps=1e-5) | {
        "intermediate_size": width,
        "attention": head_fields(f, sliding_window=f.integer("sliding_window", None)),
        "rope": f.rope(1e6),
        "moe": {"router": router, "moe_intermediate_size": width},
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    return written(config) | {
        "intermediate_size": config.moe.moe_intermediate_size,
        "num_local_experts": config.moe.router.num_experts,
        "num_experts_per_tok": config.moe.router.num_experts_per_tok,
        "sliding_window": config.attention.sliding_window,
    }


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    published="Mixtral 8x7B, 8x22B",
    read=read,
    write=write,
    pieces=Layout(MIXTRAL_EXPERTS, {"mlp.router.weight": "block_sparse_moe.gate.weight"}),
    aux_loss_scale=pooled_over_experts,
)
