"""The mixture-of-experts layer: router, experts, shared experts. Drop-in for a feed-forward network."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from manyhands.config import MoEConfig
from manyhands.config.model import INITIALIZER_RANGE
from manyhands.errors import ConfigError
from manyhands.kernels.experts import GATED, activate
from manyhands.kernels.moment import held
from manyhands.kernels.native import step, views
from manyhands.kernels.native.library import CLinear
from manyhands.moe.experts import Experts
from manyhands.moe.router import Router
from manyhands.moe.routing import Routing

FEW_ROWS = 16
"""Up to so many the native kernels read the weights 1.4 times as fast as PyTorch."""
SLOW_BF16 = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
"""Without AVX-512 PyTorch's bfloat16 products run at an eighth of float32's speed."""
ROUND_ROWS = 8192
"""Rows of weights widened at a time, so that a large head needs no second copy."""


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype: float32 master weights serve a bfloat16 forward.

    Fresh weights are N(0, 0.02²), biases 0: not torch's, which depend on the width.
    """

    def reset_parameters(self, std: float = INITIALIZER_RANGE, generator: torch.Generator | None = None) -> None:
        """Fresh weights: N(0, std²), std 0.02 as in GPT-2 (Radford et al. 2019), and bias 0."""
        with torch.no_grad():
            self.weight.normal_(0.0, std, generator=generator)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not torch.is_grad_enabled() and x.dtype == self.weight.dtype and step.direct(x):
            if x.numel() <= FEW_ROWS * x.shape[-1] and (native := self.for_native(x.shape[-1])):
                return step.linears(x, [native[0]])[0]
            if SLOW_BF16 and x.dtype == torch.bfloat16:
                return self._in_float32(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def for_native(self, width: int) -> tuple[CLinear, Tensor | None] | None:
        """The layer as the native kernels take it for x [..., width], where they do, and its bias.

        It points into the weight and into the bias, which may be a copy and must live as long: kept by nobody.
        """
        if not held(self, "weight", "bias"):
            return None
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not views.plain(weight, 2) or weight.shape[1] != width or width % 16:
            return None
        if bias is not None:
            if not views.plain(bias, 1) or bias.shape[0] != weight.shape[0]:
                return None
            bias = bias.detach().float()
        return views.plain_linear(weight, bias), bias

    def _in_float32(self, x: Tensor) -> Tensor:
        """The same products, summed in float32 and rounded once."""
        wide, y = x.float(), x.new_empty(*x.shape[:-1], self.out_features)
        for first in range(0, self.out_features, ROUND_ROWS):
            rows = slice(first, first + ROUND_ROWS)
            bias = None if self.bias is None else self.bias[rows].float()
            y[..., rows] = nn.functional.linear(wide, self.weight[rows].float(), bias)
        return y


class FeedForward(nn.Module):
    """A dense feed-forward network of width F: also what a shared expert is."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        gated = activation in GATED
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False) if gated else None
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Fresh weights everywhere in here, as `Linear` gives them."""
        reset_parts(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        up = self.up_proj(x)
        h = up if self.gate_proj is None else torch.cat((self.gate_proj(x), up), dim=-1)
        return self.down_proj(activate(h, self.activation))

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


def reset_parts(module: nn.Module) -> None:
    """`reset_parameters` of everything that `module` is made of."""
    for part in module.children():
        part.reset_parameters()  # type: ignore[operator]  # every part of ours has it


class MoELayer(nn.Module):
    """y, routing = moe(x). The routing is returned, never remembered: no hooks, no module state.

    Fresh weights are N(0, 0.02²) and biases 0, the router's as its `init` says; what a model initialises besides
    depends on its depth: `init_weights`.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, implementation: str = "auto") -> None:
        super().__init__()
        self.router = Router(config.router, hidden_size)
        self.experts = Experts(config, hidden_size, implementation)
        self.shared_experts = None
        self.shared_expert_gate = None
        if config.n_shared_experts:
            self.shared_experts = FeedForward(hidden_size, config.shared_width, config.hidden_act)
        if config.shared_expert_gate:
            self.shared_expert_gate = Linear(hidden_size, 1, bias=False)

    def reset_parameters(self) -> None:
        """Fresh weights everywhere in here: router, experts, shared experts."""
        reset_parts(self)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        keep_outputs: bool = False,
    ) -> tuple[Tensor, Routing]:
        """x [..., D]; `token_mask` [...] bool is false for padding; `token_ids` [...] is for hash routing.

        No loss and no statistic counts padding; its rows of y are computed like the rest and mean nothing.

        Returns y [..., D] in x's dtype and the `Routing` of the T flattened tokens; with `keep_outputs` it holds
        the experts' outputs, at the cost of T·K·D more values.
        """
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ConfigError(f"token_mask is {list(token_mask.shape)}, not {list(x.shape[:-1])} as x is")
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(
            x_TD,
            None if token_mask is None else token_mask.reshape(-1),
            None if token_ids is None else token_ids.reshape(-1),
        )
        if keep_outputs:
            outputs_TKD = self.experts.outputs(x_TD, routing)
            routing = replace(routing, expert_outputs=outputs_TKD)
            y_TD = (routing.weights[..., None] * outputs_TKD).sum(1).to(x_TD.dtype)
        else:
            y_TD = self.experts(x_TD, routing)
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = shared_TD * self.shared_expert_gate(x_TD).sigmoid()
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x), routing

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed
