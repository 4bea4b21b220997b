"""How the weights of a quantised model are stored: the `packed` section of our `config.json`.

Names, shapes and sizes of the records follow from it and from the model's description; nothing repeats them.
"""

from typing import Literal

from pydantic import model_validator

from manyhands.config.base import Strict


class Packing(Strict):
    """One number format; `manyhands/quant/record.py` has the bytes."""

    format: Literal["float32", "bf16", "int8", "int4"]
    group_size: Literal[0, 32, 64] = 0
    """int4: inputs that share a scale. 0 with the other formats, which have one scale per output or none."""

    @model_validator(mode="after")
    def _consistent(self) -> "Packing":
        if (self.format == "int4") != (self.group_size > 0):
            allowed = "32 or 64" if self.format == "int4" else "0"
            raise ValueError(f"group_size = {self.group_size}: {self.format} takes {allowed}")
        return self

    def __str__(self) -> str:
        return f"{self.format} in groups of {self.group_size}" if self.group_size else self.format


class PackedConfig(Strict):
    """The classes of tensors that are packed; what is None, and every other tensor, is stored as it is."""

    version: Literal[1] = 1
    """Of the record layout."""
    experts: Packing | None = None
    linear: Packing | None = None
    """Attention, shared experts, dense feed-forward networks, an untied head. Not MLA's `kv_b_proj`: decoding
    multiplies with parts of it, head by head."""
