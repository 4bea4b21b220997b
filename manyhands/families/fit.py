"""From a `config.json` to our description and back: which family a model fits, and what keeps it from another."""

import re
from collections.abc import Collection
from typing import Any

from manyhands.config import (
    AttentionConfig,
    BuiltConfig,
    EncoderDecoderConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    suggest,
)
from manyhands.config.model import OF_NUMBERS
from manyhands.errors import ConfigError
from manyhands.families.base import Family, Json
from manyhands.families.fields import MISSING, Fields
from manyhands.families.registry import FAMILIES, family_named


def read_config(values: Any, where: str, ignored: Collection[str] = ()) -> tuple[Family, BuiltConfig]:
    """The family and the model that a parsed `config.json` describes; `where` begins the message of an error.

    `ignored` names fields that nobody knows and that are read past all the same (`rope_scaling.boost` for one inside).
    Raises `ConfigError` for an unknown family and a field that is wrong, `UnknownField` for one that nobody knows, and
    `ConfigError` again for one to be ignored that is not there or is known.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object, found {type(values).__name__}")
    model_type = values.get("model_type")
    if values.get("kind") in OF_NUMBERS:
        raise ConfigError(f"{where}: kind = {values['kind']!r} is a model of numbers; mh.load_experts loads it")
    if not isinstance(model_type, str):
        raise ConfigError(f"{where}: 'model_type' is missing; known: {', '.join(sorted(FAMILIES))}")
    family = family_named(model_type[:80], where)
    fields = text_fields(family, values, where)
    for name in ignored:
        found: Any = fields
        for part in name.split("."):
            found = found.get(part, MISSING) if isinstance(found, dict) else MISSING
        if found is MISSING:
            near = suggest(name, sorted(map(str, fields)))
            raise ConfigError(f"{where}: there is no field {name[:80]!r} to ignore; {near}")
    return family, family.read(Fields(fields, where, ignored))


def text_fields(family: Family, values: Json, where: str = "config.json") -> Json:
    """The part of `config.json` that describes the language model."""
    if family.text_field is None:
        return values
    inner = values.get(family.text_field)
    if not isinstance(inner, dict):
        raise ConfigError(f"{where}: {family.text_field!r} is missing or is not an object")
    return inner


def export_config(family: Family, config: BuiltConfig) -> Json:
    """`config` as the family's `config.json`. Raises `ConfigError` naming what the family cannot say."""
    if config.kind not in family.kinds:
        raise ConfigError(f"this model is of kind = {config.kind!r}, which {family.model_type} does not describe")
    if (config.moe is None) != family.dense and family.model_type != "manyhands":
        kind = "dense" if config.moe is None else "a mixture of experts"
        raise ConfigError(f"this model is {kind}, which {family.model_type} is not")
    fields = family.write(config)
    fields = {"model_type": family.model_type, "architectures": [family.architecture], **fields}
    if family.model_type == "manyhands":
        fields.pop("architectures")
    read = family.read(Fields(fields, family.model_type))
    if differences := differ(canonical(config), canonical(read)):
        raise ConfigError(f"this model does not fit {family.model_type}: {'; '.join(differences)}")
    if family.text_field is None:
        return fields
    outer = {"model_type": family.model_type, "architectures": [family.architecture]}
    return {**outer, "tie_word_embeddings": config.tie_word_embeddings, family.text_field: fields}


def misfit(family: Family, config: BuiltConfig) -> str | None:
    """Why the family cannot hold the model; None if it can."""
    try:
        export_config(family, config)
    except ConfigError as error:
        return str(error)
    return None


def nearest(config: BuiltConfig) -> Family:
    """The first family that holds the model exactly; our own for a kind of model that no published family describes.

    Raises `ConfigError` with the nearest and why not, every family that one other value would make fit, and those that
    two would.
    """
    if not any(config.kind in family.kinds for family in FAMILIES.values() if family.nearest):
        return FAMILIES["manyhands"]
    problems = {name: misfit(family, config) for name, family in FAMILIES.items() if family.nearest}
    for name, problem in problems.items():
        if problem is None:
            return FAMILIES[name]
    best = min(problems, key=lambda name: (problems[name] or "").count(";") + 9 * ("fit" not in (problems[name] or "")))
    changes = {name: _changes(problem or "", config) for name, problem in problems.items()}
    way = ""
    for count, said in ((1, "One change would do"), (2, "Two would")):
        if close := [f"{name} with {' and '.join(found)}" for name, found in changes.items() if len(found) == count]:
            way += f". {said}: {'; '.join(close[:4])}"
    raise ConfigError(f"no family holds this model exactly; the nearest: {problems[best]}{way}")


