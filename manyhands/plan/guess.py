"""A `config.json` of a family nobody here knows, planned from its usual fields; says which field it took for what.

Good for counts to within norms and biases, no more. What has fields of another kind of model is refused.
"""

from collections.abc import Mapping
from typing import Any

from manyhands.config import ModelConfig, parse
from manyhands.errors import ConfigError
from manyhands.plan.foreign import foreign_fields

_NAMES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size", "n_vocab", "padded_vocab_size"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", "ffn_dim"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "n_head_kv", "num_kv_heads", "n_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels", "attention_head_dim"),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts"),
    "per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"),
    "expert_width": ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size", "ffn_dim_expert"),
    "shared": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "shared_width": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "first_dense": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "step": ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"),
    "window": ("sliding_window",),
    "types": ("layer_types",),
    "q_lora": ("q_lora_rank",),
    "kv_lora": ("kv_lora_rank",),
    "nope": ("qk_nope_head_dim",),
    "rope": ("qk_rope_head_dim",),
    "value": ("v_head_dim",),
}


def guess_config(values: Mapping[str, Any], where: str) -> tuple[ModelConfig, list[str]]:
    """The model its usual fields describe, and notes on what was taken for what.

    Raises `ConfigError` if a field that is needed is missing, or one is there that no formula here covers.
    """
    fields = values
    nested = values.get("text_config", values.get("language_config"))
    if isinstance(nested, Mapping) and not any(name in values for name in _NAMES["hidden_size"]):
        fields = nested
    model_type = repr(values.get("model_type"))[:60]
    if foreign := foreign_fields(fields):
        raise ConfigError(
            f"{where}: model_type = {model_type} is not a family manyhands knows, and its field {foreign[0]!r} belongs "
            "to a kind of model that the planner's formulas do not cover"
        )
    taken: dict[str, str] = {}

    def get(role: str, needed: bool = False) -> Any:
        for name in _NAMES[role]:
            if fields.get(name) is not None:
                taken[role] = name
                return fields[name]
        if needed:
            raise ConfigError(
                f"{where}: model_type = {model_type} is not a family manyhands knows, and it cannot be planned from "
                f"the usual fields: {' or '.join(repr(name) for name in _NAMES[role][:3])} is missing"
            )
        return None

    config = parse(ModelConfig, _values(get, fields), f"{where} (model_type = {model_type}, read by its usual fields)")
    return config, _notes(model_type, taken, fields, config)


def _values(get: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = get("heads", True), get("hidden_size", True)
    head_dim = get("head_dim")
    if head_dim is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        head_dim = width // heads
    layers, window, types = get("num_hidden_layers", True), get("window"), get("types")
    attention: dict[str, Any] = {"num_attention_heads": heads, "head_dim": head_dim}
    if get("kv_lora") is not None:
        names = ("q_lora", "q_lora_rank"), ("kv_lora", "kv_lora_rank"), ("nope", "qk_nope_head_dim")
        mla = {ours: get(role) for role, ours in (*names, ("rope", "qk_rope_head_dim"), ("value", "v_head_dim"))}
        attention = {"kind": "mla", "num_attention_heads": heads} | {k: v for k, v in mla.items() if v is not None}
    else:
        attention["num_key_value_heads"] = get("kv_heads")
        attention["attention_bias"] = fields.get("attention_bias") is True or fields.get("qkv_bias") is True
        if window is not None and fields.get("use_sliding_window") is not False:
            attention |= {"sliding_window": window, "layer_types": types}
    values = {
        "vocab_size": get("vocab_size", True),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "tie_word_embeddings": fields.get("tie_word_embeddings") is True,
        "attention": attention,
    }
    dense, positions = get("intermediate_size"), get("max_position_embeddings")
    values |= {"max_position_embeddings": positions} if positions is not None else {}
    if (experts := get("experts")) is None:
        return values | {"intermediate_size": get("intermediate_size", True)}
    moe = {
        "router": {"num_experts": experts, "num_experts_per_tok": get("per_token", True)},
        "moe_intermediate_size": get("expert_width") or dense,
        "n_shared_experts": get("shared") or 0,
        "shared_expert_intermediate_size": get("shared_width"),
        "first_k_dense_replace": get("first_dense") or 0,
        "decoder_sparse_step": get("step") or 1,
    }
    if moe["shared_expert_intermediate_size"] is not None and not moe["n_shared_experts"]:
        moe["n_shared_experts"] = 1
    return values | {"moe": moe} | ({"intermediate_size": dense} if dense is not None else {})


def _notes(model_type: str, taken: dict[str, str], fields: Mapping[str, Any], config: ModelConfig) -> list[str]:
    words = {"per_token": "experts per token", "kv_heads": "key/value heads", "first_dense": "first sparse layer"}
    pairs = []
    for role, name in taken.items():
        value = fields[name]
        shown = f"{len(value)} entries" if isinstance(value, list) else repr(value)[:40]
        pairs.append(f"{words.get(role, role.replace('_', ' '))} = {name} ({shown})")
    notes = [
        f"model_type = {model_type} is not a family manyhands knows: planned as a plain decoder from its usual fields",
        "taken: " + ", ".join(pairs),
    ]
    others = [
        name
        for name, value in fields.items()
        if name.isidentifier()
        and name not in taken.values()
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value
    ]
    if others:
        more = f" and {len(others) - 12} more" if len(others) > 12 else ""
        notes.append("numbers not looked at: " + ", ".join(others[:12]) + more)
    return notes
