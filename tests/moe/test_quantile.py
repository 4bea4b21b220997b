"""Quantile balancing (§9): the bias that would have given each expert its share."""

import pytest
import torch

from manyhands.config import BalanceConfig
from manyhands.moe import LoadCounter
from manyhands.moe.balance import quantile_bias
from manyhands.moe.control import Control
from manyhands.parallel.ranks import Alone

from .make_routing import make_layer, tokens

QUANTILE = BalanceConfig(bias_update="quantile")


def test_by_hand() -> None:
    """k = 1, E = 2, T = 4, q = 2. Prices are the lesser of each row: 0, 1, 0, 2.

    What is left of expert 0: 3, 0, 1, 4, of which the third largest is 1; of expert 1: 0, 1, 0, 0, so 0.
    """
    z = torch.tensor([[3.0, 0.0], [1.0, 2.0], [1.0, 0.0], [6.0, 2.0]])
    found = quantile_bias(z, torch.zeros(2), torch.ones(4, dtype=torch.bool), 1)
    assert found.tolist() == [-1.0, 0.0]


def test_padding_and_the_case_of_all_experts() -> None:
    z, mask = tokens(30, 4), torch.arange(30) < 20
    bias = torch.tensor([0.1, 0.0, -0.2, 0.0])
    assert torch.equal(quantile_bias(z, bias, mask, 2), quantile_bias(z[:20], bias, mask[:20], 2))
    assert torch.equal(quantile_bias(z, bias, mask, 4), bias)
    assert torch.equal(quantile_bias(z, bias, torch.zeros(30, dtype=torch.bool), 2), bias)


def test_two_steps_even_a_skewed_router() -> None:
    """No rate: where the sign controller needs hundreds of steps, this one is there after a few."""
    router = {"num_experts": 8, "num_experts_per_tok": 2, "bias": True, "bias_on": "logit"}
    layer = make_layer(router=router)
    x, loads = tokens(800, 8) + 1.0, []
    for _ in range(6):
        routing = layer.router(x)
        counter = LoadCounter.empty(8)
        counter.add(routing)
        loads.append(counter.summary().max_vio)
        control = Control({0: layer}, QUANTILE)
        for half in (slice(0, 400), slice(400, 800)):
            control.observe(0, routing.rows(half), 0.5)
        control.step({0: counter}, Alone())
    assert loads[0] > 1.0 and loads[-1] < 0.25


@pytest.mark.parametrize("on", ["score", "logit"])
def test_the_mean_over_micro_batches(on: str) -> None:
    layer, x = make_layer(router={"num_experts": 4, "bias": True, "bias_on": on}), tokens(40, 8)
    router = layer.router
    routing = router(x)
    control, ones, before = Control({0: layer}, QUANTILE), torch.ones(20, dtype=torch.bool), torch.zeros(4)
    choice = routing.logits if on == "logit" else routing.scores
    expected = (quantile_bias(choice[:20], before, ones, 2) + quantile_bias(choice[20:], before, ones, 2)) / 2
    for half in (slice(0, 20), slice(20, 40)):
        control.observe(0, routing.rows(half), 0.5)
        assert torch.equal(router.e_score_correction_bias, before), "nothing moves before the step is over"
    counter = LoadCounter.empty(4)
    control.step({0: counter}, Alone())
    torch.testing.assert_close(router.e_score_correction_bias, expected)


def test_the_bias_selects_on_the_logits_and_weighs_nothing() -> None:
    layer = make_layer(router={"num_experts": 4, "bias": True, "bias_on": "logit", "score": "sigmoid"})
    layer.router.e_score_correction_bias.copy_(torch.tensor([3.0, -3.0, 0.0, 0.0]))
    routing = layer.router(tokens(50, 8))
    wanted = (routing.logits + layer.router.e_score_correction_bias).topk(2).indices
    assert torch.equal(routing.expert_ids, wanted)
    picked = routing.scores.gather(1, wanted)
    torch.testing.assert_close(routing.weights, picked / picked.sum(1, keepdim=True))
