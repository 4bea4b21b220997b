"""ERNIE-4.5-21B-A3B and 300B-A47B (language models): softmax scores with a selection bias, adjacent pairs rotated.

Source: transformers `models/ernie4_5_moe`. Its balance loss chooses experts without the bias, ours counts what was
chosen: there is no scale between them. The bias is stored as [1, E]; the MTP module is kept and not computed with.
"""

from collections.abc import Iterator

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout, Piece
from manyhands.families.fields import Fields, decoder_fields, head_fields, norm_top1, written

_BIAS = "mlp.moe_statics.e_score_correction_bias"
_LAYOUT = Layout(LLAMA_EXPERTS, {"mlp.router.weight": "mlp.gate.weight", "mlp.router.e_score_correction_bias": _BIAS})


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=4, moe_num_shared_experts=2)
    f.activation()
    f.only("use_bias", False)
    f.only("use_rmsnorm", True)
    f.only("moe_use_aux_free", True)
    f.only("moe_gate", "topk")
    f.only("moe_norm_min", 1e-12)
    f.only("compression_ratio", 1.0)
    # capacities and dropping belong to training; the MTP module is kept as it is
    f.ignore("moe_capacity", "moe_dropout_prob", "num_nextn_predict_layers", "multi_token_pred_lambda")
    k, layers = f.integer("moe_k"), f.integer("num_hidden_layers")
    first, step = f.integer("moe_layer_start_index", 1), f.integer("moe_layer_interval", 1)
    last = f.integer("moe_layer_end_index", -1)
    last = layers - 1 if last == -1 else last
    moe = {
        "router": {
            "num_experts": f.integer("moe_num_experts"),
            "num_experts_per_tok": k,
            "bias": True,
            "norm_top1": norm_top1(k),
        },
        "moe_intermediate_size": f.integer("moe_intermediate_size"),
        "n_shared_experts": f.integer("moe_num_shared_experts", 0),
        "first_k_dense_replace": first,
        "decoder_sparse_step": step,
        "mlp_only_layers": list(range(max(last + 1, 0), min(layers, 4096))),
    }
    values = decoder_fields(f, tied=True, eps=1e-5) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(f),
        "rope": f.rope(500_000.0, interleave=True),
        "moe": moe,
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    moe = config.moe
    return written(config) | {
        "intermediate_size": config.intermediate_size,
        "use_bias": False,
        "moe_num_experts": moe.router.num_experts,
        "moe_k": moe.router.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "moe_num_shared_experts": moe.shared_width // moe.moe_intermediate_size,
        "moe_layer_start_index": min(config.sparse_layers),
        "moe_layer_end_index": max(config.sparse_layers),
        "moe_layer_interval": moe.decoder_sparse_step,
    }


def _pieces(config: ModelConfig) -> Iterator[Piece]:
    for p in _LAYOUT(config):
        yield Piece(p.ours, p.theirs, theirs_index=(0,)) if p.theirs.endswith(_BIAS) else p


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    published="ERNIE-4.5-21B-A3B, 300B-A47B",
    read=read,
    write=write,
    pieces=_pieces,
    kept=lambda _: ("model.mtp_",),
    kept_fields=("num_nextn_predict_layers", "multi_token_pred_lambda"),
)
