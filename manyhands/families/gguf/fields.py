"""From a GGUF header to the fields of a `config.json`, as the family that reads them wants them.

Every key of the architecture is taken, known to change nothing with the value it has, or refused by name. What is not
in the keys is in the tensors: the vocabulary's size, a tied head, biases, Llama 3.1's rotation.
"""

import math
import struct
from collections.abc import Collection
from typing import Any

from manyhands.config.base import short_repr
from manyhands.errors import CheckpointError
from manyhands.families.base import Json
from manyhands.families.gguf.archs import ARCHS, COMMON, GATINGS, Arch
from manyhands.families.gguf.header import GgufHeader

_MISSING: Any = object()
_UNUSED = ("vocab_size", "rope.scaling.finetuned", "expert_shared_feed_forward_length", "attention.value_length_mla")
"""Keys that say what the tensors say."""
_BIASED = ("llama", "dots1", "olmoe", "qwen3", "qwen3_moe", "granitemoe", "hunyuan_v1_moe", "glm4_moe", "gpt_oss")
"""Families with a field `attention_bias`."""


def config_fields(header: GgufHeader, ignored: Collection[str] = ()) -> tuple[Arch, Json]:
    """The architecture, and `config.json` as the model's publisher would have written it.

    `ignored` names keys that nobody knows, whole (`llama.boost`), to read past. Raises `CheckpointError` naming the
    key that is missing, wrong or unknown.
    """
    keys = _Keys(header, ignored)
    arch = _arch(keys)
    layers, extra = keys.integer("block_count"), keys.integer("nextn_predict_layers", 0)
    if not 0 <= extra < layers <= 4096:
        raise keys.wrong("block_count", f"expected a number of layers, of which nextn_predict_layers = {extra} are MTP")
    values: Json = {
        "model_type": arch.model_type,
        "num_hidden_layers": layers - extra,
        "vocab_size": _rows(header, "token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for key, name in (COMMON | dict(arch.keys)).items():
        if (value := keys.same(key, None)) is not None:
            values[name] = value
    if arch.model_type in _BIASED:
        values["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    for key, allowed in arch.only.items():
        keys.only(key, *allowed)
    values |= {name: value for name, value in arch.fixed.items() if name != "group_score"}
    _heads(keys, arch, values)
    _rotation(keys, arch, values)
    _experts(keys, arch, values)
    keys.close()
    return arch, values


def _arch(keys: "_Keys") -> Arch:
    """Which family it is: two share `llama`, and two `deepseek2`."""
    name = keys.header.arch
    found = [arch for arch in ARCHS.values() if arch.name == name]
    if not found:
        known = ", ".join(sorted({arch.name for arch in ARCHS.values()}))
        raise CheckpointError(f"{keys.header.path}: general.architecture = {name[:60]!r} is not known; known: {known}")
    if name == "llama":
        return ARCHS["mixtral" if keys.integer("expert_count", 0) else "llama"]
    if name == "deepseek2":
        return ARCHS["deepseek_v3" if keys.integer("expert_gating_func", 1) == 2 else "deepseek_v2"]
    return found[0]


def _heads(keys: "_Keys", arch: Arch, values: Json) -> None:
    """`head_dim`, or latent attention's four widths."""
    key, value = keys.integer("attention.key_length", None), keys.integer("attention.value_length", None)
    rotated = keys.integer("rope.dimension_count", None)
    if arch.mla:
        rank = values.get("kv_lora_rank", 0)
        width = keys.integer("attention.key_length_mla", None)
        old = width is None  # one file for all heads: key_length is that of a head
        width, v = (key, value) if old else (width, keys.integer("attention.value_length_mla"))
        if None in (width, v, rotated) or not 0 < rotated < width:
            raise keys.wrong("attention.key_length_mla", f"expected more than rope.dimension_count = {rotated}")
        if not old and (key, value) not in ((None, None), (rank + rotated, rank)):
            raise keys.wrong("attention.key_length", f"expected kv_lora_rank + rope.dimension_count = {rank + rotated}")
        values |= {"qk_nope_head_dim": width - rotated, "qk_rope_head_dim": rotated, "v_head_dim": v}
        values["num_key_value_heads"] = values.get("num_attention_heads")
        values.setdefault("q_lora_rank", None)
        return
    heads = values.get("num_attention_heads") or 0
    if heads < 1:
        raise keys.wrong("attention.head_count", "expected at least 1")
    head_dim = key if key is not None else values.get("hidden_size", 0) // heads
    if value not in (None, head_dim):
        raise keys.wrong("attention.value_length", f"only attention.key_length = {head_dim} is supported")
    values["head_dim"] = head_dim
    if arch.model_type == "glm4_moe":
        if head_dim < 1:
            raise keys.wrong("attention.key_length", "expected at least 1")
        values["partial_rotary_factor"] = (rotated or head_dim) / head_dim
    elif arch.model_type != "minimax_m2" and rotated not in (None, head_dim):
        raise keys.wrong("rope.dimension_count", f"this architecture rotates the whole head, {head_dim}")


def _rotation(keys: "_Keys", arch: Arch, values: Json) -> None:
    """`rope_scaling`, from the keys or from Llama 3.1's table of factors."""
    values.setdefault("rope_theta", 10_000.0)
    factor = keys.number("rope.scaling.factor", None) or keys.number("rope.scale_linear", None)
    kind = keys.text("rope.scaling.type", "linear" if factor not in (None, 0.0, 1.0) else "none")
    original = keys.integer("rope.scaling.original_context_length", None)
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        keys.only(name, 1.0)
    keys.only("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    betas = {name: keys.number(f"rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
    log = keys.number("rope.scaling.yarn_log_multiplier", None)
    if kind == "linear" and factor:
        values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaling: Json = {"rope_type": "yarn", "factor": factor}
        scaling |= {} if original is None else {"original_max_position_embeddings": original}
        scaling |= {name: value for name, value in betas.items() if value is not None}
        if log is not None:
            if not arch.mla:
                raise keys.wrong("rope.scaling.yarn_log_multiplier", "only DeepSeek's models have it")
            scaling["mscale"] = scaling["mscale_all_dim"] = _short(log / 0.1)
        if arch.model_type == "gpt_oss":
            scaling["truncate"] = False
        values["rope_scaling"] = scaling
    elif kind != "none" or factor not in (None, 0.0, 1.0):
        raise keys.wrong("rope.scaling.type", f"expected none, linear or yarn (rope.scaling.factor = {factor})")
    elif arch.model_type == "gpt_oss":
        values["rope_scaling"] = {"rope_type": "default"}
    if "rope_freqs.weight" in keys.header.tensors:
        if "rope_scaling" in values:
            raise CheckpointError(f"{keys.header.path}: rope_freqs.weight beside rope.scaling.type = {kind!r}")
        if (llama3 := _llama3(keys.header, values)) is not None:
            values["rope_scaling"] = llama3


def _experts(keys: "_Keys", arch: Arch, values: Json) -> None:
    """Widths that old files leave to the tensors, and how the router scores."""
    number = keys.integer("expert_gating_func", None)
    gating = arch.gating if number in (None, 0) else GATINGS.get(number, str(number))
    if gating != arch.gating:
        raise keys.wrong("expert_gating_func", f"this architecture is supported with {arch.gating}")
    if number is None and arch.gating_required:
        raise CheckpointError(f"{keys.header.path}: key '{arch.name}.expert_gating_func' is missing")
    if arch.dense:
        keys.only("expert_count", 0)
        keys.only("expert_used_count", 0)
        return
    width = arch.keys.get("expert_feed_forward_length")
    if width is not None and width not in values:
        values[width] = _last(keys.header, "ffn_down_exps.weight")
    if arch.model_type == "qwen2_moe":
        values.setdefault("shared_expert_intermediate_size", _last(keys.header, "ffn_down_shexp.weight"))
    if arch.model_type == "hunyuan_v1_moe":
        values["intermediate_size"] = values["moe_intermediate_size"]
    if arch.scales:
        values.setdefault("norm_topk_prob", False)
        values["routed_scaling_factor"] = values.get("routed_scaling_factor") or 1.0
        for name in ("n_group", "topk_group"):
            values[name] = values.get(name) or 1
    if arch.model_type in ("deepseek_v3", "dots1", "glm4_moe"):
        values["scoring_func"] = "sigmoid"
    if arch.model_type == "deepseek_v2":
        values["topk_method"] = "greedy" if values["n_group"] == 1 else "group_limited_greedy"
    if arch.model_type == "glm4_moe":
        values["use_qk_norm"] = "blk.0.attn_q_norm.weight" in keys.header.tensors


def _llama3(header: GgufHeader, values: Json) -> Json | None:
    """Llama 3.1's `rope_scaling` from the factors that it makes (`rope_freqs.weight`); None if all are 1.

    With low_freq_factor 1 and high_freq_factor 4, which all published models have, one factor between 1 and the largest
    gives the original context; then every other one must follow.
    """
    info = header.tensors["rope_freqs.weight"]
    width = values["head_dim"]
    if info.type.name != "F32" or info.shape != (width // 2,):
        raise CheckpointError(f"{header.path}: tensor 'rope_freqs.weight' is not F32 [{width // 2}]")
    with open(info.path, "rb") as file:
        file.seek(info.start)
        data = file.read(info.size)
    if len(data) < info.size:
        raise CheckpointError(f"{info.path}: became shorter while it was read")
    factors = struct.unpack(f"<{width // 2}f", data)
    largest = max(factors)
    if all(factor == 1 for factor in factors):
        return None
    waves = [2 * math.pi * values["rope_theta"] ** (2 * i / width) for i in range(width // 2)]
    contexts = [8192]
    for wave, factor in zip(waves, factors, strict=True):
        if 1.001 < factor < largest * 0.999 and largest > 1:
            smooth = (1 / factor - 1 / largest) / (1 - 1 / largest)
            contexts.append(round(wave * (1 + 3 * smooth)))
    for context in contexts[:8]:
        if all(
            math.isclose(factor, _llama3_factor(context / wave, largest), rel_tol=1e-4)
            for wave, factor in zip(waves, factors, strict=True)
        ):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise CheckpointError(f"{header.path}: tensor 'rope_freqs.weight' holds factors that are not Llama 3.1's")


def _llama3_factor(turns: float, factor: float) -> float:
    if turns > 4:
        return 1.0
    if turns < 1:
        return factor
    smooth = (turns - 1) / 3
    return 1 / ((1 - smooth) / factor + smooth)


def _rows(header: GgufHeader, name: str) -> int:
    if name not in header.tensors:
        raise CheckpointError(f"{header.path}: tensor {name!r} is missing")
    return header.tensors[name].shape[0]


def _last(header: GgufHeader, tail: str) -> int:
    """The width of the first layer's tensor of that name."""
    for name, info in header.tensors.items():
        if name.endswith(f".{tail}"):
            return info.shape[-1]
    raise CheckpointError(f"{header.path}: no tensor is named blk.N.{tail}")


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", short) == struct.pack("<f", value):
                return short
        except OverflowError:
            break
    return value


class _Keys:
    """The keys of the architecture, taken one by one. Raises `CheckpointError` naming the key."""

    def __init__(self, header: GgufHeader, ignored: Collection[str]) -> None:
        self.header, self.ignored = header, ignored
        self.prefix = f"{header.arch}."
        self.taken = {self.prefix + name for name in _UNUSED}

    def take(self, name: str, default: Any = _MISSING) -> Any:
        key = self.prefix + name
        self.taken.add(key)
        value = self.header.metadata.get(key, default)
        if value is _MISSING:
            raise CheckpointError(f"{self.header.path}: key {key!r} is missing")
        return value

    def same(self, name: str, default: Any = _MISSING) -> Any:
        """One value, or a list of equal ones, one per layer."""
        value = self.take(name, default)
        if isinstance(value, list):
            if not value or any(entry != value[0] for entry in value):
                raise self.wrong(name, "only the same value in every layer is supported")
            value = value[0]
        if isinstance(value, float):
            return _short(value)
        if value is not None and not isinstance(value, int):
            raise self.wrong(name, "expected a number")
        return value

    def integer(self, name: str, default: Any = _MISSING) -> Any:
        value = self.same(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise self.wrong(name, "expected a whole number")
        return value

    def number(self, name: str, default: Any = _MISSING) -> Any:
        value = self.same(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not abs(value) < 1e30:
            raise self.wrong(name, "expected a finite number")
        return float(value)

    def text(self, name: str, default: Any = _MISSING) -> Any:
        value = self.take(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "expected a string")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        if self.same(name, allowed[0]) not in allowed:
            raise self.wrong(name, f"this architecture is supported with {' or '.join(map(str, allowed))}")

    def wrong(self, name: str, right: str) -> CheckpointError:
        shown = short_repr(self.header.metadata.get(self.prefix + name))
        return CheckpointError(f"{self.header.path}: {self.prefix}{name} = {shown}: {right}")

    def close(self) -> None:
        """Refuse what is left: it may change what the model computes."""
        for key in self.header.metadata:
            if key.startswith(self.prefix) and key not in self.taken and key not in self.ignored:
                raise CheckpointError(
                    f"{self.header.path}: unknown key {key!r} may change what the model computes, so it is not "
                    f"ignored; if it changes nothing: --ignore-field {key}"
                )
