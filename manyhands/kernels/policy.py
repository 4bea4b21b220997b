"""Which of several ways is taken: every threshold and rule, with what was measured (docs/performance.md says how).

All ways compute the same. Facts about this machine are asked for when they are needed, not when this is imported.
"""

from functools import cache

import torch
from torch import Tensor

from manyhands.kernels.experts import Bank, ExpertWeights
from manyhands.kernels.low_rank import AdaptedWeights
from manyhands.kernels.moment import is_exact
from manyhands.kernels.native.library import available, default_level

FEW_ROWS = 16
"""A linear layer: up to so many rows the native kernels read the weights 1.4 times as fast as PyTorch."""
ROUND_ROWS = 8192
"""A linear layer in bfloat16: rows of weights widened at a time, so that a large head needs no second copy."""
FEW_SCORES = 1 << 12
"""A top-k: sorting so few takes less than the steps to a top-k (a fifth, for one token among 64 experts)."""
FEW_QUERIES = 8
"""Attention to a cache: up to so many queries the native kernels do, in every dtype."""
MOST_KEYS = 1024
"""Attention in float32 with AVX-512: up to so many keys the native kernels take 0.7 to 0.8 times as long as PyTorch's
`scaled_dot_product_attention` (512 tokens, 16 heads of 128, and 32 with 4 of keys); at 2,048 keys 1.1 times."""
MOST_AT_ONCE = 1024
"""Tokens of one step of a program: more are run one step after the other, so that memory is bounded."""


@cache
def slow_bf16() -> bool:
    """Whether this CPU has no AVX-512: PyTorch's bfloat16 products then run at an eighth of float32's speed."""
    return torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile cannot trace the finding
def level_here() -> str | None:
    """The level the native kernels run at on this machine; None without the library."""
    return default_level() if available() else None


def bf16_trains_faster(hidden_size: int) -> bool:
    """Whether `train.dtype: auto` is bfloat16 on this CPU: with AMX or AVX512_BF16, for models at least 256 wide.

    Forward, backward and optimiser at a width of 384 (`train-66M`): 1.5 times as fast as float32 on a Xeon with AMX,
    1.76 times on Zen 5. At 96 (quickstart) 0.92 times on that Xeon, where rounding costs more than the products gain.
    Its VDPBF16PS alone would lose to float32; a CPU with that and no AMX which is not AMD's was never timed.
    """
    return hidden_size >= 256 and level_here() in ("amx", "avx512_bf16")


def native_is_best(x: Tensor, experts: Bank) -> bool:
    """Whether `auto` takes the native kernels for experts, where they support them.

    Stacked, on a CPU with AVX2: in float32, from 1 to 16,384 tokens and 8 to 512 experts, 1.07 to 4 times as fast as
    `grouped_mm` forward, and 0.99 (one token, 64 experts) to 2 times forward and backward; in bfloat16 7 times and
    more. AVX-512 does the same in wider steps, and was not timed. Packed: at every level, since all else unpacks.
    """
    return not isinstance(experts.in_memory(), ExpertWeights) or level_here() not in (None, "portable")


def native_attention_is_best(q_BHSd: Tensor, keys: int, written_out: bool) -> bool:
    """Whether the native kernels attend, where they can: few queries, where every row is to have the bits that it has
    alone (`exactly`), in float32 up to `MOST_KEYS`, and where PyTorch has no kernel either (`written_out`)."""
    wide = q_BHSd.dtype == torch.float32 and level_here() not in (None, "portable", "avx2")
    few = q_BHSd.shape[2] <= FEW_QUERIES and keys > q_BHSd.shape[2]
    return few or is_exact() or (wide and (written_out or keys <= MOST_KEYS))


def grouped_mm_is_best(x: Tensor, experts: Bank) -> bool:
    """Whether `auto` takes `grouped_mm`, where it supports them: of stacked weights, and where PyTorch can trace it.

    Beside LoRA always: nothing is made there. Other weights would all be made at once; one at a time is `eager`.
    """
    if isinstance(experts, AdaptedWeights):
        return not torch.compiler.is_compiling()
    return isinstance(experts.in_memory(), ExpertWeights) and traces_grouped_mm(x)


def traces_grouped_mm(x: Tensor) -> bool:
    """Whether PyTorch can trace `grouped_mm` if it is tracing: on a CPU in bfloat16 only."""
    return not torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype == torch.bfloat16
