"""The balance terms of a run: per layer, averaged over layers, weighted by their coefficients."""

import pytest
import torch

from manyhands.config import BalanceConfig
from manyhands.errors import ConfigError
from manyhands.moe import balance, balance_objective

from .make_routing import make_layer, route_logits, tokens

OFF = {"aux_loss_coef": 0.0}


def two_layers():
    return {1: route_logits(tokens(12, 4)), 3: route_logits(2 * tokens(12, 4, seed=5))}


def test_mean_over_layers_not_over_their_concatenation() -> None:
    routings = two_layers()
    total, terms = balance_objective(routings, BalanceConfig(aux_loss_coef=0.5, aux_scope="micro"), 1)
    expected = sum(balance.load_balancing_loss(r) for r in routings.values()) / 2
    torch.testing.assert_close(terms["aux_loss"], expected.detach())
    torch.testing.assert_close(total, 0.5 * expected)


@pytest.mark.parametrize(
    ("coef", "function"),
    [
        ("z_loss", balance.z_loss),
        ("importance", balance.importance_loss),
        ("load", balance.load_loss),
        ("variance", balance.variance_loss),
        ("sequence_loss", lambda r: balance.complementary_sequence_loss(r, 3)),
    ],
)
def test_each_coefficient_is_its_own_term(coef: str, function) -> None:
    routings = two_layers()
    total, terms = balance_objective(routings, BalanceConfig(**OFF, **{f"{coef}_coef": 0.25}), 3)
    expected = sum(function(r) for r in routings.values()) / 2
    assert list(terms) == [coef]
    torch.testing.assert_close(total, 0.25 * expected)


def test_every_coefficient_has_a_term() -> None:
    """A coefficient without a term would be silently ignored."""
    names = [name.removesuffix("_coef") for name in BalanceConfig.model_fields if name.endswith("_coef")]
    every, found = BalanceConfig(**{f"{name}_coef": 1.0 for name in names}), set()
    for router in ({"noisy": True}, {"select": "positive", "score": "relu", "norm_topk_prob": False}):
        layer = make_layer(router={"num_experts": 4, **router})
        routing = layer(tokens(6, 8), keep_outputs=True)[1]
        _, terms = balance_objective({0: routing}, every, 1, routers={0: layer.router})
        found |= terms.keys()
    assert found == set(names)


def test_a_term_about_weights_needs_the_router() -> None:
    with pytest.raises(ConfigError, match="simbal_coef"):
        balance_objective({0: route_logits(tokens(6, 4))}, BalanceConfig(simbal_coef=0.1), 1)


def test_scopes() -> None:
    routings = {0: route_logits(tokens(12, 4))}
    counts = {0: torch.tensor([50, 1, 1, 2])}

    def value(scope: str) -> float:
        return float(
            balance_objective(routings, BalanceConfig(aux_loss_coef=1.0, aux_scope=scope), 3, counts)[0].detach()
        )

    r = routings[0]
    assert value("micro") == pytest.approx(balance.load_balancing_loss(r).item())
    assert value("global") == pytest.approx(balance.load_balancing_loss(r, counts[0]).item())
    assert value("sequence") == pytest.approx(balance.sequence_balancing_loss(r, 3).item())
    assert len({round(value(s), 5) for s in ("micro", "global", "sequence")}) == 3


def test_no_sparse_layer_and_no_coefficient() -> None:
    assert balance_objective({}, BalanceConfig(), 1)[0] == 0
    total, terms = balance_objective(two_layers(), BalanceConfig(**OFF), 1)
    assert total == 0 and terms == {}


def test_terms_carry_no_graph_and_the_total_does() -> None:
    total, terms = balance_objective(two_layers(), BalanceConfig(z_loss_coef=1.0), 1)
    assert total.requires_grad and not any(t.requires_grad for t in terms.values())
