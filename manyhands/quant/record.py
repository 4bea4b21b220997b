"""The packed record: the bytes of one expert (or one linear layer), the same on disk, in memory and under the kernel.

A weight matrix [N, K] (N outputs, K inputs) is cut into panels of 16 outputs. N is padded to whole panels and K to
whole multiples of 64, both with zeros. A panel is stored along the inputs, each step one full 64-byte line that a
vector register or a row of an AMX tile takes as it is:

    float32   [K/1][16 outputs][1 input]     float32
    bf16      [K/2][16 outputs][2 inputs]    bfloat16, the pair order of VDPBF16PS and TDPBF16PS
    int8      [K/4][16 outputs][4 inputs]    int8 in [-127, 127], the order of VPDPBUSD and TDPBSSD
    q8_0      the same, int8 in [-128, 127]
    int4      [K/8][16 outputs][4 inputs]    two steps to a byte: inputs 8i..8i+3 in the low four bits, 8i+4..8i+7 in
                                             the high four, each as q + 8, so that a mask and a shift give int8's order
    q4_0      the same

and   weight[n, k] = q · scale,   scale a float32 per output (int8), or a number of 16 bits per output and group of
inputs, stored [panel][group][16 outputs]: a bfloat16 for 32 or 64 inputs (int4), an IEEE half for 32 (q8_0, q4_0: the
integers and scales of GGUF's blocks of these names). Padding has q = 0 and scale = 0.

A gated expert's first matrix alternates panels of gate and of up: panel 2p holds gate outputs 16p..16p+15 and panel
2p+1 the same outputs of up, so that the activation finds both. Biases are float32 [panel][16] in the same order.

The sections follow one another, each on a 64-byte boundary:  up | down | up_scales | down_scales | up_bias |
down_bias  (a linear layer: weight | scales | bias); absent ones take no room. A record is padded to whole 4096-byte
pages: record e of a stack begins at e · record_bytes.
"""

from dataclasses import dataclass
from typing import Literal

from manyhands.config.packing import FORMATS, TRAITS, Format
from manyhands.defaults import GROUP_SIZE
from manyhands.errors import ConfigError

PANEL, DEPTH, LINE, PAGE = 16, 64, 64, 4096
"""Outputs in a panel, what K is padded to a multiple of, and two alignments in bytes."""
LIMIT = 1 << 24
"""Largest width: sizes from a file are checked before anything is multiplied."""


def round_up(n: int, to: int) -> int:
    """The smallest multiple of `to` that is at least n."""
    return -(-n // to) * to


@dataclass(frozen=True, slots=True)
class Matrix:
    """The shape of one packed matrix: `parts` (gate and up: 2) times N outputs, K inputs."""

    outputs: int
    inputs: int
    parts: int
    format: Format
    group_size: int

    @property
    def depth(self) -> int:
        """K with its padding."""
        return round_up(self.inputs, DEPTH)

    @property
    def panels(self) -> int:
        """Panels of 16 outputs, all parts together."""
        return self.parts * (round_up(self.outputs, PANEL) // PANEL)

    @property
    def groups(self) -> int:
        """Scales per output: 0 where the format has none."""
        traits = TRAITS[self.format]
        return self.depth // self.group_size if traits.grouped else int(traits.scale_bytes > 0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the panels."""
        return self.panels * PANEL * self.depth * TRAITS[self.format].bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales."""
        return self.panels * PANEL * self.groups * TRAITS[self.format].scale_bytes

    @property
    def bias_bytes(self) -> int:
        """Bytes of a bias."""
        return self.panels * PANEL * 4


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is in a record. `matrices` are (up, down) for an expert and (weight,) for a linear layer."""

    kind: Literal["experts", "linear"]
    matrices: tuple[Matrix, ...]
    activation: str | None
    bias: bool

    @property
    def sections(self) -> dict[str, tuple[int, int]]:
        """Name -> (offset, bytes) within a record."""
        names = ("up", "down") if self.kind == "experts" else ("weight",)
        scale_names = [f"{name}_scales" for name in names] if self.kind == "experts" else ["scales"]
        bias_names = [f"{name}_bias" for name in names] if self.kind == "experts" else ["bias"]
        parts = [(name, m.weight_bytes) for name, m in zip(names, self.matrices, strict=True)]
        parts += [(name, m.scale_bytes) for name, m in zip(scale_names, self.matrices, strict=True) if m.groups]
        parts += [(name, m.bias_bytes) for name, m in zip(bias_names, self.matrices, strict=True) if self.bias]
        found, offset = {}, 0
        for name, size in parts:
            found[name] = (offset, size)
            offset = round_up(offset + size, LINE)
        return found

    @property
    def record_bytes(self) -> int:
        """Bytes from one record to the next: whole pages."""
        offset, size = list(self.sections.values())[-1]
        return round_up(offset + size, PAGE)

    @property
    def num_weights(self) -> int:
        """Numbers that a record stands for: weights and biases, without scales and padding."""
        return sum(m.parts * m.outputs * (m.inputs + int(self.bias)) for m in self.matrices)

    @property
    def format(self) -> Format:
        """The format of the weights."""
        return self.matrices[0].format

    @property
    def group_size(self) -> int:
        """Inputs per scale, of formats whose groups have one; 0 otherwise."""
        return self.matrices[0].group_size


def expert_layout(
    hidden_size: int,
    intermediate_size: int,
    activation: str,
    format: Format,
    group_size: int = GROUP_SIZE,
    *,
    gated: bool,
    bias: bool,
) -> Layout:
    """The layout of an expert of width F = `intermediate_size` on a model of width D = `hidden_size`."""
    up = _matrix(intermediate_size, hidden_size, 2 if gated else 1, format, group_size)
    down = _matrix(hidden_size, intermediate_size, 1, format, group_size)
    return Layout("experts", (up, down), activation, bias)


def linear_layout(outputs: int, inputs: int, format: Format, group_size: int = GROUP_SIZE, *, bias: bool) -> Layout:
    """The layout of y = x·Wᵀ (+ b) with W [outputs, inputs]."""
    return Layout("linear", (_matrix(outputs, inputs, 1, format, group_size),), None, bias)


def _matrix(outputs: int, inputs: int, parts: int, format: Format, group_size: int) -> Matrix:
    if format not in FORMATS:
        raise ConfigError(f"format = {format!r}: allowed are {', '.join(FORMATS)}")
    groups = TRAITS[format].groups
    if groups and group_size not in groups:
        raise ConfigError(f"group_size = {group_size!r}: {format} takes {' or '.join(map(str, groups))}")
    for size in (outputs, inputs):
        if not 1 <= size <= LIMIT:
            raise ConfigError(f"a packed matrix of [{outputs}, {inputs}]: sizes are between 1 and {LIMIT}")
    return Matrix(outputs, inputs, parts, format, group_size if groups else 0)
