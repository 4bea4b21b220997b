"""What a layer does with the experts a token did not choose: nothing, as a rule.

    average    Default MoE (arXiv 2504.12463): the mean of what the expert said lately stands in for it
    gradient   DenseMixer (Yao et al. 2025): while training, the router learns what the expert would have said

T tokens, K experts per token, E experts, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyhands.config import RouterConfig
from manyhands.moe.edit import Edit, Swap
from manyhands.moe.routing import Routing

Outputs = Callable[[Tensor, Routing], Tensor]
"""(x [T, D], routing [T, 1]) to [T, 1, D]: `ExpertBank.outputs`."""


def unchosen_weights(routing: Routing, config: RouterConfig, edit: Edit | None = None) -> Tensor:
    """[T, E]: what the experts that were not chosen would weigh, 0 for the chosen. Carries gradient.

    Where the chosen are divided by their sum, so are these, without gradient through it (DenseMixer's own way). Two
    experts that an `edit` swapped have each other's scores too.
    """
    E = routing.num_experts
    ids_TK = routing.expert_ids.where(routing.expert_ids >= 0, E)
    spare_TE1 = torch.zeros(len(ids_TK), E + 1, dtype=torch.bool, device=ids_TK.device)
    chosen_TE = spare_TE1.scatter_(1, ids_TK, True)[:, :E]
    scores_TE = routing.scores
    if isinstance(edit, Swap):
        places_E = torch.arange(E, device=ids_TK.device)
        places_E[edit.expert], places_E[edit.by] = edit.by, edit.expert
        scores_TE = scores_TE[:, places_E]
    weights_TE = scores_TE * config.routed_scaling_factor
    if config.renormalises:
        total_T1 = (scores_TE * chosen_TE).sum(1, keepdim=True).detach()
        weights_TE = weights_TE / (total_T1 + 1e-20)
    return weights_TE.masked_fill(chosen_TE, 0.0)


def router_gradient(weights_TE: Tensor, x_TD: Tensor, outputs: Outputs) -> Tensor:
    """[T, D] of zeros, whose gradient gives each weight the product with what its expert says.

    Every expert runs once more for every token, in the backward pass, one at a time; its parameters and x get nothing.
    """
    zeros: Tensor = _RouterGradient.apply(weights_TE, x_TD.detach(), outputs)  # type: ignore[no-untyped-call]
    return zeros


class _RouterGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TE: Tensor, x_TD: Tensor, outputs: Outputs) -> Tensor:
        ctx.save_for_backward(weights_TE, x_TD)
        ctx.outputs = outputs
        return torch.zeros_like(x_TD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        weights_TE, x_TD = ctx.saved_tensors
        T, E = weights_TE.shape
        blank, real_T = weights_TE.new_zeros(T, E), torch.ones(T, dtype=torch.bool, device=x_TD.device)
        found = []
        for expert in range(E):
            open_T1 = weights_TE[:, expert, None] != 0
            ids_T1 = torch.full((T, 1), expert, device=x_TD.device)
            said_TD = ctx.outputs(x_TD, Routing(ids_T1, blank[:, :1] + 1.0, blank, blank, open_T1, real_T))[:, 0]
            found.append((grad_TD.float() * said_TD.float()).sum(1) * open_T1[:, 0])
        return torch.stack(found, 1), None, None


@torch.no_grad()
def sum_outputs(routing: Routing) -> tuple[Tensor, Tensor]:
    """[E, D] and [E]: the sums of what each expert said to real tokens that it computed, and their number."""
    assert routing.expert_outputs is not None, "call the layer with keep_outputs=True"
    E, wanted_TK = routing.num_experts, routing.kept & routing.token_mask[:, None]
    ids = routing.expert_ids[wanted_TK]
    said = routing.expert_outputs[wanted_TK].float()
    sums_ED = said.new_zeros(E, said.shape[-1]).index_add_(0, ids, said)
    return sums_ED, torch.bincount(ids, minlength=E)


@torch.no_grad()
def update_averages_(averages_ED: Tensor, sums_ED: Tensor, counts_E: Tensor, decay: float) -> None:
    """Â ← decay · Â + (1 − decay) · mean, for each expert that computed a token in this step. In place."""
    means_ED = sums_ED / counts_E.clamp(min=1)[:, None]
    moved_ED = decay * averages_ED + (1.0 - decay) * means_ED
    averages_ED.copy_(torch.where(counts_E[:, None] > 0, moved_ED, averages_ED))
