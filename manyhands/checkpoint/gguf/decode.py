"""GGML's number formats as float32, through the `gguf` package, a part of a tensor at a time."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from manyhands.checkpoint.tensors import FLOATS
from manyhands.errors import CheckpointError

BLOCKS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS"),
    *("IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
"""What `gguf` 0.19 decodes."""
_CHUNK = 1 << 18  # values at a time


def check_readable(name: str, where: str) -> None:
    """Raises `CheckpointError`, beginning with `where`, if no tensor of that type can be read here."""
    if name in FLOATS:
        return
    if name not in BLOCKS:
        raise CheckpointError(f"{where} is {name}, which is not decoded; known: {', '.join((*FLOATS, *BLOCKS))}")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CheckpointError(f'{where} is {name}: to decode it, pip install "manyhands[gguf]"') from None


def decode_rows(raw_RB: Tensor, name: str) -> Iterator[tuple[int, Tensor]]:
    """Rows as they are stored -> (number of the first row, values [n,K] float32), a chunk at a time.

    `raw_RB` is uint8 [R, bytes of a row], or [R,K] of a float dtype, which is given back as it is.
    """
    if name in FLOATS:
        yield 0, raw_RB
        return
    import gguf
    from gguf.quants import dequantize

    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rows = max(1, _CHUNK // (raw_RB.shape[1] // size * values))
    for start in range(0, len(raw_RB), rows):
        with np.errstate(all="ignore"):  # scales may be anything
            yield start, torch.from_numpy(dequantize(raw_RB[start : start + rows].numpy(), kind))


def decode_into(raw: Tensor, name: str, out: Tensor) -> None:
    """`raw` as it is stored, with any number of dimensions, into `out` of any float dtype and strides."""
    if out.dim() == 1:
        raw, out = raw[None], out[None]
    if out.dim() > 2:
        for part, into in zip(raw, out, strict=True):
            decode_into(part, name, into)
        return
    for start, values in decode_rows(raw, name):
        put(values, out[start : start + len(values)])


def put(values: Tensor, out: Tensor) -> None:
    """`out.copy_(values)`; by numpy where it can, since small copies by several threads wait for one another."""
    if values.dtype == out.dtype == torch.float32:
        np.copyto(out.numpy(), values.numpy())
    else:
        out.copy_(values)
