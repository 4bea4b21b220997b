"""ReMoE (§9): ReLU routing, its penalty, and the controller that finds how strong it must be."""

import pytest
import torch

from manyhands.config import BalanceConfig, RouterConfig
from manyhands.moe import LoadCounter, balance_objective
from manyhands.moe.balance import l1_factor, l1_loss, update_l1_
from manyhands.moe.control import Control
from manyhands.parallel.ranks import Alone

from .make_routing import make_layer, make_router, route_logits, tokens

REMOE = {"select": "positive", "score": "relu", "norm_topk_prob": False}


def test_a_token_goes_to_every_expert_above_zero() -> None:
    routing = route_logits([[0.5, -1.0, 2.0], [-1.0, -2.0, -0.5], [0.25, 0.25, 0.0]], **REMOE)
    assert routing.expert_ids.tolist() == [[2, 0, -1], [-1, -1, -1], [0, 1, -1]]
    assert routing.kept.tolist() == [[True, True, False], [False] * 3, [True, True, False]]
    assert (routing.weights * routing.kept).tolist() == [[2.0, 0.5, 0.0], [0.0] * 3, [0.25, 0.25, 0.0]]
    assert routing.expert_counts().tolist() == [2, 1, 1]


def test_the_output_is_the_dense_sum_and_continuous_at_zero() -> None:
    layer, x = make_layer(router={"num_experts": 4, **REMOE}), tokens(9, 8)
    y, routing = layer(x)
    every = torch.stack([layer.experts.outputs(x, routing_to(routing, e))[:, 0] for e in range(4)], 1)
    torch.testing.assert_close(y, torch.einsum("te,ted->td", routing.scores, every), rtol=1e-5, atol=1e-5)


def routing_to(routing, e: int):
    from dataclasses import replace

    ids = torch.full((len(routing.scores), 1), e)
    return replace(routing, expert_ids=ids, weights=torch.ones(ids.shape), kept=torch.ones(ids.shape, dtype=torch.bool))


def test_the_penalty_weighs_each_expert_by_its_load() -> None:
    """T = 2, E = 2, k = 1, fair share 1: loads (2, 1), mean scores (1.5, 1): 2·1.5 + 1·1 = 4."""
    routing = route_logits([[1.0, 2.0], [2.0, -1.0]], num_experts_per_tok=1, **REMOE)
    assert l1_loss(routing, 1).item() == pytest.approx(4.0)
    padded = route_logits(
        [[1.0, 2.0], [2.0, -1.0], [9.0, 9.0]], mask=[True, True, False], num_experts_per_tok=1, **REMOE
    )
    assert l1_loss(padded, 1).item() == pytest.approx(4.0)


def test_the_controller_goes_a_fifth_up_or_down_or_stays() -> None:
    steps = [torch.tensor(0.0), torch.tensor(0.0)]
    for pairs, expected in ((30, 1.0), (25, 2.0), (10, 1.0), (20, 1.0)):  # 10 tokens in each of two layers, k = 1
        update_l1_(steps, pairs, 20, 1)
        assert [float(s) for s in steps] == [expected] * 2
    assert l1_factor(torch.tensor(-2.0)).item() == pytest.approx(1 / 1.44)


def test_the_objective_holds_the_penalty_at_its_present_strength() -> None:
    router = make_router(num_experts=4, **REMOE)
    router.l1_steps.fill_(5.0)
    routing = router(tokens(20, 8))
    config = BalanceConfig(aux_loss_coef=0.0, l1_coef=1e-3)
    total, terms = balance_objective({0: routing}, config, 1, routers={0: router})
    assert list(terms) == ["l1"]
    torch.testing.assert_close(total, 1e-3 * 1.2**5 * l1_loss(routing, 2))


def test_training_reaches_the_wanted_number_of_experts_per_token() -> None:
    """From ten of 16 experts to 2 on average, and it is held there, whatever the task would like."""
    layer = make_layer(router={"num_experts": 16, "num_experts_per_tok": 2, **REMOE})
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.02)
    config, per_token = BalanceConfig(aux_loss_coef=0.0, l1_coef=1e-3), []
    for step in range(200):
        optimizer.zero_grad()
        routing = layer.router(tokens(64, 8, seed=step) + 2.0)  # tokens have something in common
        task = -(routing.weights * routing.kept).sum(1).clamp(max=4.0).mean()  # weight is wanted, up to 4
        balance, _ = balance_objective({0: routing}, config, 1, routers={0: layer.router})
        (task + balance).backward()
        optimizer.step()
        counter = LoadCounter.empty(16)
        counter.add(routing)
        Control({0: layer}, config).step({0: counter}, Alone())
        per_token.append(float(counter.counts.sum()) / 64)
    assert per_token[0] > 8
    assert 1.4 < sum(per_token[-120:]) / 120 < 2.8


def test_a_frozen_router_keeps_its_penalty() -> None:
    layer = make_layer(router={"num_experts": 4, **REMOE})
    layer.router.requires_grad_(False)
    counter = LoadCounter.empty(4)
    counter.add(layer.router(tokens(8, 8)))
    Control({0: layer}, BalanceConfig()).step({0: counter}, Alone())
    assert float(layer.router.l1_steps) == 0.0


def test_it_is_causal_and_its_routing_is_as_wide_as_there_are_experts() -> None:
    config = RouterConfig(num_experts=6, **REMOE)
    assert config.causal_safe and config.most_experts_per_tok == 6
