"""Phi-3.5-MoE (arXiv 2404.14219; its router: GRIN, arXiv 2409.12136): SparseMixer-v2, LayerNorm, biases, LongRoPE.

Source: transformers `models/phimoe`, and the publisher's code where the two part: transformers 5.23 turns long
sequences by the short factors too (it multiplies by `long_mscale`, though), the publisher's by the long ones, as here.
Files have Mixtral's names.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import MIXTRAL_EXPERTS, Family, Json, Layout, pooled_over_experts
from manyhands.families.fields import Fields, decoder_fields, head_fields, written


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=8)
    f.activation()
    width, bias = f.integer("intermediate_size"), f.flag("attention_bias", False)
    _same_length(f)
    router = {
        "num_experts": f.integer("num_local_experts", 16),
        "num_experts_per_tok": f.only("num_experts_per_tok", 2),
        "select": "sparsemixer",
        "norm_topk_prob": False,
        "mixer_epsilon": f.number("router_jitter_noise", 0.01),
    }
    moe = {
        "router": router,
        "moe_intermediate_size": width,
        "input_jitter": f.number("input_jitter_noise", 0.0),
    }
    values = decoder_fields(f, eps=1e-5) | {
        "intermediate_size": width,
        "norm": "layer_norm",
        "lm_head_bias": f.flag("lm_head_bias", False),
        "attention": head_fields(
            f, attention_bias=bias, output_bias=bias, sliding_window=f.integer("sliding_window", None)
        ),
        "rope": f.rope(1e6, longrope=True),
        "moe": moe,
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def _same_length(f: Fields) -> None:
    """The original length stands beside the rotation too; the one inside counts."""
    beside = f.integer("original_max_position_embeddings", None)
    rope = f.section("rope_parameters") or f.section("rope_scaling")
    inside = None if rope is None else rope.values.get("original_max_position_embeddings")
    if None not in (beside, inside) and beside != inside:
        raise f.wrong("original_max_position_embeddings", f"the rotation's own says {inside}")


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    router, rope = config.moe.router, config.rope
    fields = written(config) | {
        "intermediate_size": config.moe.moe_intermediate_size,
        "num_local_experts": router.num_experts,
        "num_experts_per_tok": router.num_experts_per_tok,
        "router_jitter_noise": router.mixer_epsilon,
        "input_jitter_noise": config.moe.input_jitter,
        "attention_bias": config.attention.attention_bias,
        "lm_head_bias": config.lm_head_bias,
        "sliding_window": config.attention.sliding_window,
    }
    if rope.rope_type == "longrope":
        fields["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return fields


PHIMOE = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    published="Phi-3.5-MoE",
    read=read,
    write=write,
    pieces=Layout(MIXTRAL_EXPERTS, {"mlp.router.weight": "block_sparse_moe.gate.weight"}),
    aux_loss_scale=pooled_over_experts,
)
