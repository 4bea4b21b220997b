"""DeepSeekMoE-16B (arXiv 2401.06066): Llama's attention, many narrow experts, shared experts, a dense first layer.

Source: `modeling_deepseek.py` in deepseek-ai/deepseek-moe-16b-base; transformers has no class for it. With
`norm_topk_prob` it divides by the sum + 1e-20, and leaves a single expert's gate as it is.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout
from manyhands.families.fields import Fields, decoder_fields, head_fields, written

RENAME = {
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
}


def dense_first(f: Fields) -> int:
    """`first_k_dense_replace`, which all DeepSeeks have; every later layer is sparse."""
    f.only("moe_layer_freq", 1)
    return int(f.integer("first_k_dense_replace", 0))


def dense_first_fields(config: ModelConfig) -> Json:
    """The same as fields; the layers before the first sparse one are the dense ones."""
    return {"first_k_dense_replace": min(config.sparse_layers), "moe_layer_freq": 1}


def read(f: Fields) -> ModelConfig:
    f.activation()
    f.only("scoring_func", "softmax")
    bias = f.flag("attention_bias", False)
    moe = {
        "router": {
            "num_experts": f.integer("n_routed_experts"),
            "num_experts_per_tok": f.integer("num_experts_per_tok"),
            "norm_topk_prob": f.flag("norm_topk_prob", False),
        },
        "moe_intermediate_size": f.integer("moe_intermediate_size"),
        "n_shared_experts": f.integer("n_shared_experts", 0),
        "first_k_dense_replace": dense_first(f),
    }
    values = decoder_fields(f) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(f, head_dim=False, attention_bias=bias, output_bias=bias),
        "rope": f.rope(),
        "moe": moe,
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    moe = config.moe
    return written(config, head_dim=False) | {
        "intermediate_size": config.intermediate_size,
        "attention_bias": config.attention.attention_bias,
        "n_routed_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.num_experts_per_tok,
        "norm_topk_prob": moe.router.norm_topk_prob,
        "scoring_func": "softmax",
        "moe_intermediate_size": moe.moe_intermediate_size,
        "n_shared_experts": moe.shared_width // moe.moe_intermediate_size,
        **dense_first_fields(config),
    }


DEEPSEEK = Family(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    published="DeepSeekMoE-16B",
    read=read,
    write=write,
    pieces=Layout(LLAMA_EXPERTS, RENAME),
)
