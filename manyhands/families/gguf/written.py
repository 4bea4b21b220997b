"""A model as GGUF's keys and tensors, and whether llama.cpp would then compute the same.

    plan = written_as(config, "olmoe")
    plan.keys["olmoe.expert_count"], plan.tensors["blk.0.ffn_gate_exps.weight"].shape

What decides is the way back: the keys are read again as from a file, with everything that llama.cpp's code fixes, and
the model that comes out must be the one that went in.

H heads, d head width, R rank of MLA's keys and values, n and v the widths of a head's keys and values in it.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from manyhands.config import ModelConfig, RopeConfig
from manyhands.config.decoder import as_decoder
from manyhands.config.shapes import Shape, tensor_shapes
from manyhands.errors import CheckpointError, ConfigError
from manyhands.families.base import Index
from manyhands.families.fit import canonical, differ, export_config, read_config
from manyhands.families.gguf.archs import ARCHS, COMMON, GATINGS, Arch
from manyhands.families.gguf.fields import config_fields
from manyhands.families.gguf.header import GgufHeader, TensorInfo
from manyhands.families.gguf.names import pieces
from manyhands.families.gguf.types import NUMBERS, TYPES
from manyhands.families.registry import FAMILIES, family_named

Value = bool | int | float | str
_NOWHERE = Path("gguf")
How = Literal["", "pairs", "keys", "values", "factors"]


@dataclass(frozen=True, slots=True)
class Written:
    """One tensor of the file, and what it is made of."""

    ours: str
    """Our tensor; "" for one that is computed."""
    index: Index
    """Of our tensor."""
    shape: Shape
    """The outermost dimension first."""
    how: How = ""
    """`pairs`: rows of queries or keys in the order of pairs; `keys`, `values`: that half of MLA's `kv_b`, by heads;
    `factors`: Llama 3.1's rotation."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a file says, and what it holds, in the order of the file."""

    arch: Arch
    keys: Mapping[str, Value]
    tensors: Mapping[str, Written]


def written_as(config: ModelConfig, model_type: str) -> Plan:
    """The model in one family's GGUF. Raises `ConfigError` naming every field that llama.cpp has otherwise."""
    if model_type not in ARCHS:
        family_named(model_type, "family")
        raise ConfigError(f"{model_type} has no GGUF architecture here; there are: {', '.join(sorted(ARCHS))}")
    arch = ARCHS[model_type]
    tied = config.tie_word_embeddings and arch.name in _OWN_HEAD
    if tied:
        config = config.model_copy(update={"tie_word_embeddings": False})
    fields = export_config(FAMILIES[model_type], config)
    if problems := list(_otherwise(arch, config)):
        raise ConfigError(f"this model does not fit {arch.name} in llama.cpp: {'; '.join(problems)}")
    plan = Plan(arch, _keys(arch, config, fields), dict(_tensors(arch, config)))
    _check(plan, config)
    if tied:
        head = replace(plan.tensors["output.weight"], ours="embed_tokens.weight")
        plan = replace(plan, tensors={**plan.tensors, "output.weight": head})
    return plan


def first_fit(config: ModelConfig) -> Plan:
    """The first architecture that holds the model exactly. Raises `ConfigError` with what keeps it from each."""
    problems = {}
    for model_type, arch in ARCHS.items():
        if arch.dense != (config.moe is None):
            continue
        try:
            return written_as(config, model_type)
        except ConfigError as error:
            problems[model_type] = str(error).rpartition("fit ")[2]
    least = sorted(problems.values(), key=lambda problem: problem.count(";"))[:3]
    raise ConfigError(
        f"no architecture of llama.cpp that is written here computes this model; the nearest: {' | '.join(least)}"
    )


_OWN_HEAD = ("dots1", "qwen2moe", "olmoe", "gpt-oss", "minimax-m2")
"""Architectures without tied embeddings: the head is written besides."""
_OUTPUT_BIAS = ("llama", "gpt-oss", "granitemoe", "ernie4_5-moe")


def _otherwise(arch: Arch, config: ModelConfig) -> Iterator[str]:
    """What llama.cpp's code has otherwise and no key says: `field = here, there`."""
    a, rope, moe = config.attention, config.rope, config.moe
    if arch.mla and a.latent_norm_eps not in (None, config.rms_norm_eps):
        yield f"attention.latent_norm_eps = {a.latent_norm_eps} here, rms_norm_eps = {config.rms_norm_eps} there"
    if arch.mla:
        lite = config.num_hidden_layers in (26, 27) or (config.num_hidden_layers, config.vocab_size) == (48, 128256)
        if lite != (a.q_lora_rank is None):
            there = "None" if lite else "a number"
            yield f"attention.q_lora_rank = {a.q_lora_rank} here, {there} there with {config.num_hidden_layers} layers"
    if arch.name == "dots1" and a.kv_heads != a.num_attention_heads:
        yield f"attention.num_key_value_heads = {a.kv_heads} here, {a.num_attention_heads} there"
    if (a.output_bias or (arch.mla and a.attention_bias)) and arch.name not in _OUTPUT_BIAS:
        yield "attention.output_bias = True here, False there"
    if rope.rope_type == "yarn" and not rope.truncate:
        yield "rope.truncate = False here, True there"
    if moe is None:
        return
    router = moe.router
    if arch.name == "grok" and not router.norm_topk_prob:
        yield "moe.router.norm_topk_prob = False here, True there"
    if router.n_group > 1 and router.group_score != "top2_sum":
        yield f"moe.router.group_score = {router.group_score} here, top2_sum there"
    if arch.name in ("dots1", "deepseek", "deepseek2") and not moe.n_shared_experts:
        yield "moe.n_shared_experts = 0 here, at least 1 there"


