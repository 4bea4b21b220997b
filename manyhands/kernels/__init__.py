"""Expert backends: given tokens and a routing, apply each token's experts and combine their outputs.

    backend(x_TD, ids_TK, weights_TK, kept_TK, experts) -> y_TD

`ids_TK` are expert numbers (int64), `weights_TK` float32, `kept_TK` false where a pair overflowed its expert's
capacity. Every backend computes y_t = Σ_k kept_tk · weights_tk · Expert_{ids_tk}(x_t) and is held against
`eager`, gradients included. The names are those of transformers' `experts_implementation`; `native` is there where
its library was built.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from manyhands.config import suggest
from manyhands.errors import ConfigError
from manyhands.kernels.eager import dense, eager
from manyhands.kernels.experts import ExpertWeights
from manyhands.kernels.grouped import grouped_mm, supports_grouped_mm
from manyhands.kernels.moment import in_autocast, transformed
from manyhands.kernels.native import Native, missing
from manyhands.kernels.native.backend import supports_native
from manyhands.kernels.policy import level_here

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, ExpertWeights], Tensor]

BACKENDS: dict[str, Backend] = {"eager": eager, "grouped_mm": grouped_mm}
if missing() is None:
    BACKENDS["native"] = Native()


def check_name(name: str) -> str:
    """`name` if it is `auto` or a backend; otherwise `ConfigError` with the nearest one."""
    if name == "native" and name not in BACKENDS:
        raise ConfigError(f"experts_implementation = 'native': the kernels are not here: {missing()}")
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"experts_implementation = {name!r}: " + suggest(name, ["auto", *BACKENDS]))
    return name


def choose(x: Tensor, experts: ExpertWeights) -> str:
    """The backend `auto` stands for, by measured rules (docs/performance.md).

    On a CPU with AVX2 `native`: in float32, from 1 to 16,384 tokens and 8 to 512 experts, 1.07 to 4 times as fast as
    `grouped_mm` forward, and 0.99 (one token, 64 experts) to 2 times forward and backward; in bfloat16 7 times and
    more. AVX-512 does the same in wider steps, and was not timed. Elsewhere `grouped_mm`, where its dtype and
    alignment rules hold and PyTorch can trace it, which on a CPU is in bfloat16 only; else `eager`.
    """
    if level_here() not in (None, "portable") and supports_native(x, experts):
        return "native"
    traced = not torch.compiler.is_compiling() or x.dtype == torch.bfloat16
    return "grouped_mm" if traced and supports_grouped_mm(x, experts) else "eager"


def run_experts(
    name: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: ExpertWeights
) -> Tensor:
    """Apply the experts through backend `name`, or `auto`. Returns [T, D] in x's dtype.

    Inside a transform of `torch.func` every name stands for the same mathematics written densely. Inside
    `torch.autocast` the products are in its precision, whatever the backend.
    """
    if name != "auto":
        check_name(name)
    if transformed() or x_TD.device.type == "meta":  # nothing may depend on numbers
        return dense(x_TD, ids_TK, weights_TK, kept_TK, experts)
    if name != "eager" and (x := in_autocast(x_TD)) is not x_TD:
        with torch.autocast(x.device.type, enabled=False):
            return run_experts(name, x, ids_TK, weights_TK, kept_TK, experts).to(x_TD.dtype)
    if torch.compiler.is_compiling() and name == "grouped_mm" and not _traced(x_TD):
        name = "eager"
    return BACKENDS[choose(x_TD, experts) if name == "auto" else name](x_TD, ids_TK, weights_TK, kept_TK, experts)


def _traced(x: Tensor) -> bool:
    """Whether PyTorch can trace `grouped_mm`: on a CPU in bfloat16 only."""
    return x.device.type != "cpu" or x.dtype == torch.bfloat16


__all__ = ["BACKENDS", "Backend", "ExpertWeights", "check_name", "choose", "run_experts"]
