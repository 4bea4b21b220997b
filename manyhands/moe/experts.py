"""The experts: E feed-forward networks in stacked weights, run by a backend.

E experts, D model width, F expert width, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import nn

from manyhands.config import MoEConfig
from manyhands.config.activation import GATED
from manyhands.config.decoder import INITIALIZER_RANGE
from manyhands.kernels import ExpertWeights
from manyhands.kernels.moment import held
from manyhands.moe.bank import ExpertBank
from manyhands.moe.exchange import Placement, local
from manyhands.quant import FetchedExperts, PackedExperts


class Experts(ExpertBank):
    """Stacked weights: `gate_up_proj` [E, 2F, D] (gate rows first; `up_proj` [E, F, D] where the activation has
    no gate) and `down_proj` [E, D, F], with optional `…_bias`.

    Fresh weights are N(0, 0.02²), biases 0; see `reset_parameters`.

    With a `placement` E is the number of those that lie here. It may also be set later, on parameters that are DTensors
    of all experts, sharded over its processes (`train/layout.py`).
    """

    def __init__(
        self, config: MoEConfig, hidden_size: int, implementation: str = "auto", placement: Placement | None = None
    ) -> None:
        super().__init__(implementation)
        self.placement = placement
        E, D, F = config.router.num_experts, hidden_size, config.moe_intermediate_size
        E = E if placement is None else placement.count
        self.activation = config.hidden_act
        self._up_name = "gate_up_proj" if self.activation in GATED else "up_proj"
        rows = 2 * F if self.activation in GATED else F
        self.register_parameter(self._up_name, nn.Parameter(torch.empty(E, rows, D)))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        bias = config.expert_bias
        self.register_parameter(self._up_name + "_bias", nn.Parameter(torch.empty(E, rows)) if bias else None)
        self.down_proj_bias = nn.Parameter(torch.empty(E, D)) if bias else None
        self.reset_parameters()

    def reset_parameters(
        self,
        std: float = INITIALIZER_RANGE,
        residual_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fresh weights: N(0, std²), std 0.02 as in GPT-2, and biases 0.

        `residual_std` is for `down_proj`, which writes into the residual stream: a model of L layers gives
        std / √(2L) (Radford et al. 2019). None: std, since a layer alone has no depth.
        """
        with torch.no_grad():
            self.get_parameter(self._up_name).normal_(0.0, std, generator=generator)
            self.down_proj.normal_(0.0, std if residual_std is None else residual_std, generator=generator)
            for bias in (getattr(self, self._up_name + "_bias"), self.down_proj_bias):
                if bias is not None:
                    bias.zero_()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, those that are None too."""
        return tuple(name + suffix for name in (self._up_name, "down_proj") for suffix in ("", "_bias"))

    def weights(self) -> ExpertWeights:
        """The stacked weights as backends take them."""
        up, up_bias = getattr(self, self._up_name), getattr(self, self._up_name + "_bias")
        return ExpertWeights(up, self.down_proj, up_bias, self.down_proj_bias, self.activation)

    @property
    def num_experts(self) -> int:
        """Of all processes together."""
        return int(self.down_proj.shape[0]) if self.placement is None else self.placement.num_experts

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.down_proj.shape[1])

    def extra_repr(self) -> str:
        """With F."""
        return f"{super().extra_repr()}, moe_intermediate_size={self.down_proj.shape[-1]}"

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        """Of these experts, in that order."""
        return self.weights().stacked(ids)

    def own_experts(self) -> ExpertWeights:
        """The stacked weights of this process's own."""
        up, down, up_bias, down_bias, activation = self.weights()
        up_bias, down_bias = (None if bias is None else local(bias) for bias in (up_bias, down_bias))
        return ExpertWeights(local(up), local(down), up_bias, down_bias, activation)

    def in_memory(self) -> ExpertWeights:
        """The parameters themselves."""
        return self.weights()

    def for_native(self) -> ExpertWeights | PackedExperts | FetchedExperts | None:
        """The parameters, where they are this module's own: a parametrization makes them anew for each look."""
        return super().for_native() if held(self, *self.names) else None