def _keys(arch: Arch, config: ModelConfig, fields: Mapping[str, Any]) -> dict[str, Value]:
    """`general.architecture` and every `ARCH.KEY`."""
    keys: dict[str, Value] = {"block_count": config.num_hidden_layers, "vocab_size": config.vocab_size}
    for key, name in (COMMON | dict(arch.keys)).items():
        if (value := fields.get(name)) is not None:
            keys[key] = value
    a, rope = config.attention, config.rope
    if arch.mla:
        keys |= {"attention.key_length_mla": a.qk_nope_head_dim + a.qk_rope_head_dim}
        keys |= {"attention.value_length_mla": a.v_head_dim, "attention.head_count_kv": 1}
        keys |= {"attention.key_length": a.kv_lora_rank + a.qk_rope_head_dim, "attention.value_length": a.kv_lora_rank}
    else:
        keys |= {"attention.key_length": a.head_dim, "attention.value_length": a.head_dim}
    keys["rope.dimension_count"] = config.rope_dim
    if config.moe is not None and "expert_feed_forward_length" in arch.keys:
        keys["expert_feed_forward_length"] = config.moe.moe_intermediate_size
    if config.moe is not None and config.moe.shared_width:
        keys["expert_shared_feed_forward_length"] = config.moe.shared_width
    if config.moe is not None and (arch.gating_required or arch.scales):
        keys["expert_gating_func"] = next(number for number, name in GATINGS.items() if name == arch.gating)
    if rope.rope_type in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": rope.factor}
    if rope.rope_type == "yarn":
        assert rope.original_max_position_embeddings is not None
        keys["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
        if arch.mla and rope.mscale_all_dim is not None:
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.mscale_all_dim
    return {"general.architecture": arch.name} | {f"{arch.name}.{key}": value for key, value in keys.items()}


def _tensors(arch: Arch, config: ModelConfig) -> Iterator[tuple[str, Written]]:
    a, shapes = config.attention, tensor_shapes(config)
    if config.rope.rope_type == "llama3":
        yield "rope_freqs.weight", Written("", (), (a.head_dim // 2,), "factors")
    for piece in pieces(config, arch):
        tail = piece.ours.rpartition("self_attn.")[2]
        plain = Written(piece.ours, piece.ours_index, _shape(shapes[piece.ours], piece.ours_index))
        if piece.theirs == piece.ours:
            raise ConfigError(f"this model does not fit {arch.name}: it has no place for {piece.ours}")
        if arch.mla and tail == "kv_b_proj.weight":
            H, R, n, v = a.num_attention_heads, a.kv_lora_rank, a.qk_nope_head_dim, a.v_head_dim
            yield piece.theirs.replace("kv_b", "k_b"), replace(plain, shape=(H, R, n), how="keys")
            yield piece.theirs.replace("kv_b", "v_b"), replace(plain, shape=(H, v, R), how="values")
        elif arch.permuted and tail.startswith(("q_proj.", "k_proj.")):
            yield piece.theirs, replace(plain, how="pairs")
        else:
            yield piece.theirs, plain


def _shape(whole: Shape, index: Index) -> Shape:
    rest = [len(range(n)[i]) for n, i in zip(whole, index, strict=False) if isinstance(i, slice)]
    return (*rest, *whole[len(index) :])


def _check(plan: Plan, config: ModelConfig) -> None:
    """Read the keys again, and compare."""
    infos = {name: TensorInfo(_NOWHERE, TYPES[NUMBERS["F32"]], t.shape, 0, 0) for name, t in plan.tensors.items()}
    infos.pop("rope_freqs.weight", None)  # it is in the data, not in the keys
    wanted = config
    if config.rope.rope_type == "llama3":
        if (config.rope.low_freq_factor, config.rope.high_freq_factor) != (1.0, 4.0):
            raise ConfigError(f"this model does not fit {plan.arch.name}: llama3 with other factors than 1 and 4")
        if plan.arch.name != "llama":
            raise ConfigError(f"this model does not fit {plan.arch.name}: rope.rope_type = llama3 here, not there")
        plain = RopeConfig(rope_theta=config.rope.rope_theta, interleave=config.rope.interleave)
        wanted = config.model_copy(update={"rope": plain})
    keys = {key: _single(value) for key, value in plan.keys.items()}
    try:
        _, values = config_fields(GgufHeader(_NOWHERE, keys, infos))
        _, found = read_config(values | {"initializer_range": config.initializer_range}, "gguf")
    except CheckpointError as error:
        raise ConfigError(f"this model does not fit {plan.arch.name}: {error}") from None
    if differences := differ(*(_rounded(as_decoder(canonical(c))) for c in (wanted, found))):
        raise ConfigError(f"this model does not fit {plan.arch.name} in llama.cpp: {'; '.join(differences)}")


def _single(value: Any) -> Any:
    """Numbers as a file holds them: float32."""
    if isinstance(value, dict):
        return {name: _single(inner) for name, inner in value.items()}
    return struct.unpack("<f", struct.pack("<f", value))[0] if isinstance(value, float) else value


def _rounded(config: ModelConfig) -> ModelConfig:
    return ModelConfig.model_validate(_single(config.model_dump()))


def factors(config: ModelConfig) -> list[float]:
    """Llama 3.1's rotation as GGUF has it: what each frequency is divided by, [d/2]."""
    rope, width = config.rope, config.attention.head_dim
    assert rope.original_max_position_embeddings is not None
    found = []
    for i in range(width // 2):
        turns = rope.original_max_position_embeddings / (2 * math.pi * rope.rope_theta ** (2 * i / width))
        smooth = min(1.0, max(0.0, (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)))
        found.append(1 / ((1 - smooth) / rope.factor + smooth))
    return found
