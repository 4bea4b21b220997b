"""The backend `native`: experts in C++, on stacked weights or packed records as they lie in memory.

float32 tokens are multiplied with float32 weights, bfloat16 tokens with bfloat16 weights and float32 sums. The kernels
transpose and round a piece of the weights while it is in cache, so that there is no second copy to keep and none to go
stale (fused optimisers change weights without changing their version).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.kernels.experts import Bank, ExpertWeights
from manyhands.kernels.moment import ordinary
from manyhands.kernels.native import fetch, ops
from manyhands.kernels.native.library import ACTIVATION_CODES, available, level_code
from manyhands.kernels.native.packed import packed_experts
from manyhands.kernels.native.views import DTYPES
from manyhands.quant import FetchedExperts, PackedExperts


def supports_native(x: Tensor, experts: Bank) -> bool:
    """Float32 and bfloat16 tokens on the CPU, weights that lie there, and an activation there are kernels for."""
    lie = experts.in_memory()
    if not available():
        return False
    if lie is None:
        fetched = _fetched(experts)
        save = torch.is_grad_enabled() and x.requires_grad  # for which there is no kernel
        here = fetched is not None and x.device.type == "cpu" and x.dtype in DTYPES and not save
        return here and experts.activation in ACTIVATION_CODES
    held = lie.down if isinstance(lie, ExpertWeights) else lie.records
    here = x.device.type == "cpu" and held.device.type == "cpu"
    return here and x.dtype in DTYPES and experts.activation in ACTIVATION_CODES


def _fetched(experts: Bank) -> FetchedExperts | None:
    """Of a bank that a source brings records for."""
    look = getattr(experts, "fetched_experts", None)
    return None if look is None else cast(FetchedExperts | None, look())


@dataclass(frozen=True, slots=True)
class Native:
    """The backend at a forced `level` and number of `threads` (0: as many as PyTorch uses)."""

    level: str | None = None
    threads: int = 0

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: Bank) -> Tensor:
        """[T, D] -> [T, D]."""
        lie, fetched = experts.in_memory(), _fetched(experts)
        if fetched is not None and supports_native(x_TD, experts):
            level = level_code(self.level)
            return fetch.forward(x_TD, ids_TK, weights_TK, kept_TK, fetched, fetched.layer, level, self.threads)
        if lie is None:
            raise ConfigError(
                f"experts_implementation = 'native' reads weights where they lie, stacked or packed; "
                f"{type(experts).__name__} makes them when asked: use 'eager' or 'auto'"
            )
        if not supports_native(x_TD, experts):
            raise ConfigError(
                f"experts_implementation = 'native' takes float32 and bfloat16 on the CPU with one of "
                f"{', '.join(ACTIVATION_CODES)}, not {x_TD.dtype} on {x_TD.device.type} with {experts.activation}: "
                "use 'eager' or 'auto'"
            )
        if isinstance(lie, PackedExperts):
            return packed_experts(x_TD, ids_TK, weights_TK, kept_TK, lie, self.level, self.threads)
        tensors = (x_TD, ids_TK, weights_TK, kept_TK, *lie[:4])
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        direct = not save and ordinary()  # the dispatcher costs more than a small expert
        op: Any = ops.experts if direct else torch.ops.manyhands.experts
        y, _ = op(*tensors, lie.activation, save, level_code(self.level), self.threads)
        return cast(Tensor, y)
