"""The mixture-of-experts layer: router, experts, shared experts. Drop-in for a feed-forward network."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manyhands.config import MoEConfig
from manyhands.errors import ConfigError
from manyhands.layers.feed_forward import FeedForward
from manyhands.layers.linear import Linear, reset_parts
from manyhands.moe.bank import ExpertBank
from manyhands.moe.edit import Edit, check_edit
from manyhands.moe.experts import Experts
from manyhands.moe.router import Router
from manyhands.moe.routing import Routing
from manyhands.moe.soft import soft
from manyhands.moe.unchosen import router_gradient, unchosen_weights

LEAST_WEIGHT = 1e-20  # a sigmoid may be 0 in float32


class MoELayer(nn.Module):
    """y, routing = moe(x). The routing is returned, never remembered: no hooks, no module state.

    Fresh weights are N(0, 0.02²) and biases 0, the router's as its `init` says; what a model initialises besides
    depends on its depth: `init_weights`.

    `experts` is where the experts' weights come from: stacked parameters, run by backend `implementation`, unless a
    bank is given (which names its own backend).
    """

    def __init__(
        self, config: MoEConfig, hidden_size: int, implementation: str = "auto", experts: ExpertBank | None = None
    ) -> None:
        super().__init__()
        self.router = Router(config.router, hidden_size)
        if experts is None:
            experts = Experts(config, hidden_size, implementation)
        E = config.router.num_experts
        if (experts.num_experts, experts.hidden_size) != (E, hidden_size):
            found = f"{experts.num_experts} of width {experts.hidden_size}"
            raise ConfigError(f"experts: the bank holds {found}, where the layer has {E} of width {hidden_size}")
        self.experts = experts
        self.input_jitter, self.weigh = config.input_jitter, config.weigh
        self.unchosen, self.average_decay = config.unchosen, config.average_decay
        average = torch.zeros(E, hidden_size) if config.unchosen == "average" else None
        self.register_buffer("average_outputs", average)
        self.shared_experts = None
        self.shared_expert_gate = None
        if config.n_shared_experts:
            self.shared_experts = FeedForward(hidden_size, config.shared_width, config.hidden_act)
        if config.shared_expert_gate:
            self.shared_expert_gate = Linear(hidden_size, 1, bias=False)

    average_outputs: Tensor | None
    """[E, D]: with `unchosen = "average"`, what each expert said lately; moved by `control.py`, never by a gradient."""

    def reset_parameters(self) -> None:
        """Fresh weights everywhere in here: router, experts, shared experts."""
        reset_parts(self)
        if self.average_outputs is not None:
            self.average_outputs.zero_()

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        keep_outputs: bool = False,
        edit: Edit | None = None,
    ) -> tuple[Tensor, Routing]:
        """x [..., D]; `token_mask` [...] bool is false for padding; `token_ids` [...] is for hash routing; `edit` is a
        routing to follow, or a change of it (`manyhands.moe.edit`).

        Of [..., S, D] each S tokens are a sequence, which matters to `capacity_per: sequence` and Soft MoE alone.

        No loss and no statistic counts padding; its rows of y are computed like the rest and mean nothing.

        Returns y [..., D] in x's dtype and the `Routing` of the T flattened tokens; with `keep_outputs` it holds
        the experts' outputs, at the cost of T·K·D more values.
        """
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise ConfigError(f"token_mask is {list(token_mask.shape)}, not {list(x.shape[:-1])} as x is")
        if self.training and self.input_jitter:
            x = x * torch.empty_like(x).uniform_(1.0 - self.input_jitter, 1.0 + self.input_jitter)
        if self.router.config.select == "soft":
            y, routing = self._soft(x, token_mask, keep_outputs, edit)
            return self._with_shared(y.reshape(-1, y.shape[-1]), x), routing
        x_TD = x.reshape(-1, x.shape[-1])
        more: dict[str, Any] = {} if edit is None else {"edit": edit}  # a router somebody wrote may know neither
        if x.dim() > 2 and self.router.config.capacity_per == "sequence":
            more["sequence_length"] = x.shape[-2]
        routing = self.router(
            x_TD,
            None if token_mask is None else token_mask.reshape(-1),
            None if token_ids is None else token_ids.reshape(-1),
            **more,
        )
        shared: list[Tensor] = []  # what is computed already, while tokens travel to other processes
        read_TD, asked = self._weighed(x_TD, routing)
        if keep_outputs:
            outputs_TKD = self.experts.outputs(read_TD, asked)
            y_TD = (asked.weights[..., None] * outputs_TKD).sum(1).to(x_TD.dtype)
            if self.weigh == "input":  # so that weight times output is what was added
                outputs_TKD = outputs_TKD / routing.weights[..., None].clamp(min=LEAST_WEIGHT)
            routing = replace(routing, expert_outputs=outputs_TKD)
        elif getattr(self.experts, "placement", None) is not None and self.shared_experts is not None:
            y_TD = self.experts.beside(read_TD, asked, lambda: shared.append(self._shared(x_TD)))
        else:
            y_TD = self.experts(read_TD, asked)
        if self.average_outputs is not None:
            others_TE = unchosen_weights(routing, self.router.config, edit)
            y_TD = y_TD + (others_TE @ self.average_outputs.float()).to(y_TD.dtype)
        elif self.unchosen == "gradient" and self.training and torch.is_grad_enabled():
            others_TE = unchosen_weights(routing, self.router.config, edit)
            y_TD = y_TD + router_gradient(others_TE, x_TD, self.experts.outputs)
        return self._with_shared(y_TD, x, *shared), routing

    def _weighed(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """What the experts read, and how what they say is weighed."""
        if self.weigh == "output":
            return x_TD, routing
        weighed_TD = (x_TD * routing.weights).to(x_TD.dtype)  # one expert per token
        return weighed_TD, replace(routing, weights=torch.ones_like(routing.weights))

    def _soft(
        self, x: Tensor, token_mask: Tensor | None, keep_outputs: bool, edit: Edit | None
    ) -> tuple[Tensor, Routing]:
        if edit is not None:
            check_edit(edit, self.router.config)
        x_BSD = x.reshape(-1, *x.shape[-2:])
        mask_BS = None if token_mask is None else token_mask.reshape(x_BSD.shape[:2])
        return soft(self.router, self.experts, x_BSD, mask_BS, keep_outputs)

    def _with_shared(self, y_TD: Tensor, x: Tensor, shared_TD: Tensor | None = None) -> Tensor:
        """y [..., D] with the shared experts' output of x added; `shared_TD` if it is there already."""
        if self.shared_experts is not None:
            y_TD = y_TD + (self._shared(x.reshape(-1, x.shape[-1])) if shared_TD is None else shared_TD)
        return y_TD.view_as(x)

    def _shared(self, x_TD: Tensor) -> Tensor:
        """[T, D]: what the shared experts say."""
        assert self.shared_experts is not None
        shared_TD: Tensor = self.shared_experts(x_TD)
        if self.shared_expert_gate is not None:
            shared_TD = shared_TD * self.shared_expert_gate(x_TD).sigmoid()
        return shared_TD

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed
