"""Formats by the names that people use: GGUF's mixes, AWQ and GPTQ, NVFP4.

Bits per weight follow from the block types (`families/gguf/types.py`) and from llama.cpp's rules of which tensor takes
which (`llama_tensor_get_type`): the down projection takes more bits in some layers, the head takes Q6_K.
"""

from dataclasses import dataclass

from manyhands.families.gguf.types import NUMBERS, TYPES
from manyhands.plan.storage import Storage


def block_bits(name: str) -> float:
    """Bits per weight of one of GGML's block types, with its scales."""
    block = TYPES[NUMBERS[name]]
    return 8 * block.size / block.values


@dataclass(frozen=True, slots=True)
class _Mix:
    """How a file named so is made. Shares are of the layers."""

    base: str
    down: tuple[tuple[str, float], ...] = ()
    """Block types that the down projection takes in place of the base."""
    output: str | None = None
    """Of attention's output projection, if not the base."""
    head: str = "Q6_K"

    def storage(self, name: str) -> Storage:
        """Expert and feed-forward: gate, up and down, a third each. Attention: values and keys count as the base."""
        base = block_bits(self.base)
        down = base + sum(share * (block_bits(block) - base) for block, share in self.down)
        feed_forward = (2 * base + down) / 3
        attention = (base + block_bits(self.output or self.base)) / 2
        parts = (("attention", attention), ("head", block_bits(self.head)))
        blocks = ", ".join([self.base, *(f"{block} in {share:.4g} of down" for block, share in self.down)])
        return Storage(name, feed_forward, feed_forward, base, 32, "int8", f"GGUF: {blocks}; head {self.head}", parts)


_HALF = 0.5
"""Of the layers: the first and the last eighth, and every third between (`use_more_bits`)."""
_MIXES = {
    "q8_0": _Mix("Q8_0", head="Q8_0"),
    "q6_k": _Mix("Q6_K"),
    "q5_k_m": _Mix("Q5_K", (("Q6_K", _HALF),)),
    "q5_k_s": _Mix("Q5_K"),
    "q5_1": _Mix("Q5_1"),
    "q5_0": _Mix("Q5_0"),
    "q4_k_m": _Mix("Q4_K", (("Q6_K", _HALF),)),
    "q4_k_s": _Mix("Q4_K", (("Q5_K", 1 / 8),)),
    "q4_1": _Mix("Q4_1"),
    "q4_0": _Mix("Q4_0"),
    "iq4_nl": _Mix("IQ4_NL", (("Q5_K", 1 / 8),)),
    "iq4_xs": _Mix("IQ4_XS", (("Q5_K", 1 / 8),)),
    "q3_k_l": _Mix("Q3_K", (("Q5_K", 1.0),), output="Q5_K"),
    "q3_k_m": _Mix("Q3_K", (("Q5_K", 1 / 16), ("Q4_K", 15 / 16)), output="Q4_K"),
    "q3_k_s": _Mix("Q3_K"),
    "q2_k": _Mix("Q2_K", (("Q3_K", 1.0),), output="Q3_K"),
}
_GROUPED = 4 + (16 + 4) / 128
NAMED = {
    **{name: mix.storage(name) for name, mix in _MIXES.items()},
    "awq": Storage("awq", _GROUPED, _GROUPED, 16, 16, "bf16", "groups of 128 with a 16-bit scale and a 4-bit zero"),
    "gptq": Storage("gptq", _GROUPED, _GROUPED, 16, 16, "bf16", "groups of 128 with a 16-bit scale and a 4-bit zero"),
    "nvfp4": Storage("nvfp4", 4.5, 4.5, 16, 16, "fp4", "groups of 16 with one 8-bit scale (NVIDIA)"),
}
"""Formats that are not this package's own, by name."""
SPELLINGS = {
    "bfloat16": "bf16",
    "fp16": "bf16",
    "f16": "bf16",
    "float16": "bf16",
    "float32": "fp32",
    "f32": "fp32",
    "4bit": "int4",
    "4-bit": "int4",
    "8bit": "int8",
    "8-bit": "int8",
    "awq-int4": "awq",
    "gptq-int4": "gptq",
    "w4a16": "awq",
    "float8": "fp8",
    "f8": "fp8",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "q3_k": "q3_k_m",
}
"""Other names of formats."""
