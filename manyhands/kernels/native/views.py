"""Tensors and layouts as the C structures of the library.

T tokens, K experts per token, N rows of a matrix.
"""

from collections.abc import Container
from ctypes import Array, addressof, byref, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from manyhands.kernels.experts import ExpertWeights
from manyhands.kernels.moment import is_exact
from manyhands.kernels.native.library import default_level, level_code
from manyhands.kernels.native.structs import (
    ACTIVATION_CODES,
    FORMAT_CODES,
    PLAIN_BF16,
    PLAIN_FLOAT32,
    PLAIN_ROUNDED,
    CExperts,
    CLinear,
    CMatrix,
    CRouting,
    CRows,
    CRun,
    CStacked,
)
from manyhands.quant import Layout, Matrix

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
MOST_THREADS = 256


def rows(t: Tensor) -> CRows:
    """[N, width] float32 or bfloat16 with unit stride along the width."""
    count, width = t.shape
    return CRows(t.data_ptr(), DTYPES[t.dtype], count, width, max(t.stride(0), width))


def plain(t: Tensor, dims: int, dtypes: Container[torch.dtype] = DTYPES) -> bool:
    """Whether the kernels can read `t` where it lies: contiguous on the CPU, of this many dimensions, nothing special.

    A subclass of Tensor (DTensor, a quantised weight) holds its numbers in a way of its own.
    """
    kind = type(t) is Tensor or type(t) is torch.nn.Parameter
    return kind and t.dim() == dims and t.dtype in dtypes and t.device.type == "cpu" and t.is_contiguous()


def at(t: Tensor) -> Any:
    """A reference to `mh_rows`."""
    return byref(rows(t))


def unit_stride(t: Tensor) -> Tensor:
    """`t`, or a copy of it whose rows are contiguous. A row may not overlap the next (an expanded gradient)."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def routing(ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor) -> tuple[CRouting, Any]:
    """The structure, and the tensors it points into, which must live as long."""
    kept = ids_TK.contiguous(), weights_TK.float().contiguous(), kept_TK.contiguous()
    T, K = ids_TK.shape
    return CRouting(*(t.data_ptr() for t in kept), T, K), kept


@lru_cache(maxsize=256)
def _matrix(layout: Layout, index: int) -> CMatrix:
    m: Matrix = layout.matrices[index]
    name = ("up", "down")[index] if layout.kind == "experts" else "weight"
    prefix = f"{name}_" if layout.kind == "experts" else ""
    places = [layout.sections.get(section, (-1, 0))[0] for section in (name, f"{prefix}scales", f"{prefix}bias")]
    return CMatrix(m.outputs, m.inputs, m.parts, FORMAT_CODES[m.format], m.group_size, *places)


def matrix(layout: Layout, index: int) -> CMatrix:
    """Matrix `index` of a record."""
    return _matrix(layout, index)


@lru_cache(maxsize=256)
def _activation(layout: Layout) -> int:
    assert layout.activation is not None
    return ACTIVATION_CODES[layout.activation]


@lru_cache(maxsize=1024)
def _table(first: int, E: int, size: int) -> Array[c_void_p]:
    """Addresses of E records of `size` bytes that lie one behind the other. It depends on these numbers alone."""
    return (c_void_p * E)(*range(first, first + E * size, size))


def experts(records: Tensor, layout: Layout) -> tuple[CExperts, Any]:
    """[E, record_bytes] uint8 and what is in it; and the table pointed into, which must live as long."""
    E, size = records.shape
    table = _table(records.data_ptr(), E, size)
    return _experts(addressof(table), E, layout), table


def table_experts(table: Tensor, layout: Layout) -> CExperts:
    """The addresses of E records [E] int64, 0 where one is not in memory: read where they lie, in every call."""
    return _experts(table.data_ptr(), table.shape[0], layout)


def _experts(table: int, E: int, layout: Layout) -> CExperts:
    return CExperts(table, E, layout.record_bytes, _activation(layout), _matrix(layout, 0), _matrix(layout, 1))


def stacked(experts: ExpertWeights, dtype: torch.dtype) -> tuple[CStacked, Any]:
    """Weights as they are, to be multiplied in `dtype`; and the tensors pointed into, which must live as long."""
    E, D, F = experts.down.shape
    exact = experts.up.dtype == experts.down.dtype and experts.up.dtype in DTYPES
    source = experts.up.dtype if exact and (dtype, experts.up.dtype) != (torch.float32, torch.bfloat16) else dtype
    up, down = (t.detach().to(source).contiguous() for t in experts[:2])
    biases = [None if b is None else b.detach().float().contiguous() for b in experts[2:4]]
    code = PLAIN_FLOAT32 if dtype == torch.float32 else PLAIN_BF16 if source == dtype else PLAIN_ROUNDED
    pointers = [None if b is None else b.data_ptr() for b in biases]
    activation = ACTIVATION_CODES[experts.activation]
    return CStacked(up.data_ptr(), down.data_ptr(), *pointers, code, E, D, F, activation), (up, down, biases)


def linear(record: Tensor, layout: Layout) -> CLinear:
    """[record_bytes] uint8 and what is in it."""
    return CLinear(record.data_ptr(), record.numel(), _matrix(layout, 0))


def plain_linear(weight: Tensor, bias: Tensor | None) -> CLinear:
    """Contiguous weights [N, K] float32 or bfloat16, K a multiple of 16; the bias contiguous float32."""
    N, K = weight.shape
    code = PLAIN_FLOAT32 if weight.dtype == torch.float32 else PLAIN_BF16
    place = None if bias is None else bias.data_ptr()
    return CLinear(weight.data_ptr(), weight.nbytes, CMatrix(N, K, 1, code, 0, 0, -1, -1), place)


def run(level: int, threads: int, exact: bool | None = None) -> Any:
    """A reference to `mh_run`; level -1 is the default one, 0 threads are as many as PyTorch uses.

    `exact` None: as the moment asks (`moment.exactly`), so that no call inside can forget it.
    """
    return _run(level, min(threads or torch.get_num_threads(), MOST_THREADS), is_exact() if exact is None else exact)


@lru_cache(maxsize=64)
def _run(level: int, threads: int, exact: bool) -> Any:
    return byref(CRun(level_code(default_level()) if level < 0 else level, threads, exact))
