"""Packed records read again, byte by byte, from the description at the head of `quant/record.py` and nothing else.

N outputs, K inputs, E experts. A matrix [parts·N, K] lies in panels of 16 outputs, gate and up panels in turn.
"""

import torch
from torch import Tensor, nn

from manyhands.layers.packed_linear import RecordLinear
from manyhands.moe.packed import RecordExperts
from manyhands.quant.record import Layout, Matrix

BITS = {"float32": 32, "bf16": 16, "int8": 8, "int4": 4, "q8_0": 8, "q4_0": 4}
GROUPED = {"int4": torch.bfloat16, "q8_0": torch.float16, "q4_0": torch.float16}


def tensors(record: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Section -> what it stands for, float64: weights [parts·N, K] times their scales, biases [parts·N]."""
    names = ("up", "down") if layout.kind == "experts" else ("",)
    sizes = [_sizes(m) for m in layout.matrices]
    places, offset = [], 0
    for section in range(3):  # all weights, then all scales, then all biases, each on a 64-byte line
        for weight, scales, bias in sizes:
            places.append(offset)
            offset += -(-(weight, scales, bias if layout.bias else 0)[section] // 64) * 64
    found = {}
    for i, (name, m) in enumerate(zip(names, layout.matrices, strict=True)):
        weight, scale, bias = (places[section * len(names) + i] for section in range(3))
        found[name or "weight"] = _weights(record, m, weight, scale)
        if layout.bias:
            found[f"{name}_bias" if name else "bias"] = _floats(record, bias + 4 * _rows(m))
    return found


def _sizes(m: Matrix) -> tuple[int, int, int]:
    """Bytes of weights, scales and bias."""
    rows, depth = m.parts * -(-m.outputs // 16) * 16, -(-m.inputs // 64) * 64
    scales = 2 * rows * depth // m.group_size if m.format in GROUPED else 4 * rows if m.format == "int8" else 0
    return rows * depth * BITS[m.format] // 8, scales, 4 * rows


def _rows(m: Matrix) -> Tensor:
    """[parts·N]: panel · 16 + lane of each output, the gate's first."""
    n = torch.arange(m.outputs)
    return torch.cat([(m.parts * (n // 16) + part) * 16 + n % 16 for part in range(m.parts)])


def _floats(record: Tensor, at: Tensor) -> Tensor:
    """The float32 that begin at these bytes."""
    return record[at[..., None] + torch.arange(4)].view(torch.float32)[..., 0].double()


def _halves(record: Tensor, at: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The numbers of 16 bits that begin at these bytes."""
    return record[at[..., None] + torch.arange(2)].view(dtype)[..., 0].double()


def _weights(record: Tensor, m: Matrix, start: int, scales: int) -> Tensor:
    row, k = _rows(m)[:, None], torch.arange(m.inputs)[None]
    panel, lane, depth = row // 16, row % 16, -(-m.inputs // 64) * 64
    nibbles = BITS[m.format] == 4
    step = 4 if nibbles else 32 // BITS[m.format]  # inputs of one output that lie side by side
    lines = k // 8 if nibbles else k // step
    index = ((panel * (depth // (8 if nibbles else step)) + lines) * 16 + lane) * step + k % step
    if m.format == "float32":
        return _floats(record, start + 4 * index)
    if m.format == "bf16":
        return _halves(record, start + 2 * index)
    if m.format == "int8":
        return record[start + index].view(torch.int8).double() * _floats(record, scales + 4 * row)
    group = (panel * (depth // m.group_size) + k // m.group_size) * 16 + lane
    scale = _halves(record, scales + 2 * group, GROUPED[m.format])
    if not nibbles:
        return record[start + index].view(torch.int8).double() * scale
    half = (k // 4) % 2  # the low four bits hold the first four of eight inputs
    q = (record[start + index].long() >> (4 * half)) % 16 - 8
    return q.double() * scale


def unpacked(module: nn.Module) -> dict[str, Tensor]:
    """Every weight that lies in a record inside `module`, float64, by the name it has unpacked."""
    found: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, RecordLinear):
            found |= {prefix + leaf: t for leaf, t in tensors(part.record, part.layout).items()}
        elif isinstance(part, RecordExperts):
            each = [tensors(record, part.layout) for record in part.records]
            gated = "gate_up_proj" if part.layout.matrices[0].parts == 2 else "up_proj"
            for leaf in each[0]:
                full = leaf.replace("up", gated, 1) if leaf.startswith("up") else leaf.replace("down", "down_proj", 1)
                found[prefix + full] = torch.stack([one[leaf] for one in each])
    return found
