"""MiniMax-M2: sigmoid scores with a selection bias, QK-norm over the full width, half of each head rotated.

Source: transformers `models/minimax_m2`. Its balance loss takes a softmax of the logits, which its router does not:
there is no scale between that and ours. MTP modules are kept and not computed with.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import MIXTRAL_EXPERTS, Family, Json, Layout
from manyhands.families.fields import Fields, decoder_fields, head_fields, norm_top1, written


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=8, head_dim=128)
    f.activation()
    f.only("scoring_func", "sigmoid")
    f.only("use_routing_bias", True)
    f.only("use_qk_norm", True)
    f.only("qk_norm_type", "per_layer")
    f.only("shared_intermediate_size", 0)
    f.ignore("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "shared_moe_mode", "mlp_intermediate_size")
    types = f.layers("attn_type_list", f.integer("num_hidden_layers")) or f.layers(
        "layer_types", f.integer("num_hidden_layers")
    )
    if types is not None and any(t not in (1, "full_attention") for t in types):
        raise f.wrong("attn_type_list", "only full attention in every layer is supported")
    k, width = f.integer("num_experts_per_tok"), f.integer("intermediate_size")
    router = {
        "num_experts": f.integer("num_local_experts"),
        "num_experts_per_tok": k,
        "score": "sigmoid",
        "bias": True,
        "norm_top1": norm_top1(k),
    }
    attention = head_fields(f, qk_norm="full")
    rotated = f.integer("rotary_dim", None)
    if rotated is not None and not 0 < rotated <= attention["head_dim"]:
        raise f.wrong("rotary_dim", "at most head_dim")
    if rotated is not None:
        f.absent(partial_rotary_factor=rotated / attention["head_dim"])
    values = decoder_fields(f) | {
        "intermediate_size": width,
        "attention": attention,
        "rope": f.rope(5e6, partial=True),
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
    }


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    published="MiniMax-M2",
    read=read,
    write=write,
    pieces=Layout(
        MIXTRAL_EXPERTS,
        {
            "mlp.router.weight": "block_sparse_moe.gate.weight",
            "mlp.router.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",
        },
    ),
    kept=lambda _: ("model.mtp",),
    kept_fields=("use_mtp", "num_mtp_modules", "mtp_transformer_layers"),
)
