"""Grok-1 (xai-org/grok-1, `model.py`): four norms, GeGLU, a soft cap on attention logits, two multipliers.

The weights were published for JAX; the safetensors everybody uses follow the port by HPC-AI Tech (`grok-1`): its
field and tensor names are read here, and the maths is the original's: RMSNorm with ε = 1e-5, tanh GELU (JAX's
default), softmax over the experts, top-2 not renormalised. The embedding is also the head, unless the file says
otherwise.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import Family, Json, Layout, per_expert
from manyhands.families.fields import Fields, decoder_fields, head_fields, written


def read(f: Fields) -> ModelConfig:
    f.only("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh")
    width, k = f.integer("intermediate_size"), f.integer("num_experts_per_tok")
    router = {"num_experts": f.integer("num_experts"), "num_experts_per_tok": k, "norm_topk_prob": False}
    values = decoder_fields(f, tied=True, eps=1e-5) | {
        "intermediate_size": width,
        "hidden_act": "geglu_tanh",
        "output_norms": True,
        "embedding_multiplier": f.number("embedding_multiplier_scale"),
        "output_multiplier": f.number("output_multiplier_scale"),
        "attention": head_fields(
            f,
            head_dim=False,
            attention_multiplier=f.number("attn_output_multiplier"),
            attn_logit_softcap=f.number("max_attn_value", 30.0),
        ),
        "rope": f.rope(),
        "moe": {"router": router, "moe_intermediate_size": width, "hidden_act": "geglu_tanh"},
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    a = config.attention
    return written(config, head_dim=False) | {
        "hidden_act": "gelu",
        "intermediate_size": config.moe.moe_intermediate_size,
        "num_experts": config.moe.router.num_experts,
        "num_experts_per_tok": config.moe.router.num_experts_per_tok,
        "embedding_multiplier_scale": config.embedding_multiplier,
        "output_multiplier_scale": config.output_multiplier,
        "attn_output_multiplier": a.attention_multiplier or a.head_dim**-0.5,
        "max_attn_value": a.attn_logit_softcap,
    }


GROK_1 = Family(
    model_type="grok-1",
    architecture="Grok1ModelForCausalLM",
    published="Grok-1",
    read=read,
    write=write,
    pieces=Layout(
        per_expert(*(f"moe_block.experts.{{e}}.{name}.weight" for name in ("linear", "linear_v", "linear_1"))),
        {
            "self_attn.": "attn.",
            "mlp.router.weight": "moe_block.gate.weight",
            "input_layernorm.weight": "pre_attn_norm.scale",
            "attention_output_norm.weight": "post_attn_norm.scale",
            "post_attention_layernorm.weight": "pre_moe_norm.scale",
            "mlp_output_norm.weight": "post_moe_norm.scale",
        },
        top={"norm.weight": "norm.scale"},
    ),
    nearest=False,
)
