"""The arithmetic of stored formats: codes become float32 values in a small buffer, are scaled, and rounded once.

Letters: E experts, N rows, K columns, B bytes per row, S rows of scales, G scales per row.

Sources: OCP 8-bit Floating Point v1.0 (e4m3, e5m2); OCP Microscaling Formats v1.0 (e2m1, e8m0: the scale 255 is NaN and
makes its whole group NaN, the scale 0 is 2⁻¹²⁷); compressed-tensors of August 2026, `pack_quantized` (integers).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from manyhands.errors import CheckpointError

Unpack: TypeAlias = Callable[[Tensor, Tensor], None]  # (codes uint8 [n,B], values float32 [n,K], to be filled)

_CHUNK = 1 << 20  # values at a time: 4 MiB as float32, so that passes over them stay in the cache
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def decode_fp8(parts: Sequence[Tensor], out: Tensor, *, block: tuple[int, int]) -> None:
    """`parts`: weight float8 [N,K] or [E,N,K]; its scales, one per block [rows, columns] or one for everything.

    A float32 scale multiplies; uint8 is an e8m0 exponent.
    """
    weight, scale = parts
    unpack = unpack_e5m2 if weight.dtype == torch.float8_e5m2 else unpack_e4m3
    codes_ENB, out_ENK, scale_ESG = _stack(weight.view(torch.uint8)), _stack(out.detach()), _stack(_exponents(scale))
    scale_ESG = scale_ESG.expand(len(codes_ENB), -1, -1)
    for codes_NB, scale_SG, out_NK in zip(codes_ENB, scale_ESG, out_ENK, strict=True):
        decode_blocks(codes_NB, unpack, scale_SG, block, out_NK)


def decode_int(parts: Sequence[Tensor], out: Tensor, *, num_bits: int, group: int, shape: list[int], said: str) -> None:
    """`parts`: codes int32 [N, K·num_bits/32], scales [N, K/group], the shape, and packed zero points if there are any.

    With experts each has a dimension E in front. The first value is in a word's lowest bits, and 0 is stored as
    2^(num_bits-1). Raises `CheckpointError`, beginning with `said`, if the stored shape is not `shape`.
    """
    packed, scale, stored_shape, *zero = parts
    if stored_shape.tolist() != shape:
        raise CheckpointError(f"{said} says {stored_shape.tolist()}; the packed values make {shape}")
    unpack = _by_pairs([code - 8.0 for code in range(16)]) if num_bits == 4 else _unpack_int8
    codes_ENB, scale_ENG, out_ENK = _stack(packed.view(torch.uint8)), _stack(scale), _stack(out.detach())
    for expert, out_NK in enumerate(out_ENK):
        zero_NG = _unpack_rows(_stack(zero[0])[expert], num_bits, len(out_NK)) if zero else None
        decode_blocks(codes_ENB[expert], unpack, scale_ENG[expert], (1, group), out_NK, zero_NG)


def decode_mxfp4(parts: Sequence[Tensor], out: Tensor) -> None:
    """`parts`: blocks uint8 [E,N,G,16], first value in the low half of a byte; scales uint8 [E,N,G]. `out`: [E,32G,N].

    All three may be sliced alike, by experts or by rows N. Twice as fast if `out` is a transposed view of [E,N,32G],
    so that what is written is contiguous in memory.
    """
    blocks, scales = parts
    unpack = _by_pairs(_E2M1)
    for codes_NGB, scale_NG, out_KN in zip(blocks, _exponents(scales), out.detach(), strict=True):
        decode_blocks(codes_NGB.flatten(1), unpack, scale_NG, (1, 32), out_KN.T)


def decode_blocks(
    codes_NB: Tensor,
    unpack: Unpack,
    scale_SG: Tensor,
    block: tuple[int, int],
    out_NK: Tensor,
    zero_NG: Tensor | None = None,
) -> None:
    """`out = (unpack(codes) - zero) · scale`, where a scale serves a block [rows, columns]; the last may be ragged."""
    n, k = out_NK.shape
    if n == 0 or k == 0:
        return
    height, width = min(block[0], n), min(block[1], k)
    step = max(1, _CHUNK // k)
    buffer = torch.empty(min(step, n), k, dtype=torch.float32)
    full = k // width
    for start in range(0, n, step):
        stop = min(start + step, n)
        values = buffer[: stop - start]
        unpack(codes_NB[start:stop], values)
        first = start // height
        scale = scale_SG[first : (stop - 1) // height + 1].to(torch.float32)
        if height > 1:
            scale = scale[torch.arange(start, stop) // height - first]
        blocks = values[:, : full * width].view(-1, full, width)
        if zero_NG is not None:
            blocks.sub_(zero_NG[start:stop, :, None])
        blocks.mul_(scale[:, :full, None])
        values[:, full * width :].mul_(scale[:, full:])
        target = out_NK[start:stop]
        target.copy_(values if target.stride(1) == 1 else values.to(target.dtype))  # a transposing copy converts slowly


def unpack_e4m3(codes: Tensor, values: Tensor) -> None:
    """Through float16, several times as fast as torch's own conversion on a CPU.

    A code is s eeee mmm. As the float16 s 0eeee mmm0000000 it is the same number times 2⁻⁸, subnormals included. Only
    NaN, s 1111 111, comes out as a number: 480, which is no other code's value.
    """
    half = codes.view(torch.int8).to(torch.int16)  # the sign is extended: sssssssss eeee mmm
    half.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    values.copy_(half.view(torch.float16)).mul_(256)
    if int((codes & 0x7F).max()) == 0x7F:
        values.masked_fill_(values.abs() == 480, torch.nan)


def unpack_e5m2(codes: Tensor, values: Tensor) -> None:
    """A code is the upper byte of a float16."""
    values.copy_(codes.to(torch.int16).bitwise_left_shift_(8).view(torch.float16))


def _unpack_int8(codes: Tensor, values: Tensor) -> None:
    values.copy_(codes).sub_(128)


def _by_pairs(sixteen: Sequence[float]) -> Unpack:
    """Two 4-bit codes per byte, the low half first: a byte selects a pair of float32, moved as one int64."""
    values = torch.tensor(sixteen, dtype=torch.float32)
    byte = torch.arange(256)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(torch.int64).flatten()

    def unpack(codes: Tensor, values: Tensor) -> None:
        index = codes.flatten().to(torch.int32)
        torch.index_select(pairs, 0, index, out=values.view(-1).view(torch.int64))

    return unpack


def _unpack_rows(words: Tensor, num_bits: int, n: int) -> Tensor:
    """Integers packed down the columns: int32 [⌈n·num_bits/32⌉, G] → int8 [n,G]."""
    per_word = 32 // num_bits
    rows = words.new_empty(n, words.shape[1], dtype=torch.int8)
    for i in range(min(per_word, n)):
        every = rows[i::per_word]
        every.copy_((words[: len(every)] >> i * num_bits) & (1 << num_bits) - 1).sub_(1 << num_bits - 1)
    return rows


def _exponents(scale: Tensor) -> Tensor:
    return scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale


def _stack(tensor: Tensor) -> Tensor:
    """A view with the dimension of experts in front; a single number is a [1,1,1]."""
    if tensor.dim() < 2:
        return tensor.reshape(1, 1, 1)
    return tensor if tensor.dim() == 3 else tensor[None]
