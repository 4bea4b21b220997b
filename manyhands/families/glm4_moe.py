"""GLM-4.5, 4.6, 4.7 (arXiv 2508.06471): DeepSeek-V3's router, half of each head rotated, QK-norm in the large ones.

Source: transformers `models/glm4_moe`. The MTP module is kept on a round trip and not computed with.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout
from manyhands.families.deepseek import RENAME, dense_first, dense_first_fields
from manyhands.families.deepseek_v3 import MTP_FIELDS, mtp_layers
from manyhands.families.fields import Fields, decoder_fields, head_fields, norm_top1, written


def read(f: Fields) -> ModelConfig:
    f.activation()
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    for name in MTP_FIELDS:
        f.integer(name, 0)
    k, norm = f.integer("num_experts_per_tok"), f.flag("norm_topk_prob", True)
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
    f.values.setdefault("partial_rotary_factor", 0.5)
    values = decoder_fields(f, eps=1e-5) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(
            f,
            qk_norm="head" if f.flag("use_qk_norm", False) else "none",
            attention_bias=f.flag("attention_bias", False),
        ),
        "rope": f.rope(),
        "moe": moe,
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    a, moe, router = config.attention, config.moe, config.moe.router
    fields = written(config)
    fields["rope_parameters"]["partial_rotary_factor"] = config.rope.partial_rotary_factor
    return fields | {
        "intermediate_size": config.intermediate_size,
        "attention_bias": a.attention_bias,
        "use_qk_norm": a.qk_norm == "head",
        "n_routed_experts": router.num_experts,
        "num_experts_per_tok": router.num_experts_per_tok,
        "norm_topk_prob": router.norm_topk_prob,
        "routed_scaling_factor": router.routed_scaling_factor,
        "n_group": router.n_group,
        "topk_group": router.topk_group,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "n_shared_experts": moe.shared_width // moe.moe_intermediate_size,
        **dense_first_fields(config),
        "num_nextn_predict_layers": 0,
    }


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    published="GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
    read=read,
    write=write,
    pieces=Layout(LLAMA_EXPERTS, RENAME),
    kept=mtp_layers,
    kept_fields=MTP_FIELDS,
)
