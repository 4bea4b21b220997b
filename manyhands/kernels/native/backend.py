"""The backend `native`: experts in C++, on the stacked weights as they are.

float32 tokens are multiplied with float32 weights, bfloat16 tokens with bfloat16 weights and float32 sums. The kernels
transpose and round a piece of the weights while it is in cache, so that there is no second copy to keep and none to go
stale (fused optimisers change weights without changing their version).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.kernels.experts import ExpertWeights
from manyhands.kernels.moment import ordinary
from manyhands.kernels.native import ops
from manyhands.kernels.native.library import ACTIVATION_CODES, level_code
from manyhands.kernels.native.views import DTYPES


def supports_native(x: Tensor, experts: ExpertWeights) -> bool:
    """Float32 and bfloat16 on the CPU, and the activations that have kernels."""
    here = x.device.type == "cpu" and experts.down.device.type == "cpu"
    return here and x.dtype in DTYPES and experts.activation in ACTIVATION_CODES


@dataclass(frozen=True, slots=True)
class Native:
    """The backend at a forced `level` and number of `threads` (0: as many as PyTorch uses)."""

    level: str | None = None
    threads: int = 0

    def __call__(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: ExpertWeights
    ) -> Tensor:
        """[T, D] -> [T, D]."""
        if not supports_native(x_TD, experts):
            raise ConfigError(
                f"experts_implementation = 'native' takes float32 and bfloat16 on the CPU with one of "
                f"{', '.join(ACTIVATION_CODES)}, not {x_TD.dtype} on {x_TD.device.type} with {experts.activation}: "
                "use 'eager' or 'auto'"
            )
        tensors = (x_TD, ids_TK, weights_TK, kept_TK, *experts[:4])
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        direct = not save and ordinary()  # the dispatcher costs more than a small expert
        op: Any = ops.experts if direct else torch.ops.manyhands.experts
        y, _ = op(*tensors, experts.activation, save, level_code(self.level), self.threads)
        return cast(Tensor, y)
