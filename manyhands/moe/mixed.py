"""Adapters that a router mixes: beside a linear layer (MoLoRA, MoV: arXiv 2309.05444), beside a mixture's own experts
(PERFT-R: arXiv 2411.08212). What they stand beside is frozen.

    MoLoRA   y = base(x) + s·Σ_e p_e B_e (A_e x)        MoV   y = base(x) ⊙ (1 + Σ_e p_e d_e)
    PERFT    y = experts(x) + s·Σ_e p_e B_e (A_e x)

p are the router's shares of all adapters, or of the `top_k` that a token takes, which then add up to 1; a single one
keeps the share it had, through which the router learns. The paper's vectors are l = 1 + d: where shares add up to 1
that is the same, and nothing is changed at the start even where they do not. All adapters are computed, taken or not:
they are thin, and two products with their stack are faster than sorting tokens for them.

M adapters (a dimension E in names of weights), r rank, T tokens, D model width.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.config import RouterConfig
from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights
from manyhands.layers.linear import Linear
from manyhands.layers.packed_linear import RecordLinear
from manyhands.moe.bank import ExpertBank
from manyhands.moe.router import Router
from manyhands.moe.routing import Routing


def _router(num_experts: int, top_k: int | None, inputs: int, device: torch.device) -> Router:
    taken = num_experts if top_k is None else top_k
    config = RouterConfig(num_experts=num_experts, num_experts_per_tok=taken, norm_topk_prob=top_k is not None)
    return Router(config, inputs).to(device)


def _shares(router: Router, x_TD: Tensor) -> Tensor:
    """[T, M] float32, zero for those a token does not take."""
    routing = router(x_TD)
    if router.config.num_experts_per_tok == router.config.num_experts:
        return routing.scores
    return torch.zeros_like(routing.scores).scatter(-1, routing.expert_ids, routing.weights)


class LowRankMixture(nn.Module):
    """s·Σ_e p_e B_e (A_e x). Fresh: A uniform in ±1/√in, B zero, so that nothing is changed yet."""

    def __init__(
        self, num_experts: int, top_k: int | None, inputs: int, outputs: int, r: int, alpha: float, device: torch.device
    ) -> None:
        super().__init__()
        self.router = _router(num_experts, top_k, inputs, device)
        self.scale = alpha / r
        self.lora_A = nn.Parameter(torch.empty(num_experts, r, inputs, device=device))
        self.lora_B = nn.Parameter(torch.empty(num_experts, outputs, r, device=device))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh router, A and B."""
        self.router.reset_parameters(generator=generator)
        with torch.no_grad():
            bound = 1.0 / math.sqrt(self.lora_A.shape[-1])
            self.lora_A.uniform_(-bound, bound, generator=generator)
            self.lora_B.zero_()

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, in] -> [T, out] in x's dtype."""
        M, r, inputs = self.lora_A.shape
        low = F.linear(x_TD, self.lora_A.view(M * r, inputs).to(x_TD.dtype)).view(-1, M, r)
        mixed = (low * (self.scale * _shares(self.router, x_TD)).to(low.dtype)[..., None]).view(-1, M * r)
        return F.linear(mixed, self.lora_B.transpose(0, 1).reshape(-1, M * r).to(x_TD.dtype))

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


class VectorMixture(nn.Module):
    """1 + Σ_e p_e d_e. Fresh: every d is 0, so that nothing is changed yet."""

    def __init__(self, num_experts: int, top_k: int | None, inputs: int, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.router = _router(num_experts, top_k, inputs, device)
        self.scales = nn.Parameter(torch.empty(num_experts, outputs, device=device))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh router and vectors."""
        self.router.reset_parameters(generator=generator)
        nn.init.zeros_(self.scales)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, in] -> [T, out] in x's dtype: what the layer's output is multiplied by."""
        return 1.0 + F.linear(_shares(self.router, x_TD).to(x_TD.dtype), self.scales.T.to(x_TD.dtype))

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


class MixedLinear(nn.Module):
    """A linear layer, plain or packed, with adapters that a router mixes."""

    def __init__(self, base_layer: Linear | RecordLinear, adapters: LowRankMixture | VectorMixture) -> None:
        super().__init__()
        self.base_layer, self.adapters = base_layer.requires_grad_(False), adapters

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        y, rows = self.base_layer(x), x.reshape(-1, x.shape[-1])
        beside = self.adapters(rows).view_as(y)
        return y * beside if isinstance(self.adapters, VectorMixture) else y + beside

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


class ExpertsBeside(ExpertBank):
    """A bank, frozen, and thin experts beside it that a router of their own mixes."""

    def __init__(self, base_layer: ExpertBank, adapters: LowRankMixture) -> None:
        super().__init__(base_layer.implementation)
        self.activation = base_layer.activation
        self.base_layer, self.adapters = base_layer.requires_grad_(False), adapters

    @property
    def num_experts(self) -> int:
        """E of the bank."""
        return self.base_layer.num_experts

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.base_layer.hidden_size

    def forward(self, x_TD: Tensor, routing: Routing, implementation: str | None = None) -> Tensor:
        """[T, D] -> [T, D]."""
        name = self.implementation if implementation is None else implementation
        return self.base_layer(x_TD, routing, name) + self.adapters(x_TD)

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        """Refused, as `outputs` is: whoever asks for the experts alone would overlook what is beside them."""
        raise ConfigError("thin experts beside a mixture (perft) are no part of its experts' weights or outputs")

    def outputs(self, x_TD: Tensor, routing: Routing, implementation: str | None = None) -> Tensor:
        """Refused."""
        raise ConfigError(
            "thin experts beside a mixture (perft) are no part of any expert's output: "
            "leave out what looks at those (orthogonality, Default MoE, DenseMixer, ablation)"
        )
