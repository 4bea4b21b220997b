"""How a checkpoint holds its weights, from the `quantization_config` of its `config.json`: bits per class of tensor.

Every published scheme by its own bits, scales and zero points counted, under a name of its own. `ignore` lists and
targets are held against one module of each kind. What is not understood is left out, with a note.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from manyhands.plan.storage import BF16, FP32, MXFP4, Storage

_SIXTEEN = ("bfloat16", "float16", "half")
_MODULES = {
    "routed experts": "model.layers.7.mlp.experts.0.gate_proj",
    "attention": "model.layers.7.self_attn.q_proj",
    "shared experts": "model.layers.7.mlp.shared_experts.gate_proj",
    "dense feed-forward": "model.layers.7.mlp.gate_proj",
    "head": "lm_head",
}
_SPARED = (
    *("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules"),
    "modules_to_not_quantize",
)
Found = tuple[str, float, str, str]
"""(name, bits per weight with scales, matrix rate, note)."""


def native_storage(fields: Mapping[str, Any]) -> tuple[Storage | None, str | None]:
    """(the format, or None where it is not understood; a note for the reader, or None)."""
    quantization = fields.get("quantization_config")
    if quantization is None:
        dtype = fields.get("dtype") or fields.get("torch_dtype")
        dtype = str(dtype).removeprefix("torch.") if dtype is not None else None
        if dtype == "float32":
            return FP32, None
        if dtype is None or dtype in _SIXTEEN:
            return BF16, None if dtype else "config.json names no dtype: taken as bf16"
        return None, f"dtype = {dtype[:40]!r}: the native format is left out"
    if not isinstance(quantization, Mapping):
        return None, "quantization_config is not an object: the native format is left out"
    method = quantization.get("quant_method") or ("modelopt" if "quant_algo" in quantization else None)
    if method == "mxfp4":
        return MXFP4, None
    try:
        if method == "compressed-tensors":
            return _compressed(quantization), None
        found = _METHODS[method](quantization) if isinstance(method, str) and method in _METHODS else None
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError, re.error):
        return None, f"quantization_config of {str(method)[:40]!r} is not understood: the native format is left out"
    if found is None:
        return None, f"quantization_config.quant_method = {str(method)[:40]!r}: the native format is left out"
    spared = _spared(quantization)
    return _storage(found, {kind: 16.0 if spared(name) else found[1] for kind, name in _MODULES.items()}), None


def _storage(found: Found, bits: Mapping[str, float]) -> Storage:
    name, _, rate, note = found
    linear = bits["dense feed-forward"]
    parts = tuple((k, bits[k]) for k in ("attention", "shared experts", "head") if bits[k] != (linear, 16)[k == "head"])
    return Storage(name, bits["routed experts"], linear, 16, 16, rate, note, parts)


def _spared(quantization: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a module keeps its 16 bits. `re:` begins a pattern, `*` is a wildcard, else it is a part of a name."""
    names = [str(name) for key in _SPARED for name in quantization.get(key) or ()]
    dynamic = quantization.get("dynamic")
    patterns = [str(name)[2:] for name in dynamic if str(name).startswith("-:")] if isinstance(dynamic, Mapping) else []
    method = str(quantization.get("quant_method"))
    head = method in ("awq", "gptq", "fp8", "bitsandbytes", "fbgemm_fp8") and not quantization.get("lm_head")

    def spared(module: str) -> bool:
        if module == "lm_head" and head:
            return True
        return any(_names(name, module) for name in names) or any(re.search(p, module) for p in patterns)

    return spared


def _names(name: str, module: str) -> bool:
    if name.startswith("re:"):
        return re.match(name[3:], module) is not None
    if "*" in name:
        return re.fullmatch(re.escape(name).replace(r"\*", ".*"), module) is not None
    generic = re.sub(r"\.layers\.\d+\.", ".layers.7.", name if name.startswith("model.") else f"model.{name}")
    return generic == module or f"model.{module}" == generic or f".{name}." in f".{module}."


