"""Expert backends: given tokens and a routing, apply each token's experts and combine their outputs.

Every backend computes y_t = Σ_k kept_tk · weights_tk · Expert_{ids_tk}(x_t) and is held against `eager`, gradients
included. The names are those of transformers' `experts_implementation`; `native` is there where its library was built.
`registry.py` lists them, `policy.py` says when `auto` takes which.
"""

import torch
from torch import Tensor

from manyhands.kernels.eager import dense
from manyhands.kernels.experts import Bank, ExpertWeights
from manyhands.kernels.moment import in_autocast, transformed
from manyhands.kernels.policy import traces_grouped_mm
from manyhands.kernels.registry import BACKENDS, Backend, backend_names, check_name, choose, register


def run_experts(name: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, experts: Bank) -> Tensor:
    """Apply the experts through backend `name`, or `auto`. Returns [T, D] in x's dtype.

    Inside a transform of `torch.func` every name stands for the same mathematics written densely. Inside
    `torch.autocast` the products are in its precision, whatever the backend.
    """
    check_name(name)
    if transformed() or x_TD.device.type == "meta":  # nothing may depend on numbers
        return dense(x_TD, ids_TK, weights_TK, kept_TK, experts)
    if name != "eager" and (x := in_autocast(x_TD)) is not x_TD:
        with torch.autocast(x.device.type, enabled=False):
            return run_experts(name, x, ids_TK, weights_TK, kept_TK, experts).to(x_TD.dtype)
    if name == "grouped_mm" and not traces_grouped_mm(x_TD):
        name = "eager"
    backend = BACKENDS[choose(x_TD, experts) if name == "auto" else name]
    return backend.run(x_TD, ids_TK, weights_TK, kept_TK, experts)


__all__ = [
    "BACKENDS",
    "Backend",
    "Bank",
    "ExpertWeights",
    "backend_names",
    "check_name",
    "choose",
    "register",
    "run_experts",
]
