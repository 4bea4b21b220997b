"""How the weights of a quantised model are stored: number formats, and the `packed` section of our `config.json`.

Names, shapes and sizes of the records follow from it and from the model's description; nothing repeats them.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import model_validator

from manyhands.config.base import Strict

Format = Literal["float32", "bf16", "int8", "int4", "q8_0", "q4_0"]


@dataclass(frozen=True, slots=True)
class Traits:
    """What sizes follow from: bits of a weight, the dtype of a scale, how many inputs a group may have."""

    bits: int
    scale: Literal["float32", "bf16", "fp16"] | None = None
    """None: the format has no scales."""
    groups: tuple[int, ...] = ()
    """Inputs that share a scale; empty: one scale per output."""

    @property
    def scale_bytes(self) -> int:
        """Of a scale; 0 where there are none."""
        return 0 if self.scale is None else 4 if self.scale == "float32" else 2

    @property
    def grouped(self) -> bool:
        """Whether groups of inputs have scales of their own."""
        return bool(self.groups)


TRAITS: dict[Format, Traits] = {
    "float32": Traits(32),
    "bf16": Traits(16),
    "int8": Traits(8, "float32"),
    "int4": Traits(4, "bf16", (32, 64)),
    "q8_0": Traits(8, "fp16", (32,)),
    "q4_0": Traits(4, "fp16", (32,)),
}
"""q8_0 and q4_0 hold the numbers of GGUF's blocks of these names, so that those come in unchanged.

In the order of their codes in native/manyhands.h; native/format.h has the same table, compared at load.
"""
FORMATS: tuple[Format, ...] = tuple(TRAITS)
VERSION: Literal[1] = 1
"""Of the record layout."""


class Packing(Strict):
    """One number format; `manyhands/quant/record.py` has the bytes."""

    format: Format
    group_size: Literal[0, 32, 64] = 0
    """Inputs that share a scale: int4 32 or 64, q8_0 and q4_0 32. 0 with formats that have one per output, or none."""

    @property
    def bits(self) -> float:
        """Per weight, with its group's share of a scale; without scales per output and padding."""
        traits = TRAITS[self.format]
        return traits.bits + (8 * traits.scale_bytes / self.group_size if traits.grouped else 0)

    @model_validator(mode="after")
    def _consistent(self) -> "Packing":
        sizes = TRAITS[self.format].groups or (0,)
        if self.group_size not in sizes:
            allowed = " or ".join(map(str, sizes))
            raise ValueError(f"group_size = {self.group_size}: {self.format} takes {allowed}")
        return self

    def __str__(self) -> str:
        return f"{self.format} in groups of {self.group_size}" if self.group_size else self.format


class PackedConfig(Strict):
    """The classes of tensors that are packed; what is None, and every other tensor, is stored as it is."""

    version: Literal[1] = VERSION
    experts: Packing | None = None
    linear: Packing | None = None
    """Attention, shared experts, dense feed-forward networks, an untied head. Not MLA's `kv_b_proj`: decoding
    multiplies with parts of it, head by head."""
