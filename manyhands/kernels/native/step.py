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
from manyhands.kernels.native.library import (
    CAttention,
    CCache,
    CLatent,
    CLinear,
    CNorm,
    CRotation,
    CRouter,
    CSequences,
    available,
)

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
    """Keys and values [N, G, P, width]: N rows in one piece of P positions each, or a pool's N blocks of P positions.

    One dtype, unit stride along the width; `v` may be a part of `k`.
    """
    held = CCache()
    bind_cache(held, k, v)
    return held


def bind_cache(held: CCache, k: Tensor, v: Tensor) -> None:
    """Fill a structure as `cache_of` does."""
    held.k, held.v, held.dtype = k.data_ptr(), v.data_ptr(), views.DTYPES[k.dtype]
    held.groups, held.block, held.k_width, held.v_width = k.shape[1], k.shape[2], k.shape[3], v.shape[3]
    held.k_block, held.k_group, held.k_row = k.stride()[:3]
    held.v_block, held.v_group, held.v_row = v.stride()[:3]
    held.k_size, held.v_size = (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (k, v))


@dataclass(frozen=True, slots=True)
class Sequences:
    """Who the rows of a call are: sequence s has rows [begin[s], begin[s + 1]) at positions first[s] and following.

    All are contiguous int64. The structure points into them.
    """

    begin: Tensor
    """[count + 1]"""
    first: Tensor
    """[count]"""
    table: Tensor
    """[count]: `blocks[table[s] + p // P]` is the block of position p; of rows in one piece, the row."""
    blocks: Tensor
    start: Tensor | None = None
    """[count]: positions at the head that are padding; None: there is none."""

    def struct(self) -> CSequences:
        """What the calls take; good while the tensors live and keep their sizes."""
        parts = (self.begin, self.first, self.table, self.blocks, self.start)
        assert all(t is None or (t.dtype == torch.int64 and t.dim() == 1 and t.is_contiguous()) for t in parts)
        begin, first, table, blocks, start = (None if t is None else t.data_ptr() for t in parts)
        return CSequences(self.first.shape[0], begin, first, table, blocks, self.blocks.shape[0], start)


def rectangle(B: int, S: int, first: int, start: Tensor | None = None) -> Sequences:
    """B sequences with S rows each from position `first` on, in a cache [B, G, P, width] in one piece."""
    rows = torch.arange(B + 1)
    return Sequences(rows * S, torch.full((B,), first), rows[:B], rows[:B], start)


@dataclass(frozen=True, slots=True)
class Rotation:
    """How projected heads become queries and keys: `norms` ("full", "head", "head_after_rope"), and the turning."""

    cos: Tensor
    """[rows, r / 2] float32, and so `sin`."""
    sin: Tensor
    interleave: bool
    norms: str = "none"
    q_norm: CNorm = NO_NORM
    k_norm: CNorm = NO_NORM


NORMS = {"none": 0, "full": 0, "head": 1, "head_after_rope": 2}


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    sequences: Sequences,
    rotation: Rotation,
    cache: CCache,
    level: int = -1,
    threads: int = 0,
) -> Tensor:
    """Projected q [rows, H·d], k and v [rows, G·d] -> normed, turned q [rows, H·d] float32.

    Keys and values go into the cache, each to its row's position; v is None where the values lie in the keys.
    """
    held = [None if t is None else views.unit_stride(t) for t in (q, k, v)]
    cos, sin = rotation.cos.contiguous(), rotation.sin.contiguous()
    turning = CRotation(
        cos.data_ptr(),
        sin.data_ptr(),
        2 * cos.shape[-1],
        cos.shape[0],
        int(rotation.interleave),
        rotation.q_norm,
        rotation.k_norm,
        NORMS[rotation.norms],
    )
    out = torch.empty(q.shape, dtype=torch.float32)
    library.call(
        "mh_rope_and_cache",
        *(None if t is None else views.at(t) for t in held),
        byref(sequences.struct()),
        byref(turning),
        byref(cache),
        out.data_ptr(),
        views.run(level, threads),
    )
    return out


