"""DeepSeek-V3, R1 (arXiv 2412.19437): sigmoid scores, a selection bias, groups scored by their two best, YaRN, FP8.

Source: transformers `models/deepseek_v3` and deepseek-ai/DeepSeek-V3 `inference/model.py`. The multi-token-prediction
module is stored as one more layer, which this model does not compute with; a round trip keeps it. The published
weights are FP8 in blocks of 128 × 128 (`checkpoint/quantized/`).
"""

from typing import Any

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout
from manyhands.families.deepseek import RENAME, dense_first, dense_first_fields
from manyhands.families.deepseek_v2 import latent_attention, latent_attention_fields
from manyhands.families.fields import Fields, decoder_fields, norm_top1, written


def biased_sigmoid(f: Fields, *, renormalised: bool) -> dict[str, Any]:
    """The mixture of V3 and of those that took it over: sigmoid scores, a selection bias, groups, dense first layers.

    `renormalised` is what `norm_topk_prob` means where it is left out.
    """
    k, norm = f.integer("num_experts_per_tok"), f.flag("norm_topk_prob", renormalised)
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
    return {
        "router": router,
        "moe_intermediate_size": f.integer("moe_intermediate_size"),
        "n_shared_experts": f.integer("n_shared_experts", 0),
        "first_k_dense_replace": dense_first(f),
    }


def biased_sigmoid_fields(config: ModelConfig) -> Json:
    """The same as fields."""
    assert config.moe is not None
    moe, router = config.moe, config.moe.router
    return {
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


def read(f: Fields) -> ModelConfig:
    f.absent(q_lora_rank=1536, n_shared_experts=1, first_k_dense_replace=3, num_key_value_heads=128)
    f.absent(n_group=8, topk_group=4, routed_scaling_factor=2.5)
    f.activation()
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    for name in MTP_FIELDS:
        f.integer(name, 0)
    values = decoder_fields(f) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": latent_attention(f),
        "rope": f.rope(interleave=f.flag("rope_interleave", True)),
        "moe": biased_sigmoid(f, renormalised=True),
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    return written(config, head_dim=False) | {
        "intermediate_size": config.intermediate_size,
        **latent_attention_fields(config),
        "rope_interleave": config.rope.interleave,
        **biased_sigmoid_fields(config),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers")


def mtp_layers(fields: Json) -> tuple[str, ...]:
    """The multi-token-prediction modules: layers after the last."""
    count = fields.get("num_nextn_predict_layers", fields.get("num_mtp_layers", 0)) or 0
    first = fields["num_hidden_layers"]
    return tuple(f"model.layers.{first + n}." for n in range(min(count, 64)))


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    published="DeepSeek-V3, V3.1, R1",
    read=read,
    write=write,
    pieces=Layout(LLAMA_EXPERTS, RENAME),
    kept=mtp_layers,
    kept_fields=MTP_FIELDS,
)
