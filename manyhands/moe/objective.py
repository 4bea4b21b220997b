"""The balance terms of a run, added up: per layer first, then averaged over layers, then weighted.

L sparse layers, E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from manyhands.config import BalanceConfig
from manyhands.errors import ConfigError
from manyhands.moe import balance
from manyhands.moe.router import Router
from manyhands.moe.routing import Routing
from manyhands.parallel.ranks import ALONE, Ranks


def balance_terms(
    routing: Routing,
    config: BalanceConfig,
    num_sequences: int,
    step_counts_E: Tensor | None = None,
    router: Router | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """One layer's terms with a non-zero coefficient, by the name of their coefficient, unweighted.

    The micro-batch is that of all `ranks` together, of which each brings its own part; every one gets the same terms.

    `step_counts_E` are the pairs per expert of the optimiser step so far, for `aux_scope = "global"`; `router` made the
    routing, for the terms that are about its weights (SimBal) or its state (ReMoE). Raises `ConfigError` without it.
    """
    terms: dict[str, Tensor] = {}
    if config.aux_loss_coef:
        if config.aux_scope == "sequence":
            terms["aux_loss"] = balance.sequence_balancing_loss(routing, num_sequences, ranks=ranks)
        else:
            counts = step_counts_E if config.aux_scope == "global" else None
            terms["aux_loss"] = balance.load_balancing_loss(routing, counts, ranks=ranks)
    if config.z_loss_coef:
        terms["z_loss"] = balance.z_loss(routing, ranks=ranks)
    if config.importance_coef:
        terms["importance"] = balance.importance_loss(routing, ranks=ranks)
    if config.load_coef:
        terms["load"] = balance.load_loss(routing, ranks=ranks)
    if config.sequence_loss_coef:
        terms["sequence_loss"] = balance.complementary_sequence_loss(routing, num_sequences, ranks=ranks)
    if config.orthogonality_coef:
        terms["orthogonality"] = balance.orthogonality_loss(routing, ranks=ranks)
    if config.variance_coef:
        terms["variance"] = balance.variance_loss(routing, ranks=ranks)
    if config.simbal_coef:
        if router is None:
            raise ConfigError("balance.simbal_coef is about the router's weights: pass the routers")
        terms["simbal"] = balance.simbal_loss(_whole(router.weight))
    if config.l1_coef and router is not None and router.l1_steps is not None:
        k, factor = router.config.num_experts_per_tok, balance.l1_factor(router.l1_steps)
        terms["l1"] = balance.l1_loss(routing, k, ranks) * factor
    return terms


def balance_objective(
    routings: Mapping[int, Routing],
    config: BalanceConfig,
    num_sequences: int,
    step_counts: Mapping[int, Tensor] | None = None,
    routers: Mapping[int, Router] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ coefficient · mean over layers of each term, and the means themselves (detached) for the journal.

    Zero when there is no sparse layer. `routers` made the routings, of which every one of `ranks` has a part: see
    `balance_terms`.
    """
    if not routings:
        return torch.zeros(()), {}
    per_layer = [
        balance_terms(
            routing,
            config,
            num_sequences,
            None if step_counts is None else step_counts[layer],
            None if routers is None else routers[layer],
            ranks,
        )
        for layer, routing in routings.items()
    ]
    means = {name: torch.stack([terms[name] for terms in per_layer]).mean() for name in per_layer[0]}
    total = torch.zeros((), device=next(iter(routings.values())).scores.device)
    for name, mean in means.items():
        total = total + getattr(config, f"{name}_coef") * mean
    return total, {name: mean.detach() for name, mean in means.items()}


def _whole(weight: Tensor) -> Tensor:
    """All of a weight that may be sharded, with a gradient that is summed over who holds its rows."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    found: Tensor = weight.full_tensor(grad_placements=[Partial()])
    return found