def attend(
    q: Tensor,
    cache: CCache,
    sequences: Sequences,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    cap: float | None = None,
    level: int = -1,
    threads: int = 0,
) -> Tensor:
    """q [rows, H, k width] float32 -> [rows, H, v width] float32: each row to its sequence's keys up to its own.

    With a `window` a row at position p sees keys after p − window only; a sink [H] takes part in the softmax and has
    no value; `cap` is the soft cap of the logits. Rows that are padding get zeros.
    """
    q = q.contiguous()
    rows, H, _ = q.shape
    y = torch.empty(rows, H, cache.v_width, dtype=torch.float32)
    sinks = None if sinks is None else sinks.float().contiguous()
    how = CAttention(H, window or 0, None if sinks is None else sinks.data_ptr(), scale, cap or 0.0)
    who = sequences.struct()
    library.call(
        "mh_attend", byref(how), byref(who), q.data_ptr(), byref(cache), y.data_ptr(), views.run(level, threads)
    )
    return y


def latent_of(weight: Tensor, heads: int, nope: int) -> CLatent:
    """kv_b_proj's contiguous weight [heads · (nope + value), R], float32 or bfloat16; all but heads multiples of 16."""
    each = weight.shape[0] // heads
    dtype = views.DTYPES[weight.dtype]
    return CLatent(weight.data_ptr(), weight.numel(), dtype, heads, nope, each - nope, weight.shape[1])


def latent_products(latent: CLatent, values: bool, x: Tensor, level: int = -1, threads: int = 0) -> Tensor:
    """Of each head W_kᵀ x, [rows, H · nope] -> [rows, H · R], or with `values` W_v x, [rows, H · R] -> [rows, H · v].

    Float32; a row's bits are those that it has alone.
    """
    x = views.unit_stride(x)
    y = torch.empty(x.shape[0], latent.heads * (latent.value if values else latent.width))
    run = views.run(level, threads)
    library.call("mh_latent_products", byref(latent), int(values), views.at(x), views.at(y), run)
    return y


def latent_rope_and_cache(
    latent: CLatent,
    q: Tensor,
    kv: Tensor,
    sequences: Sequences,
    rotation: Rotation,
    cache: CCache,
    placed: Tensor,
    level: int = -1,
    threads: int = 0,
) -> None:
    """Latents kv [rows, R + r], normed (`k_norm`) and their end turned, go into the cache; the end of each head of
    q [rows, H · (nope + r)], turned, to that of placed [rows, H · (R + r)]. All float32.
    """
    cos, sin = rotation.cos.contiguous(), rotation.sin.contiguous()
    turning = CRotation(cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[-1], cos.shape[0], int(rotation.interleave))
    turning.k_norm = rotation.k_norm
    who, rows = sequences.struct(), (views.at(q), views.at(kv))
    run = views.run(level, threads)
    library.call(
        "mh_latent_rope_and_cache",
        byref(latent),
        *rows,
        byref(who),
        byref(turning),
        byref(cache),
        views.at(placed),
        run,
    )


def route(router: CRouter, x_TD: Tensor, level: int = -1, threads: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [T, E], scores [T, E], ids [T, K] and weights [T, K] of tokens [T, D], D a multiple of 16."""
    x = views.unit_stride(x_TD)
    T = x.shape[0]
    logits, scores = torch.empty(T, router.experts), torch.empty(T, router.experts)
    ids, weights = torch.empty(T, router.per_token, dtype=torch.int64), torch.empty(T, router.per_token)
    outputs = (logits.data_ptr(), scores.data_ptr(), ids.data_ptr(), weights.data_ptr())
    library.call("mh_route", byref(router), views.at(x), *outputs, views.run(level, threads))
    return logits, scores, ids, weights
