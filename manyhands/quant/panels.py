"""A matrix to panels and back: plain torch, the reference for whatever writes or reads records faster.

P panels of 16 outputs, N outputs, K inputs (padded), G groups.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.config.packing import TRAITS
from manyhands.quant.record import PANEL, Matrix
from manyhands.quant.rounding import SCALES, quantize

CHUNK_VALUES = 1 << 22
"""Weights that are rounded at a time."""


def to_panels(w: Tensor, matrix: Matrix) -> Tensor:
    """[parts · N, K] -> [P · 16, Kp]: padded, and the parts' panels alternating."""
    w = w.reshape(matrix.parts, matrix.outputs, matrix.inputs)
    per_part = matrix.panels // matrix.parts
    w = F.pad(w, (0, matrix.depth - matrix.inputs, 0, per_part * PANEL - matrix.outputs))
    return w.view(matrix.parts, per_part, PANEL, -1).transpose(0, 1).reshape(matrix.panels * PANEL, -1)


def from_panels(w: Tensor, matrix: Matrix) -> Tensor:
    """The inverse of `to_panels`, without the padding."""
    w = w.view(matrix.panels // matrix.parts, matrix.parts, PANEL, -1).transpose(0, 1)
    return w.reshape(matrix.parts, -1, w.shape[-1])[:, : matrix.outputs, : matrix.inputs].flatten(0, 1)


def _interleave(w: Tensor, steps: int) -> Tensor:
    """[P·16, Kp] -> [P, Kp/steps, 16, steps]."""
    return w.view(-1, PANEL, w.shape[-1] // steps, steps).transpose(1, 2).contiguous()


def _deinterleave(w: Tensor) -> Tensor:
    """The inverse of `_interleave`."""
    return w.transpose(1, 2).reshape(w.shape[0] * PANEL, -1)


def chunks(matrix: Matrix, values: int) -> Iterator[tuple[list[slice], slice, Matrix]]:
    """A matrix some whole panels at a time, about `values` weights each: panels of all parts that stand together.

    Gives the rows of each part, of [parts · N, K]; which panels they are; and the shape of such a piece, which is a
    matrix of its own.
    """
    per_part = matrix.panels // matrix.parts
    together = max(1, values // (matrix.parts * PANEL * matrix.depth))
    for first in range(0, per_part, together):
        last = min(first + together, per_part)
        start, stop = first * PANEL, min(last * PANEL, matrix.outputs)
        rows = [slice(part * matrix.outputs + start, part * matrix.outputs + stop) for part in range(matrix.parts)]
        yield rows, slice(first * matrix.parts, last * matrix.parts), replace(matrix, outputs=stop - start)


def encode(w: Tensor, matrix: Matrix, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """[parts · N, K] in any float dtype -> the section's bytes and the scales' (None without scales), uint8.

    Takes memory for some million weights besides.
    """
    w, found = w.detach(), []
    for rows, _, part in chunks(matrix, CHUNK_VALUES):
        found.append(_encode(torch.cat([w[of_part] for of_part in rows]), part, importance_K))
    scales = [scale for _, scale in found if scale is not None]
    return torch.cat([values for values, _ in found]), torch.cat(scales) if scales else None


def _encode(w: Tensor, matrix: Matrix, importance_K: Tensor | None) -> tuple[Tensor, Tensor | None]:
    padded = to_panels(w.detach().cpu(), matrix)
    if matrix.format == "float32":
        return _interleave(padded.float(), 1).view(torch.uint8).flatten(), None
    if matrix.format == "bf16":
        return _interleave(padded.bfloat16(), 2).view(torch.uint8).flatten(), None
    if importance_K is not None:
        importance_K = F.pad(importance_K.detach().cpu(), (0, matrix.depth - matrix.inputs))
    return lay_out(*quantize(padded, matrix, importance_K), matrix)


def lay_out(q: Tensor, scales_NG: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Integers [P·16, Kp] int8 and scales [P·16, G], both by panels (`to_panels`), -> bytes of the two sections."""
    by_panel = scales_NG.view(matrix.panels, PANEL, -1).transpose(1, 2).contiguous().to(SCALES[matrix.format])
    if TRAITS[matrix.format].bits == 8:
        return _interleave(q, 4).view(torch.uint8).flatten(), by_panel.view(torch.uint8).flatten()
    steps = (_interleave(q, 4) + 8).to(torch.uint8)  # [P, Kp/4, 16, 4]
    return (steps[:, 0::2] | steps[:, 1::2] << 4).flatten(), by_panel.view(torch.uint8).flatten()


def integers(section: Tensor, matrix: Matrix) -> Tensor:
    """[P · 16, Kp] int8: the stored integers of a section whose format has scales."""
    if TRAITS[matrix.format].bits == 8:
        return _deinterleave(section.view(torch.int8).view(matrix.panels, -1, PANEL, 4))
    pairs = section.view(matrix.panels, -1, 1, PANEL, 4)
    steps = torch.cat((pairs & 15, pairs >> 4), dim=2).flatten(1, 2)
    return _deinterleave(steps.to(torch.int8) - 8)


def decode(section: Tensor, scales: Tensor | None, matrix: Matrix) -> Tensor:
    """[parts · N, K] float32: exactly the weights the record stands for, float32(q) · float32(scale)."""
    if matrix.format in ("float32", "bf16"):
        dtype, steps = (torch.float32, 1) if matrix.format == "float32" else (torch.bfloat16, 2)
        panels = section.view(dtype).view(matrix.panels, -1, PANEL, steps)
        return from_panels(_deinterleave(panels).float(), matrix)
    assert scales is not None
    by_output = scales.view(SCALES[matrix.format]).float().view(matrix.panels, -1, PANEL).transpose(1, 2)  # [P, 16, G]
    spread = by_output.reshape(matrix.panels * PANEL, -1, 1)
    q = integers(section, matrix).float().view(matrix.panels * PANEL, matrix.groups, -1)
    return from_panels((q * spread).flatten(-2), matrix)
