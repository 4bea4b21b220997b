"""GLM-4.5, 4.6, 4.7 (arXiv 2508.06471): DeepSeek-V3's router, half of each head rotated, QK-norm in the large ones.

Source: transformers `models/glm4_moe`. The MTP module is kept on a round trip and not computed with.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout
from manyhands.families.deepseek import RENAME
from manyhands.families.deepseek_v3 import MTP_FIELDS, biased_sigmoid, biased_sigmoid_fields, mtp_layers
from manyhands.families.fields import Fields, decoder_fields, head_fields, written


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=8, n_shared_experts=1, first_k_dense_replace=1, partial_rotary_factor=0.5)
    f.activation()
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    for name in MTP_FIELDS:
        f.integer(name, 0)
    values = decoder_fields(f, eps=1e-5) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(
            f,
            qk_norm="head" if f.flag("use_qk_norm", False) else "none",
            attention_bias=f.flag("attention_bias", False),
        ),
        "rope": f.rope(partial=True),
        "moe": biased_sigmoid(f, renormalised=True),
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    a = config.attention
    fields = written(config)
    fields["rope_parameters"]["partial_rotary_factor"] = config.rope.partial_rotary_factor
    return fields | {
        "partial_rotary_factor": config.rope.partial_rotary_factor,  # again, for llama.cpp and mlx-lm
        "intermediate_size": config.intermediate_size,
        "attention_bias": a.attention_bias,
        "use_qk_norm": a.qk_norm == "head",
        **biased_sigmoid_fields(config),
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
