"""A `config.json` of an unknown family, planned from its usual fields; says which field it took for what.

Good for counts to within norms and biases, no more. What has fields of another kind of model is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from manyhands.config import ModelConfig, parse
from manyhands.errors import ConfigError
from manyhands.plan.foreign import foreign_experts, foreign_fields, foreign_objects, foreign_type, is_harmless
from manyhands.plan.guess_layers import WINDOW_FIELDS, sparse_layers, windowed_layers

_GROUPS = ("num_attention_groups", "num_query_groups")
_NAMES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size", "n_vocab", "padded_vocab_size"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", "ffn_dim"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "n_head_kv", "num_kv_heads", "n_kv_heads", "multi_query_group_num", *_GROUPS),
    "head_dim": ("head_dim", "kv_channels", "attention_head_dim"),
    "experts": (
        "num_experts",
        "n_routed_experts",
        "num_local_experts",
        "moe_num_experts",
        "n_experts",
        "num_moe_experts",
    ),
    "per_token": (
        *("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"),
        *("moe_router_topk", "num_selected_experts", "num_experts_per_topk"),
    ),
    "expert_width": (
        *("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size", "ffn_dim_expert"),
        *("expert_ffn_hidden_size", "expert_hidden_size", "moe_hidden_size", "expert_dim", "expert_ffn_size"),
    ),
    "shared": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "shared_width": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "window": ("sliding_window", "attention_chunk_size", "sliding_window_size"),
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
    typed = fields if "model_type" in fields else {**fields, "model_type": values.get("model_type")}
    if reason := foreign_type(typed):
        raise ConfigError(f"{where}: model_type = {model_type} is not a family manyhands knows: {reason}")
    outer = {
        name: v for name, v in values.items() if fields is not values and name not in ("text_config", "language_config")
    }
    if foreign := [*foreign_fields(fields), *foreign_fields(outer)]:
        raise ConfigError(
            f"{where}: model_type = {model_type} is not a family manyhands knows, and its field {foreign[0]!r} belongs "
            "to a kind of model that the planner's formulas do not cover"
        )
    taken: dict[str, str] = {}

    def get(role: str, needed: bool = False) -> Any:
        values = {name: fields[name] for name in _NAMES[role] if fields.get(name) is not None}
        if len(set(map(str, values.values()))) > 1 and role not in ("window", "head_dim"):
            raise ConfigError(f"{where}: {' and '.join(values)} say different things: {list(values.values())}")
        for name, value in values.items():
            taken.setdefault(name, role)
            return value
        if needed:
            raise ConfigError(
                f"{where}: model_type = {model_type} is not a family manyhands knows, and it cannot be planned from "
                f"the usual fields: {' or '.join(repr(name) for name in _NAMES[role][:3])} is missing"
            )
        return None

    def use(name: str) -> None:
        taken.setdefault(name, "which layers")

    try:
        described = _values(get, use, typed)
    except ConfigError as error:
        raise ConfigError(f"{where}: model_type = {model_type}: {error}") from None
    if foreign := [*foreign_experts(fields, set(taken)), *foreign_objects(fields, set(taken))]:
        raise ConfigError(
            f"{where}: model_type = {model_type} is not a family manyhands knows, and its field {foreign[0]!r} may "
            "change its counts in a way that the planner does not know"
        )
    config = parse(ModelConfig, described, f"{where} (model_type = {model_type}, read by its usual fields)")
    notes = _notes(model_type, taken, fields)
    beside = [
        str(name) for name, value in outer.items() if isinstance(value, Mapping) and value and not is_harmless(name)
    ]
    if beside:
        notes.append("beside the language model, not counted: " + ", ".join(beside))
    return config, notes


def _values(get: Any, use: Callable[[str], None], fields: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = get("heads", True), get("hidden_size", True)
    layers = get("num_hidden_layers", True)
    values: dict[str, Any] = {
        "vocab_size": get("vocab_size", True),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "tie_word_embeddings": fields.get("tie_word_embeddings") is True,
        "attention": _attention(get, use, fields, heads, width, layers),
    }
    dense, positions = get("intermediate_size"), get("max_position_embeddings")
    values |= {"max_position_embeddings": positions} if positions is not None else {}
    if not (experts := get("experts")):
        return values | {"intermediate_size": get("intermediate_size", True)}
    expert_width, shared, shared_width = get("expert_width") or dense, get("shared") or 0, get("shared_width")
    if (wide := fields.get("intermediate_size_mlp")) is not None:
        raise ConfigError(f"intermediate_size_mlp = {repr(wide)[:40]} is understood in llama4's files only")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= MAX_LAYERS:
        return values  # refused by `parse`, which names it
    sparse = set(sparse_layers(fields, layers, use))
    moe = {
        "router": {"num_experts": experts, "num_experts_per_tok": get("per_token", True)},
        "moe_intermediate_size": expert_width,
        "n_shared_experts": shared or (1 if shared_width is not None else 0),
        "shared_expert_intermediate_size": shared_width,
        "mlp_only_layers": [layer for layer in range(layers) if layer not in sparse],
    }
    return values | {"moe": moe} | ({"intermediate_size": dense} if dense is not None else {})


MAX_LAYERS = 4096


def _attention(
    get: Any, use: Callable[[str], None], fields: Mapping[str, Any], heads: Any, width: Any, layers: Any
) -> dict[str, Any]:
    if get("kv_lora") is not None:
        names = (
            *(("q_lora", "q_lora_rank"), ("kv_lora", "kv_lora_rank")),
            *(("nope", "qk_nope_head_dim"), ("rope", "qk_rope_head_dim"), ("value", "v_head_dim")),
        )
        mla = {ours: get(role, role != "q_lora") for role, ours in names}
        return {"kind": "mla", "num_attention_heads": heads} | {k: v for k, v in mla.items() if v is not None}
    head_dim = get("head_dim")
    if head_dim is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        head_dim = width // heads
    if (value := fields.get("v_head_dim")) is not None and value != head_dim:
        raise ConfigError(f"v_head_dim = {repr(value)[:40]} with heads of {head_dim}: no formula here covers that")
    if fields.get("multi_query") is True and get("kv_heads") is None:
        use("multi_query")
        kv_heads: Any = 1
    else:
        kv_heads = get("kv_heads")
    attention: dict[str, Any] = {"num_attention_heads": heads, "head_dim": head_dim, "num_key_value_heads": kv_heads}
    attention["attention_bias"] = fields.get("attention_bias") is True or fields.get("qkv_bias") is True
    window, patterned = get("window"), [name for name in WINDOW_FIELDS if fields.get(name)]
    if isinstance(layers, int) and 0 < layers <= MAX_LAYERS and (window is not None or "layer_types" in patterned):
        windowed = windowed_layers(fields, layers, use)
        if window is not None and fields.get("use_sliding_window") is not False and any(windowed):
            kinds = ["sliding_attention" if short else "full_attention" for short in windowed]
            attention |= {"sliding_window": window, "layer_types": kinds}
    return attention


def _notes(model_type: str, taken: dict[str, str], fields: Mapping[str, Any]) -> list[str]:
    words = {"per_token": "experts per token", "kv_heads": "key/value heads"}
    pairs = []
    for name, role in taken.items():
        value = fields[name]
        shown = f"{len(value)} entries" if isinstance(value, list) else repr(value)[:40]
        pairs.append(f"{words.get(role, role.replace('_', ' '))} = {name} ({shown})")
    notes = [
        f"model_type = {model_type} is not a family manyhands knows: planned as a plain decoder from its usual fields",
        "taken: " + ", ".join(pairs),
    ]
    others = [
        str(name)
        for name, value in fields.items()
        if str(name).isidentifier()
        and name not in taken
        and value not in (None, False, 0, "")
        and not is_harmless(name)
    ]
    others = [name for name in others if name not in _SAID and fields[name] not in ([], {})]
    if others:
        notes.append("not looked at: " + ", ".join(others))
    return notes


_SAID = ("tie_word_embeddings", "attention_bias", "qkv_bias", "use_sliding_window", "v_head_dim")
