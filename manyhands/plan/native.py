"""How a checkpoint holds its weights, from the `quantization_config` of its `config.json`: bits per class of tensor."""

from collections.abc import Mapping
from typing import Any

from manyhands.plan.storage import BF16, FP8, FP32, MXFP4, Storage

_SIXTEEN = ("bfloat16", "float16", "half")


def native_storage(fields: Mapping[str, Any]) -> tuple[Storage | None, str | None]:
    """(the format, or None where it is not understood; a note for the reader, or None)."""
    quantization = fields.get("quantization_config")
    if quantization is None:
        dtype = fields.get("dtype", fields.get("torch_dtype"))
        if dtype == "float32":
            return FP32, None
        return BF16, None if dtype in _SIXTEEN else "config.json names no dtype: taken as bf16"
    if not isinstance(quantization, Mapping):
        return None, "quantization_config is not an object: the native format is left out"
    method = quantization.get("quant_method")
    if method == "fp8":
        return FP8, None
    if method == "mxfp4":
        return MXFP4, None
    if method == "compressed-tensors" and (found := _compressed(quantization)) is not None:
        return found, None
    return None, f"quantization_config.quant_method = {str(method)[:40]!r}: the native format is left out"


def _compressed(quantization: Mapping[str, Any]) -> Storage | None:
    """compressed-tensors: integers in groups with one 16-bit scale; `ignore` names what stays in 16 bits."""
    groups = quantization.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(weights.get("num_bits"), int):
        return None
    size = weights.get("group_size")
    bits = weights["num_bits"] + (16 / size if isinstance(size, int) and size > 0 else 0)
    if not 1 <= bits <= 32:
        return None
    ignored = quantization.get("ignore")
    ignored = ignored if isinstance(ignored, list) else []
    spared = any("self_attn" in str(name) or "attention" in str(name) for name in ignored)
    note = f"compressed-tensors, {weights['num_bits']} bits" + (f", groups of {size}" if isinstance(size, int) else "")
    return Storage("int" + str(weights["num_bits"]), bits, 16 if spared else bits, 16, 16, "bf16", note)
