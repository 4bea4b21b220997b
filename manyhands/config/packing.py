"""How the weights of a quantised model are stored: number formats, and the `packed` section of our `config.json`.

Names, shapes and sizes of the records follow from it and from the model's description; nothing repeats them.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import model_validator

from manyhands.config.base import Strict

Format = Literal["float32", "bf16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Traits:
    """What sizes follow from: bits of a weight, bytes of a scale (0: none), whether groups of inputs have their own."""

    bits: int
    scale_bytes: int = 0
    grouped: bool = False


TRAITS: dict[Format, Traits] = {
    "float32": Traits(32),
    "bf16": Traits(16),
    "int8": Traits(8, scale_bytes=4),
    "int4": Traits(4, scale_bytes=2, grouped=True),
}
"""In the order of their codes in native/manyhands.h; native/format.h has the same table, compared at load."""
FORMATS: tuple[Format, ...] = tuple(TRAITS)
GROUP_SIZES = (32, 64)
VERSION: Literal[1] = 1
"""Of the record layout."""


class Packing(Strict):
    """One number format; `manyhands/quant/record.py` has the bytes."""

    format: Format
    group_size: Literal[0, 32, 64] = 0
    """int4: inputs that share a scale. 0 with the other formats, which have one scale per output or none."""

    @property
    def bits(self) -> float:
        """Per weight, with its group's share of a scale; without scales per output and padding."""
        traits = TRAITS[self.format]
        return traits.bits + (8 * traits.scale_bytes / self.group_size if traits.grouped else 0)

    @model_validator(mode="after")
    def _consistent(self) -> "Packing":
        if TRAITS[self.format].grouped != (self.group_size > 0):
            allowed = " or ".join(map(str, GROUP_SIZES)) if TRAITS[self.format].grouped else "0"
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
