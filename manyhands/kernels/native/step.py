"""What a decoding step does beside the experts, in C++: norms, routing, layers with one input, attention to a cache.

PyTorch does each of these in several operators, which for one token cost more than the work. Here nothing has a
gradient and nothing can be traced: ask `direct` first. T tokens, D model width, B batch, S queries, L positions,
H heads, G key/value heads, E experts, K experts per token.
"""

from collections.abc import Sequence
from ctypes import addressof, byref, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.kernels.moment import ordinary
from manyhands.kernels.native import library, views
from manyhands.kernels.native.library import CAttention, CCache, CLinear, CNorm, CRotation, CRouter, available

NO_NORM = CNorm()


def direct(x: Tensor) -> bool:
    """Whether the functions below take `x` here: float32 or bfloat16 on the CPU, no gradient, an ordinary moment."""
    return (
        ordinary()
        and not torch.is_grad_enabled()
        and x.dtype in views.DTYPES
        and type(x) is Tensor
        and x.device.type == "cpu"
        and available()
    )


def norm_of(weight: Tensor, eps: float) -> CNorm:
    """The structure for a contiguous weight [width], float32 or bfloat16."""
    return CNorm(weight.data_ptr(), views.DTYPES[weight.dtype], weight.shape[0], eps)


def rms_norm(x: Tensor, norm: CNorm, level: int = -1, threads: int = 0) -> Tensor:
    """[..., width] -> the same: x / rms(x) · weight, in float32 and rounded once."""
    rows = views.unit_stride(x.reshape(-1, x.shape[-1]))
    y = torch.empty(rows.shape, dtype=x.dtype)
    library.call("mh_rms_norm", byref(norm), views.at(rows), views.at(y), views.run(level, threads))
    return y.view(x.shape)


def linears(x: Tensor, layers: Sequence[CLinear], level: int = -1, threads: int = 0) -> list[Tensor]:
    """[..., K] -> [..., outputs] for each layer, in one call."""
    rows = views.unit_stride(x.reshape(-1, x.shape[-1]))
    shape = x.shape[:-1]
    ys = [torch.empty(*shape, layer.weight.outputs, dtype=x.dtype) for layer in layers]
    n = len(ys)
    pointers, outputs = (c_void_p * n)(*map(addressof, layers)), (c_void_p * n)(*[y.data_ptr() for y in ys])
    library.call("mh_linears", pointers, n, views.at(rows), outputs, views.run(level, threads))
    return ys


def cache_of(k: Tensor, v: Tensor) -> CCache:
    """Keys and values [B, G, room, width]; one dtype, unit stride along the width."""
    held = CCache()
    bind_cache(held, k, v)
    return held


def bind_cache(held: CCache, k: Tensor, v: Tensor) -> None:
    """Fill a structure as `cache_of` does."""
    held.k, held.v, held.dtype = k.data_ptr(), v.data_ptr(), views.DTYPES[k.dtype]
    held.groups, held.k_width, held.v_width = k.shape[1], k.shape[3], v.shape[3]
    held.k_batch, held.k_group, held.k_row = k.stride()[:3]
    held.v_batch, held.v_group, held.v_row = v.stride()[:3]
    held.k_size, held.v_size = (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (k, v))


def set_mask(attention: CAttention, mask: Tensor | None) -> None:
    """Point to a mask [B or 1, 1, S, length] bool with unit stride along the keys, or to none."""
    attention.mask = None if mask is None else mask.data_ptr()
    if mask is not None:
        attention.mask_batch = 0 if mask.shape[0] == 1 else mask.stride(0)
        attention.mask_query = mask.stride(2)


@dataclass(frozen=True, slots=True)
class Rotation:
    """How projected heads become queries and keys: `norms` ("full", "head", "head_after_rope"), and the turning."""

    cos: Tensor
    """[B or 1, 1, S, r / 2] float32, and so `sin`."""
    sin: Tensor
    interleave: bool
    norms: str = "none"
    q_norm: CNorm = NO_NORM
    k_norm: CNorm = NO_NORM


NORMS = {"none": 0, "full": 0, "head": 1, "head_after_rope": 2}


def rope_and_cache(
    q: Tensor, k: Tensor, v: Tensor, first: int, rotation: Rotation, cache: CCache, level: int = -1, threads: int = 0
) -> Tensor:
    """Projected q [B, S, H·d], k and v [B, S, G·d] -> normed, turned q [B, S, H·d] float32.

    Keys and values go into the cache at positions [first, first + S).
    """
    B = q.shape[0]
    rows = [views.unit_stride(t.reshape(-1, t.shape[-1])) for t in (q, k, v)]
    cos, sin = rotation.cos.contiguous(), rotation.sin.contiguous()
    turning = CRotation(
        cos.data_ptr(),
        sin.data_ptr(),
        2 * cos.shape[-1],
        cos.shape[0] * cos.shape[2],
        int(rotation.interleave),
        rotation.q_norm,
        rotation.k_norm,
        NORMS[rotation.norms],
    )
    out = torch.empty(q.shape, dtype=torch.float32)
    library.call(
        "mh_rope_and_cache",
        *(views.at(t) for t in rows),
        B,
        first,
        byref(turning),
        byref(cache),
        out.data_ptr(),
        views.run(level, threads),
    )
    return out


def attend(
    q: Tensor,
    cache: CCache,
    length: int,
    scale: float,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    cap: float | None = None,
    level: int = -1,
    threads: int = 0,
) -> Tensor:
    """q [B, S, H, k width] float32, the last of `length` positions -> [B, S, H, v width] float32.

    `mask` [B or 1, 1, S, length] bool is true where a query may look, beside looking only back; a sink [H] takes part
    in the softmax and has no value; `cap` is the soft cap of the logits.
    """
    q = q.contiguous()
    B, S, H, _ = q.shape
    y = torch.empty(B, S, H, cache.v_width, dtype=torch.float32)
    sinks = None if sinks is None else sinks.float().contiguous()
    how = CAttention(B, S, H, length, None, 0, 0, None if sinks is None else sinks.data_ptr(), scale, cap or 0.0)
    set_mask(how, mask)
    library.call("mh_attend", byref(how), q.data_ptr(), byref(cache), y.data_ptr(), views.run(level, threads))
    return y


def route(router: CRouter, x_TD: Tensor, level: int = -1, threads: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [T, E], scores [T, E], ids [T, K] and weights [T, K] of tokens [T, D], D a multiple of 16."""
    x = views.unit_stride(x_TD)
    T = x.shape[0]
    logits, scores = torch.empty(T, router.experts), torch.empty(T, router.experts)
    ids, weights = torch.empty(T, router.per_token, dtype=torch.int64), torch.empty(T, router.per_token)
    outputs = (logits.data_ptr(), scores.data_ptr(), ids.data_ptr(), weights.data_ptr())
    library.call("mh_route", byref(router), views.at(x), *outputs, views.run(level, threads))
    return logits, scores, ids, weights
