"""Granite 3 MoE (IBM): Mixtral's router with four multipliers; the experts lie stacked in the files.

Source: transformers `models/granitemoe`. Logits are divided by `logits_scaling`.
"""

from collections.abc import Iterator

from manyhands.config import ModelConfig, parse
from manyhands.families.base import Family, Json, Layout, Piece, pooled_over_experts
from manyhands.families.fields import Fields, decoder_fields, head_fields, norm_top1, written


def read(f: Fields) -> ModelConfig:
    f.activation()
    k, width, bias = f.integer("num_experts_per_tok"), f.integer("intermediate_size"), f.flag("attention_bias", False)
    scaling = f.number("logits_scaling", 1.0)
    if scaling <= 0:
        raise f.wrong("logits_scaling", "expected a number over 0")
    router = {"num_experts": f.integer("num_local_experts"), "num_experts_per_tok": k, "norm_top1": norm_top1(k)}
    values = decoder_fields(f) | {
        "intermediate_size": width,
        "embedding_multiplier": f.number("embedding_multiplier", 1.0),
        "residual_multiplier": f.number("residual_multiplier", 1.0),
        "output_multiplier": 1.0 / scaling,
        "attention": head_fields(
            f,
            head_dim=False,
            attention_multiplier=f.number("attention_multiplier", 1.0),
            attention_bias=bias,
            output_bias=bias,
        ),
        "rope": f.rope(),
        "moe": {"router": router, "moe_intermediate_size": width},
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    a = config.attention
    return written(config, head_dim=False) | {
        "intermediate_size": config.moe.moe_intermediate_size,
        "attention_bias": a.attention_bias,
        "num_local_experts": config.moe.router.num_experts,
        "num_experts_per_tok": config.moe.router.num_experts_per_tok,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "attention_multiplier": a.attention_multiplier or a.head_dim**-0.5,
        "logits_scaling": 1.0 / config.output_multiplier,
    }


def _experts(tail: str, where: str, config: ModelConfig) -> Iterator[Piece]:
    names = {"mlp.experts.gate_up_proj": "input_linear", "mlp.experts.down_proj": "output_linear"}
    yield Piece("", f"{where}block_sparse_moe.{names.get(tail, tail)}.weight")


GRANITEMOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    published="Granite 3.0 and 3.1 1B-A400M, 3B-A800M",
    read=read,
    write=write,
    pieces=Layout(_experts, {"mlp.router.weight": "block_sparse_moe.router.layer.weight"}),
    aux_loss_scale=pooled_over_experts,
)
