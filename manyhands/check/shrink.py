"""A small model of the same kind: every mechanism kept, every size reduced."""

from typing import Any

from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig

MAX_EXPERTS = 16
MAX_GROUPS = 4
MAX_CHOSEN = 4
MAX_LAYERS = 8
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}


def shrink(config: ModelConfig) -> ModelConfig:
    """At most 64 wide, 16 experts, 128 tokens; one dense layer before two sparse ones if the model has them.

    What is kept: grouped heads, latent ranks, expert groups and how many of them are chosen, whether all experts are
    used, gating, biases, ties, shared experts, the pattern of layers. A small model comes back unchanged.
    """
    changes: dict[str, Any] = {name: min(getattr(config, name), limit) for name, limit in WIDTHS.items()}
    changes["attention"] = _attention(config.attention)
    pairs = int(changes["attention"].rope_dim * config.rope.partial_rotary_factor) // 2
    factors = {name: getattr(config.rope, name) for name in ("short_factor", "long_factor")}
    changes["rope"] = config.rope.model_copy(update={n: f and f[:pairs] for n, f in factors.items()})
    if config.moe is None:
        return _of_length(config.model_copy(update=changes), min(config.num_hidden_layers, max(2, _kinds(config))))
    moe = shrink_moe(config.moe)
    wanted, layers, sparse = min(2, len(config.sparse_layers)), 0, 0
    while sparse < wanted:
        sparse += moe.is_sparse(layers)
        layers += 1
    layers = min(config.num_hidden_layers, max(layers, _kinds(config)))
    return _of_length(config.model_copy(update=changes | {"moe": moe}), layers)


def _kinds(config: ModelConfig) -> int:
    """How many of the first layers have one of each kind of attention, as far as few do."""
    first: dict[tuple[str, bool], int] = {}
    for layer, sees in enumerate(config.layer_types[:MAX_LAYERS]):
        first.setdefault((sees, layer in config.attention.nope_layers), layer)
    return max(first.values()) + 1


def _of_length(config: ModelConfig, layers: int) -> ModelConfig:
    """The first `layers` layers, and what is said of each."""
    values = config.model_dump() | {"num_hidden_layers": layers}
    if types := values["attention"]["layer_types"]:
        values["attention"]["layer_types"] = types[:layers]
    values["attention"]["nope_layers"] = [n for n in values["attention"]["nope_layers"] if n < layers]
    if not values["attention"]["nope_layers"]:
        values["attention"]["floor_scale"] = None
    if values["moe"]:
        values["moe"]["mlp_only_layers"] = [n for n in values["moe"]["mlp_only_layers"] if n < layers]
    return ModelConfig.model_validate(values)


def _attention(a: AttentionConfig) -> AttentionConfig:
    """What the kind of attention does not use stays as it is: fast paths refuse a value they do not know."""
    kv, heads = _heads(a)
    update: dict[str, Any] = {"num_attention_heads": heads}
    if a.num_key_value_heads is not None:
        update["num_key_value_heads"] = heads if a.kind == "mla" else kv
    for name in ("sliding_window", "attention_chunk_size", "floor_scale"):
        if getattr(a, name) is not None:
            update[name] = min(getattr(a, name), 8)
    limits = {"head_dim": 16}
    if a.kind == "mla":
        limits = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
        limits |= {} if a.q_lora_rank is None else {"q_lora_rank": 32}
    update |= {name: min(getattr(a, name), limit) for name, limit in limits.items()}
    return AttentionConfig.model_validate(a.model_copy(update=update).model_dump())


def _heads(a: AttentionConfig) -> tuple[int, int]:
    """Key/value heads and query heads: at most 2 and 4 queries to each, or 4 plain heads."""
    if a.kv_heads == a.num_attention_heads:
        heads = min(a.num_attention_heads, 4)
        return heads, heads
    kv = min(a.kv_heads, 2)
    return kv, kv * min(a.num_attention_heads // a.kv_heads, 4)


def shrink_moe(moe: MoEConfig) -> MoEConfig:
    """At most 16 experts, 32 wide."""
    update = {
        "router": shrink_router(moe.router),
        "moe_intermediate_size": min(moe.moe_intermediate_size, 32),
        "n_shared_experts": min(moe.n_shared_experts, 2),
        "shared_expert_intermediate_size": moe.shared_expert_intermediate_size and min(moe.shared_width, 48),
        "first_k_dense_replace": min(moe.first_k_dense_replace, 1),
        "decoder_sparse_step": min(moe.decoder_sparse_step, 2),
    }
    return MoEConfig.model_validate(moe.model_copy(update=update).model_dump())


def shrink_router(r: RouterConfig) -> RouterConfig:
    """At most 16 experts, in as many groups as there are up to 4."""
    if r.num_experts <= MAX_EXPERTS:
        return r
    groups = min(r.n_group, MAX_GROUPS)
    size = MAX_EXPERTS // groups
    if r.topk_group == r.n_group:
        chosen_groups = groups
    else:
        chosen_groups = min(max(1, round(r.topk_group * groups / r.n_group)), groups - 1)
    k = min(r.num_experts_per_tok, MAX_CHOSEN, chosen_groups * size)
    if r.select == "hierarchical":
        chosen_groups = min(r.topk_group, groups if r.topk_group == r.n_group else groups - 1)
        k = chosen_groups * min(r.num_experts_per_tok // r.topk_group, MAX_CHOSEN // 2, size)
    if r.num_experts_per_tok == r.num_experts:
        k = groups * size
    update = {"num_experts": groups * size, "n_group": groups, "topk_group": chosen_groups, "num_experts_per_tok": k}
    return RouterConfig.model_validate(r.model_copy(update=update).model_dump())
