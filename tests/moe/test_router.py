"""score → select → weigh against hand-checked cases: §0, §6 and §7 of docs/algorithms.md."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from manyhands.check import ROUTERS, oracle_routing
from manyhands.config import RouterConfig
from manyhands.moe.router import SCORES

from .make_routing import logit, make_router, route_logits, tokens

TOL = {"rtol": 0.0, "atol": 1e-4}


def test_bf16_proof_of_st_moe() -> None:
    """Ten logits of 128.0 and one of 128.5: .142 in float32, .091 in bf16, where 128.5 does not exist."""
    z = torch.tensor([[128.0] * 10 + [128.5]])
    routing = route_logits(z, num_experts_per_tok=1)
    torch.testing.assert_close(routing.weights, torch.tensor([[0.1415]]), rtol=0, atol=5e-4)
    assert routing.expert_ids.tolist() == [[10]]
    torch.testing.assert_close(z.bfloat16().float().softmax(-1)[0, 10], torch.tensor(0.0909), **TOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_maths_is_float32_at_any_input_dtype(dtype: torch.dtype) -> None:
    router = make_router(num_experts=6, bias=True)
    x = tokens(10, 8).to(dtype)
    routing, expected = router(x), router(x.float())
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.logits, expected.logits) and torch.equal(routing.weights, expected.weights)


def test_autocast_does_not_reach_the_router() -> None:
    router, x = make_router(num_experts=6, noisy=True), tokens(10, 8)
    torch.manual_seed(0)
    expected = router(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert torch.equal(routing.logits, expected.logits) and torch.equal(routing.noise_std, expected.noise_std)


def test_mixtral_weights() -> None:
    z = [[2.0, 1.0, 0.0, -1.0]]
    torch.testing.assert_close(route_logits(z).weights, torch.tensor([[0.7311, 0.2689]]), **TOL)
    raw = route_logits(z, norm_topk_prob=False).weights
    torch.testing.assert_close(raw, torch.tensor([[0.6439, 0.2369]]), **TOL)


def test_softmax_then_renormalise_is_softmax_of_the_kept() -> None:
    z = tokens(50, 8)
    routing = route_logits(z, num_experts_per_tok=3)
    torch.testing.assert_close(routing.weights, z.topk(3).values.softmax(-1))


def test_a_shared_shift_changes_nothing_for_softmax() -> None:
    z = tokens(20, 8)
    one, two = route_logits(z), route_logits(z + 3.0)
    assert torch.equal(one.expert_ids, two.expert_ids)
    torch.testing.assert_close(one.weights, two.weights)


def test_k1_keeps_the_raw_gate() -> None:
    """Divided by itself it would be 1 and the router would learn nothing."""
    routing = route_logits([[1.0, 0.0]], num_experts_per_tok=1, norm_topk_prob=True)
    torch.testing.assert_close(routing.weights, torch.tensor([[0.7311]]), **TOL)
    z = torch.randn(5, 4, requires_grad=True)
    router = make_router(D=4, num_experts=4, num_experts_per_tok=1)
    router(z).weights.sum().backward()
    assert router.weight.grad.abs().max() > 1e-3


S = (0.9, 0.8, 0.3, 0.1)
B = (-0.5, 0.0, 0.0, 0.35)
V3 = {"score": "sigmoid", "num_experts_per_tok": 2, "routed_scaling_factor": 2.5}


def test_v3_bias_selects_but_does_not_weigh() -> None:
    routing = route_logits(logit([S]), bias_values=B, **V3)
    assert routing.expert_ids.tolist() == [[1, 3]]
    torch.testing.assert_close(routing.weights, torch.tensor([[2.2222, 0.2778]]), **TOL)
    torch.testing.assert_close(routing.scores, torch.tensor([S]), **TOL)


def test_adding_a_constant_to_the_bias_changes_nothing() -> None:
    z = tokens(200, 8)
    bias = (torch.arange(8) / 16).tolist()
    one = route_logits(z, bias_values=bias, **V3)
    two = route_logits(z, bias_values=[b + 0.25 for b in bias], **V3)
    assert torch.equal(one.expert_ids, two.expert_ids) and torch.equal(one.weights, two.weights)


def test_weights_for_a_fixed_selection_do_not_depend_on_the_bias() -> None:
    z = tokens(50, 8)
    plain = route_logits(z, score="sigmoid", num_experts_per_tok=8)
    biased = route_logits(z, score="sigmoid", num_experts_per_tok=8, bias_values=[0.1 * i for i in range(8)])

    def dense(routing):
        return torch.zeros(50, 8).scatter(1, routing.expert_ids, routing.weights)

    torch.testing.assert_close(dense(plain), dense(biased))


def test_no_gradient_to_the_bias() -> None:
    router = make_router(num_experts=4, score="sigmoid", bias=True)
    assert "e_score_correction_bias" not in dict(router.named_parameters())
    router.e_score_correction_bias.requires_grad_()
    routing = router(tokens(6, 8))
    (routing.weights.square().sum() + routing.scores.sum()).backward()
    assert router.e_score_correction_bias.grad is None


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [True, False])
def test_router_gradient_is_the_finite_difference(score: str, norm: bool) -> None:
    """§17.3, with the selection frozen: the analytic gradient of Σ c·w in W_r."""
    router = make_router(D=5, num_experts=4, score=score, norm_topk_prob=norm, routed_scaling_factor=1.5)
    x, c = tokens(6, 5), tokens(6, 2, seed=3)
    routing = router(x)
    (routing.weights * c).sum().backward()
    ids, x64, c64 = routing.expert_ids, x.double(), c.double()

    def value(weight: torch.Tensor) -> float:
        z = F.linear(x64, weight)
        w = (z.softmax(-1) if score == "softmax" else z.sigmoid()).gather(1, ids)
        return float(((w / w.sum(-1, keepdim=True) if norm else w) * 1.5 * c64).sum())

    base = router.weight.detach().double()
    for e, d in [(0, 0), (1, 3), (2, 2), (3, 4)]:
        step = torch.zeros_like(base)
        step[e, d] = 1e-6
        expected = (value(base + step) - value(base - step)) / 2e-6
        assert router.weight.grad[e, d].item() == pytest.approx(expected, abs=1e-4)


def test_jitter_is_training_only_and_random() -> None:
    router, x = make_router(num_experts=4, jitter=0.1), tokens(5, 8)
    assert not torch.equal(router(x).logits, router(x).logits)
    router.eval()
    assert torch.equal(router(x).logits, F.linear(x, router.weight))


def test_scale_multiplies_the_weights_of_every_selection() -> None:
    ids = torch.arange(8)
    for select, k in (("topk", 2), ("hash", 1), ("expert_choice", 2)):
        plain = make_router(num_experts=4, num_experts_per_tok=k, select=select)
        scaled = make_router(num_experts=4, num_experts_per_tok=k, select=select, routed_scaling_factor=2.5)
        x = tokens(8, 8)
        torch.testing.assert_close(scaled(x, None, ids).weights, 2.5 * plain(x, None, ids).weights)


def test_every_score_is_computed_and_checked() -> None:
    """The names that a config may have, the router's table, the oracle's table and what `check` runs are one list."""
    names = set(get_args(RouterConfig.model_fields["score"].annotation))
    assert names == set(SCORES) == set(oracle_routing.SCORES) == {router.score for router in ROUTERS.values()}