def _group(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1 or size > 1 << 20:
        raise ValueError(size)
    return size


def _whole_bits(bits: Any) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ValueError(bits)
    return bits


def _fp8(q: Mapping[str, Any]) -> Found:
    block = q.get("weight_block_size")
    if block is None:
        return "fp8-tensor", 8.0, "fp8", "one scale per tensor"
    rows, columns = block
    bits = 8 + 32 / (_group(rows) * _group(columns))
    return "fp8", bits, "fp8", f"one float32 scale per {rows} x {columns} block"


def _fbgemm(q: Mapping[str, Any]) -> Found:
    return "fbgemm-fp8", 8.0, "fp8", "one scale per output, left out"


def _integers(name: str) -> Callable[[Mapping[str, Any]], Found]:
    def read(q: Mapping[str, Any]) -> Found:
        bits, size = _whole_bits(q.get("bits", q.get("w_bit"))), _group(q.get("group_size", q.get("q_group_size", 128)))
        zero = bits if name == "gptq" or q.get("zero_point", True) else 0
        extra = (16 + zero) / size if size > 0 else 0.0
        group = f"g{size}" if size > 0 else "channel"
        points = " and zero point" if zero else ""
        return f"{name}-{bits}bit-{group}", bits + extra, "bf16", f"{name}: one 16-bit scale{points} per group"

    return read


def _bitsandbytes(q: Mapping[str, Any]) -> Found | None:
    if q.get("load_in_4bit") or q.get("_load_in_4bit"):
        kind = str(q.get("bnb_4bit_quant_type", "fp4"))
        if kind not in ("nf4", "fp4"):
            return None
        double = bool(q.get("bnb_4bit_use_double_quant"))
        bits = 4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64)
        note = "bitsandbytes: blocks of 64, their scales " + ("quantised again" if double else "in float32")
        return f"bnb-{kind}" + ("-double" if double else ""), bits, "bf16", note
    if q.get("load_in_8bit") or q.get("_load_in_8bit"):
        return "bnb-int8", 8.0, "int8", "bitsandbytes LLM.int8(): one scale per output, left out"
    return None


def _modelopt(q: Mapping[str, Any]) -> Found | None:
    schemes: dict[str, Found] = {
        "FP8": ("modelopt-fp8", 8.0, "fp8", "one scale per tensor"),
        "NVFP4": ("nvfp4", 4.5, "fp8", "groups of 16 with one 8-bit scale"),
        "W4A8_AWQ": ("modelopt-w4a8", 4 + 16 / 128, "fp8", "groups of 128 with one 16-bit scale"),
    }
    return schemes.get(str(q.get("quant_algo")))


_METHODS: dict[str, Callable[[Mapping[str, Any]], Found | None]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "awq": _integers("awq"),
    "gptq": _integers("gptq"),
    "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
}


def _compressed(quantization: Mapping[str, Any]) -> Storage:
    """compressed-tensors: groups of targets, each with its scheme; `ignore` names what stays in 16 bits."""
    groups = quantization["config_groups"]
    schemes = [(group.get("targets") or ["Linear"], _scheme(group)) for group in groups.values()]
    spared = _spared(quantization)

    def of(module: str) -> float:
        for targets, scheme in schemes:
            if any(t == "Linear" or _names(str(t), module) for t in targets):
                return 16.0 if spared(module) else scheme[1]
        return 16.0

    (_, first), *_ = schemes
    name = "+".join(dict.fromkeys(scheme[0] for _, scheme in schemes))
    return _storage((name, *first[1:]), {kind: of(module) for kind, module in _MODULES.items()})


def _scheme(group: Mapping[str, Any]) -> Found:
    w, a = group["weights"], group.get("input_activations")
    bits, size, kind = _whole_bits(w["num_bits"]), w.get("group_size"), w.get("type", "int")
    block, wide = w.get("block_structure"), 16
    active = _whole_bits(a["num_bits"]) if a else 16
    if kind == "float" and bits == 4:
        size = _group(size)
        name = {16: "nvfp4", 32: "mxfp4-linear"}[size] + ("" if a else "-a16")
        return name, 4 + 8 / size, "fp8" if a else "bf16", f"groups of {size} with one 8-bit scale"
    if kind == "float" and bits != 8:
        raise ValueError(bits)
    extra, how = 0.0, "one scale per output or tensor, left out"
    if isinstance(block, list):
        extra, how = 32 / (_group(block[0]) * _group(block[1])), f"one scale per {block[0]} x {block[1]} block"
    elif isinstance(size, int) and _group(size) > 0:
        zero = 0 if w.get("symmetric", True) else bits
        extra, how = (
            (wide + zero) / size,
            f"groups of {size} with one 16-bit scale" + (" and zero point" if zero else ""),
        )
    if kind == "float":
        name = "fp8-block" if isinstance(block, list) else "fp8-dynamic" if a and a.get("dynamic") else "fp8-static"
        return name if a else "fp8-a16", bits + extra, "fp8" if a else "bf16", f"compressed-tensors: {how}"
    name = f"w{bits}a{active}" + (f"-g{size}" if isinstance(size, int) and size > 0 else "")
    return name, bits + extra, "int8" if active == 8 else "bf16", f"compressed-tensors: {how}"
