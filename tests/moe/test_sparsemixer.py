"""SparseMixer-v2 (§9): two experts near the best, sampled while training; and SimBal's loss."""

import pytest
import torch

from manyhands.moe.balance import simbal_loss
from manyhands.moe.sparsemixer import sparsemixer

from .make_routing import make_router, route_logits, tokens

MIXER = {"select": "sparsemixer", "norm_topk_prob": False}


def test_in_evaluation_the_two_best_each_with_a_softmax_of_its_own() -> None:
    """ε = 0.1: of (2, 1.9, 1, 0.9) only 1.9 lies within a fifth of 2; without the first, nothing lies near 1.9."""
    routing = route_logits([[2.0, 1.9, 1.0, 0.9]], mixer_epsilon=0.1, **MIXER)
    assert routing.expert_ids.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weights, torch.tensor([[torch.tensor(0.1).sigmoid(), 1.0]]))


def test_weights_do_not_sum_to_one_and_equal_values_go_to_the_lower_number() -> None:
    routing = route_logits([[1.0, 1.0, 1.0]], **MIXER)
    assert routing.expert_ids.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weights, torch.tensor([[1 / 3, 1 / 2]]))


def test_training_samples_by_probability_and_weighs_a_third() -> None:
    """p = (0.6, 0.4), ε so wide that both take part. Where the lesser is drawn, a quarter of the weights is whole."""
    z = torch.tensor([[0.6, 0.4]]).log().repeat(40000, 1)
    torch.manual_seed(0)
    ids, weights = sparsemixer(z, 0.9, True)
    lesser = ids[:, 0] == 1
    assert lesser.float().mean().item() == pytest.approx(0.4, abs=0.01)
    torch.testing.assert_close(weights[~lesser, 0], torch.full_like(weights[~lesser, 0], 0.6))
    whole = weights[lesser, 0] > 0.3
    assert whole.float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(weights[lesser, 0][~whole], torch.full_like(weights[lesser, 0][~whole], 0.4 / 3))
    assert (ids.sum(1) == 1).all(), "the second is never the first"


def test_the_estimate_is_unbiased_where_heuns_rule_is_exact() -> None:
    """The gradient of E[f(i)] for f = (0, 1) is p₀·p₁ in the second logit; f is linear in the gate. A million draws."""
    torch.manual_seed(1)
    n = 400_000
    z = torch.tensor([[0.7, 0.3]]).log().repeat(n, 1).requires_grad_()
    ids, weights = sparsemixer(z, 0.9, True)
    # an expert's output is multiplied by its weight: f(w·o) with o = (0, 1), f the identity
    value = (weights[:, 0] * ids[:, 0]).sum() / n
    (gradient,) = torch.autograd.grad(value, z)
    # drawn: P(1) = 0.3, there the gate's gradient is p1·(1 − p1)
    assert gradient.sum(0)[1].item() == pytest.approx(0.3 * 0.3 * 0.7, abs=2e-3)


def test_gradient_is_that_of_the_whole_weight() -> None:
    torch.manual_seed(3)
    z = tokens(30, 5).requires_grad_()
    ids, weights = sparsemixer(z, 0.9, True)
    probe = tokens(30, 2, seed=8)
    (found,) = torch.autograd.grad((weights * probe).sum(), z)
    first = near(z.detach(), z.detach()).softmax(1)
    open_ = z.detach().scatter(1, ids[:, :1], float("-inf"))
    second = near(open_, z.detach()).softmax(1)
    expected = torch.zeros_like(z)
    for j, gates in enumerate((first, second)):
        p = gates.gather(1, ids[:, j : j + 1])
        one = torch.zeros_like(z).scatter(1, ids[:, j : j + 1], 1.0)
        expected += probe[:, j : j + 1] * p * (one - gates)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def near(open_: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    top = open_.amax(1, keepdim=True)
    return open_.masked_fill((top - z) > 1.8 * torch.maximum(z.abs(), top), float("-inf"))


def test_evaluation_draws_nothing() -> None:
    router, x = make_router(num_experts=8, mixer_epsilon=0.3, **MIXER).eval(), tokens(20, 8)
    assert torch.equal(router(x).weights, router(x).weights)
    router.train()
    assert not torch.equal(router(x).weights, router(x).weights)


def test_simbal_is_zero_for_orthonormal_rows() -> None:
    rows = torch.linalg.qr(tokens(6, 6))[0][:4]
    assert simbal_loss(rows).item() == pytest.approx(0.0, abs=1e-5)
    assert simbal_loss(2.0 * rows).item() == pytest.approx(12.0, abs=1e-4)  # |4 − 1| on each of 4 diagonal places
    assert simbal_loss(torch.zeros(3, 5)).item() == 3.0
