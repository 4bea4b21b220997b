"""Every balance loss by itself: its value in each layer, and its gradient.

E experts, B sequences.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from manyhands.check import oracle_balance
from manyhands.check.oracle_dense import DenseRouting
from manyhands.config import BalanceConfig, RouterConfig
from manyhands.moe import Router, Routing
from manyhands.moe.objective import balance_terms

COEFFICIENTS = [name for name in BalanceConfig.model_fields if name.endswith("_coef")]
"""What there is to compare: the product's own list, so that a loss that the oracle lacks is found missing."""
EVERY = BalanceConfig(**dict.fromkeys(COEFFICIENTS, 1.0))  # type: ignore[arg-type]
ALONE = BalanceConfig(**(dict.fromkeys(COEFFICIENTS, 0.0) | {"aux_loss_coef": 1.0}))  # type: ignore[arg-type]
SCOPES = (
    EVERY.model_copy(update={"aux_scope": "micro"}),
    ALONE.model_copy(update={"aux_scope": "sequence"}),
    ALONE.model_copy(update={"aux_scope": "global"}),
)

SHARES = ("aux_loss", "sequence_loss")
"""Losses of scores divided by their sum."""

Terms = dict[str, dict[int, Tensor]]  # loss name -> layer -> value


def _collect(layers: Mapping[int, object], one: Callable[[int, BalanceConfig], dict[str, Tensor]]) -> Terms:
    found: Terms = {}
    for layer in layers:
        for config in SCOPES:
            for name, value in one(layer, config).items():
                label = f"{name}/{config.aux_scope}" if name == "aux_loss" else name
                found.setdefault(label, {})[layer] = value
    return found


def earlier_counts(num_experts: int) -> Tensor:
    """[E]: what other micro-batches of the step are taken to have counted, for the global scope."""
    return torch.arange(num_experts) * 3 + 1


def tested_terms(
    routings: Mapping[int, Routing], routers: Mapping[int, Router], router: RouterConfig, num_sequences: int
) -> Terms:
    """All terms as `moe` computes them."""

    def one(layer: int, config: BalanceConfig) -> dict[str, Tensor]:
        routing = routings[layer]
        step = routing.expert_counts() + earlier_counts(router.num_experts)
        return balance_terms(routing, config, num_sequences, step, routers[layer])

    return _collect(routings, one)


def oracle_terms(routings: Mapping[int, DenseRouting], router: RouterConfig, num_sequences: int) -> Terms:
    """All terms as the oracle computes them."""

    def one(layer: int, config: BalanceConfig) -> dict[str, Tensor]:
        step = routings[layer].counts() + earlier_counts(router.num_experts)
        return oracle_balance.terms(routings[layer], router, config, num_sequences, step)

    return _collect(routings, one)


def divisor(routings: Mapping[int, DenseRouting], router: RouterConfig) -> float:
    """The smallest sum of a token's scores, of those that have any: only ReLU's may be next to nothing."""
    if router.score != "relu":
        return 1.0
    sums = torch.cat([r.scores.detach().sum(1)[r.mask] for r in routings.values()])
    return float(sums[sums > 0].amin()) if bool((sums > 0).any()) else 1.0


def meaningless(router: RouterConfig) -> set[str]:
    """Losses that are about something this router does not do, and are not compared."""
    none_chosen = {"sequence_loss"} if router.most_experts_per_tok > router.num_experts_per_tok else set[str]()
    return none_chosen | (set() if router.select == "positive" else {"l1"})  # no token chooses K experts; ReMoE's own


def values(terms: Terms, name: str, prefix: str) -> dict[str, Tensor | None]:
    """One loss in each layer, by full name."""
    return {f"{prefix.format(layer=layer)}{name}": value.detach() for layer, value in terms[name].items()}


def gradients(terms: Terms, name: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradient of one loss, summed over layers, in every given parameter; None where there is no path."""
    total = torch.stack(list(terms[name].values())).sum()
    if not total.requires_grad:
        return dict.fromkeys(parameters)
    grads = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
    return dict(zip(parameters, grads, strict=True))
