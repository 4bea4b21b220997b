"""Expert backends: given tokens and a routing, apply each token's experts and combine their outputs.

    backend(x_TD, ids_TK, weights_TK, kept_TK, experts) -> y_TD

`ids_TK` are expert numbers (int64), `weights_TK` float32, `kept_TK` false where a pair overflowed its expert's
capacity. Every backend computes y_t = Σ_k kept_tk · weights_tk · Expert_{ids_tk}(x_t) and is held against
`eager`, gradients included. The names are those of transformers' `experts_implementation`; `native` is there where
its library was built.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from manyhands.config import suggest
from manyhands.errors import ConfigError
from manyhands.kernels.eager import eager
from manyhands.kernels.experts import ExpertWeights
from manyhands.kernels.grouped import grouped_mm, supports_grouped_mm
from manyhands.kernels.native import Native, missing
from manyhands.kernels.native.backend import supports_native
from manyhands.kernels.native.library import default_level

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

    Without gradients, on a CPU with AVX2, `native`: 1.04 to 3 times as fast as `grouped_mm` from 1 to 2,048 tokens in
    float32, 7 times in bfloat16. With gradients, in float32, it is 1.09 to 2 times as fast up to 256 rows per expert
    (one token: 0.99) and level from 512 on; until it wins everywhere `grouped_mm` it is, where its dtype and alignment
    rules hold; else `eager`.
    """
    if level_here() == "avx2" and supports_native(x, experts) and not _needs_gradient(x, experts):
        return "native"
    return "grouped_mm" if supports_grouped_mm(x, experts) else "eager"


def _needs_gradient(x: Tensor, experts: ExpertWeights) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or experts.up.requires_grad or experts.down.requires_grad)


@cache
def level_here() -> str | None:
    """The level the native kernels run at on this machine; None without the library."""
    return default_level() if missing() is None else None


def run_experts(
    name: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: ExpertWeights
) -> Tensor:
    """Apply the experts through backend `name`, or `auto`. Returns [T, D] in x's dtype."""
    backend = BACKENDS[choose(x_TD, experts) if name == "auto" else check_name(name)]
    return backend(x_TD, ids_TK, weights_TK, kept_TK, experts)


__all__ = ["BACKENDS", "Backend", "ExpertWeights", "check_name", "choose", "run_experts"]
