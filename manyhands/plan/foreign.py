"""Fields that the planner's formulas do not cover, and those that change no count.

Of another kind of model (state spaces, linear attention, convolutions, encoders), or of parts that would be counted
wrong. What is on neither list and was not taken is named in the notes.
"""

from collections.abc import Mapping
from typing import Any

_PARTS = (
    *("mamba", "ssm_", "state_size", "linear_attn", "linear_key", "linear_conv", "linear_num", "linear_head", "rwkv"),
    *(
        "conv_kernel",
        "conv_L_cache",
        "conv_size",
        "short_conv",
        "n_encoder",
        "encoder_layers",
        "full_attention_interval",
    ),
    *("block_type", "block_configs", "layers_block", "hybrid_override", "attn_type_list", "attn_layer", "attn_types"),
    *("zero_expert", "index_n_heads", "index_head", "indexer", "swa_", "hc_mult", "altup", "laurel", "per_layer"),
    *("num_meta_tokens", "cross_attention", "adapter", "lora_rank_", "o_lora", "ngram", "latent_moe", "moe_latent"),
    *("_cycles", "codebook", "depth_decoder", "type_vocab_size", "embedding_size", "heads_per_layer", "embed_proj_dim"),
)
_HARMLESS = (
    *("aux_loss", "jitter", "norm_topk", "scoring", "score_func", "topk_method", "n_group", "topk_group", "scaling"),
    *("router_", "capacity", "_coef", "routing", "route_", "renormalize", "input_noise", "grouped", "score_function"),
    *("initializer", "dropout", "_eps", "epsilon", "token_id", "rope", "rotary", "version", "use_cache", "_pdrop"),
    *("hidden_act", "init_std", "torch_dtype", "dtype", "pretraining_tp", "architectures", "auto_map", "id2label"),
    *("label2id", "quantization_config", "model_type", "return_dict", "_name_or_path", "clip", "softcap", "chunk_size"),
    *(
        "output_",
        "norm_min",
        "selection_fn",
        "multiplier",
        "logit_scale",
        "logits_scaling",
        "nextn",
        "mtp",
        "problem_type",
        "num_labels",
    ),
)
_OTHERS = {
    "afmoe": "gates its attention",
    "beam": "has weights that no field speaks of",
    "doge": "retrieves its experts from products of keys",
    "jetmoe": "has experts in its attention",
    "phi4_multimodal": "has adapters in its layers",
}
"""Types whose fields look usual and mean something else; found by building them with transformers."""
_GATED = ("silu", "swish", "swiglu", "silu_and_mul")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "mlp_hidden_act")
_ATTENTION_OF_STATES = {"attn_type_list", "attn_types"}
_SIZE_WORDS = ("expert", "moe", "ffn", "layer", "head", "hidden", "intermediate", "size", "dim", "rank", "width")
_BESIDE = {"vision", "audio", "image", "video", "speech"}
"""Objects that describe parts other than the language model."""
_EXPERT_WORDS = ("expert", "moe")


def foreign_fields(fields: Mapping[str, Any], taken: set[str] | None = None) -> list[str]:
    """Names of those that are set: known to be foreign, or about experts and neither taken nor harmless."""
    taken = taken or set()
    found = [name for name, value in fields.items() if _is_foreign(str(name), value) and name not in taken]
    if fields.get("is_encoder_decoder") is True:
        found.append("is_encoder_decoder")
    return found


def foreign_type(fields: Mapping[str, Any]) -> str | None:
    """What its `model_type` or its activation says that no field does: a reason to refuse, or None.

    Feed-forward networks are counted as gated, three matrices. Everybody gates SiLU; others usually have two matrices,
    Gemma's have three.
    """
    model_type = str(fields.get("model_type"))
    if model_type in _OTHERS:
        return f"it {_OTHERS[model_type]}"
    for name in _ACTIVATIONS:
        value = fields.get(name)
        if value is not None and value not in _GATED and "gemma" not in model_type:
            return f"{name} = {repr(value)[:40]} does not say whether its feed-forward networks are gated"
    return None


def foreign_experts(fields: Mapping[str, Any], taken: set[str]) -> list[str]:
    """Names of set fields about experts that were neither taken nor are harmless."""
    names = (str(name) for name, value in fields.items() if value and value != 1 and name not in taken)
    return [name for name in names if any(word in name for word in _EXPERT_WORDS) and not is_harmless(name)]


def foreign_objects(fields: Mapping[str, Any], taken: set[str]) -> list[str]:
    """Names of objects that were not taken and hold sizes of layers, heads, experts or widths (DBRX's ffn_config)."""
    found = []
    for name, value in fields.items():
        if isinstance(value, Mapping) and name not in taken and not is_harmless(str(name)):
            inside = [str(key) for key, inner in value.items() if isinstance(inner, int | list | Mapping) and inner]
            if any(word in key for key in inside for word in _SIZE_WORDS) and not _BESIDE & set(name.split("_")):
                found.append(str(name))
    return found


def is_harmless(name: str) -> bool:
    """Whether a field of this name changes neither a count nor a cache."""
    return any(part in name for part in _HARMLESS)


def _is_foreign(name: str, value: Any) -> bool:
    if name in _ATTENTION_OF_STATES and isinstance(value, list) and set(map(str, value)) == {"1"}:
        return False
    return bool(value) and any(part in name for part in _PARTS)