def _changes(problem: str, config: BuiltConfig) -> list[str]:
    """Every `field=value` that keeps a model from a family, by the message of `misfit`, without those that follow."""
    found = dict(re.findall(r"([\w.]+) = [^;]*? here, ([^;]*) there", problem))
    if "moe.n_shared_experts" in found:  # their width follows from their number
        found.pop("moe.shared_expert_intermediate_size", None)
    if config.moe is not None and found.get("moe.mlp_only_layers") == "()":  # named as the model has them
        del found["moe.mlp_only_layers"]
        found.pop("intermediate_size", None)
        told = {"first_k_dense_replace": "0", "decoder_sparse_step": "1", "mlp_only_layers": "[]"}
        usual = {"0": 0, "1": 1, "[]": ()}
        found |= {f"moe.{n}": v for n, v in told.items() if getattr(config.moe, n) != usual[v]}
    return [f"{name}={value.lower()}" for name, value in found.items()]


def differ(ours: BuiltConfig, theirs: BuiltConfig) -> list[str]:
    """`field = here, there in the family`, for every field that differs."""
    found: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in a:
                walk(a[name], b[name], f"{path}.{name}" if path else name)
        elif a != b and not (isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-12 * abs(a)):
            found.append(f"{path} = {a} here, {b} there")

    walk(ours.model_dump(), theirs.model_dump(), "")
    return found


def canonical(config: BuiltConfig) -> BuiltConfig:
    """The same function written one way: what only training uses, and what has no effect, is at its default."""
    if isinstance(config, ModelConfig):
        return _decoder(config)
    return _encoder_decoder(config) if isinstance(config, EncoderDecoderConfig) else config


def _decoder(config: ModelConfig) -> ModelConfig:
    a = config.attention
    changes: dict[str, Any] = {}
    defaults = AttentionConfig()
    if a.kind == "mla":
        attention: dict[str, Any] = {"num_key_value_heads": None, "head_dim": defaults.head_dim}
        attention["latent_norm_eps"] = a.latent_norm_eps or config.rms_norm_eps
        attention["output_bias"] = a.output_bias or a.attention_bias
    else:
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "latent_norm_eps")
        attention = {"num_key_value_heads": a.kv_heads} | {name: getattr(defaults, name) for name in names}
        attention["attention_multiplier"] = a.attention_multiplier or a.head_dim**-0.5
    types = set(config.layer_types)
    if len(types) == 1:
        attention["layer_types"] = None
        attention["sliding_window"] = a.sliding_window if types == {"sliding_attention"} else None
        attention["attention_chunk_size"] = a.attention_chunk_size if types == {"chunked_attention"} else None
    if not a.nope_layers or a.floor_scale is None:
        attention |= {"floor_scale": None, "attn_scale": defaults.attn_scale}
    changes["attention"] = a.model_copy(update=attention)
    changes["rope"] = _rope(config.rope)
    if config.moe is not None:
        changes["moe"] = _moe(config.moe, config)
        if not config.dense_layers:
            changes |= {"intermediate_size": config.moe.moe_intermediate_size, "hidden_act": config.moe.hidden_act}
    return config.model_copy(update=changes)


def _rope(rope: RopeConfig) -> RopeConfig:
    """Fields that the rotation's type does not use are at their defaults."""
    plain = {"partial_rotary_factor", "interleave", "rope_theta", "rope_type"}
    used = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
        "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
        | {"attention_factor", "truncate"},
        "longrope": {"original_max_position_embeddings", "short_factor", "long_factor"},
    }[rope.rope_type]
    values = {name: getattr(rope, name) for name in plain | used}
    if rope.rope_type == "longrope":  # which the factor may say too
        values |= dict(zip(("short_mscale", "long_mscale"), rope.mscales, strict=True))
    return RopeConfig(**values)


def _encoder_decoder(config: EncoderDecoderConfig) -> EncoderDecoderConfig:
    """How many sparse layers there are, not how many were asked for; an untied model has a table for each stack."""
    changes: dict[str, Any] = {"share_embeddings": config.share_embeddings and config.tie_word_embeddings}
    for name, layers in (
        ("num_sparse_encoder_layers", config.num_hidden_layers),
        ("num_sparse_decoder_layers", config.num_decoder_layers),
    ):
        asked = getattr(config, name)
        changes[name] = layers // (layers // asked) if asked else 0
    if config.router is not None:
        changes["router"] = _router(config.router)
    return config.model_copy(update=changes)


def _router(router: RouterConfig) -> RouterConfig:
    changes: dict[str, Any] = {"init": "normal", "jitter": 0.0, "random_second": False, "capacity_factor": None}
    if not router.limited(training=False):
        of_capacity = ("min_capacity", "drop_policy", "capacity_per", "capacity_group")
        changes |= {name: RouterConfig.model_fields[name].default for name in of_capacity}
    if router.n_group == 1:
        changes |= {"topk_group": 1, "group_score": "top2_sum"}
    if router.num_experts_per_tok == 1 and not router.norm_top1:
        changes["norm_topk_prob"] = False
    return router.model_copy(update=changes)


def _moe(moe: MoEConfig, config: ModelConfig) -> MoEConfig:
    layers = {"first_k_dense_replace": 0, "decoder_sparse_step": 1, "mlp_only_layers": tuple(config.dense_layers)}
    shared = {"n_shared_experts": 1, "shared_expert_intermediate_size": moe.shared_width} if moe.shared_width else {}
    return moe.model_copy(update={"router": _router(moe.router), "input_jitter": 0.0, **layers, **shared})
