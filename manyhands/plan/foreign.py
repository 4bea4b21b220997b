"""Fields that only models of another kind have: state spaces, linear attention, convolutions, encoders."""

from collections.abc import Mapping
from typing import Any

_PARTS = ("mamba", "ssm_", "state_size", "linear_attn", "linear_key", "linear_conv", "rwkv", "conv_kernel", "n_encoder")
_KINDS = {"full_attention", "sliding_attention"}


def foreign_fields(fields: Mapping[str, Any]) -> list[str]:
    """Their names, those that are set."""
    found = [name for name, value in fields.items() if value and any(part in str(name) for part in _PARTS)]
    if fields.get("is_encoder_decoder") is True:
        found.append("is_encoder_decoder")
    types = fields.get("layer_types")
    if isinstance(types, list) and not {str(kind) for kind in types} <= _KINDS:
        found.append("layer_types")
    return found
