"""Adapters that a router mixes: by the formula, one adapter and one token at a time; nothing changed at the start."""

import pytest
import torch

from manyhands.config import MoEConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.layers.linear import Linear
from manyhands.moe import MoELayer
from manyhands.moe.mixed import ExpertsBeside, LowRankMixture, MixedLinear, VectorMixture

M, T, IN, OUT, R = 5, 7, 12, 8, 3
CPU = torch.device("cpu")
TOP_K = pytest.mark.parametrize("top_k", [None, 1, 2, M])


def shares_of(mixture: LowRankMixture | VectorMixture, x: torch.Tensor, top_k: int | None) -> torch.Tensor:
    p = (x @ mixture.router.weight.T).softmax(-1)
    if top_k is None:
        return p
    kept = torch.zeros_like(p)
    for t in range(len(p)):
        for e in p[t].sort(descending=True).indices[:top_k]:
            kept[t, e] = p[t, e]
    return kept if top_k == 1 else kept / kept.sum(-1, keepdim=True)


def fill(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)


@TOP_K
def test_low_rank_by_the_formula(top_k: int | None) -> None:
    torch.manual_seed(0)
    mixture = LowRankMixture(M, top_k, IN, OUT, R, 6.0, CPU)
    fill(mixture)
    linear = MixedLinear(Linear(IN, OUT), mixture)
    x = torch.randn(2, T, IN, requires_grad=True)
    p = shares_of(mixture, x.view(-1, IN), top_k)
    low = torch.stack([mixture.lora_B[e] @ (mixture.lora_A[e] @ row) for row in x.view(-1, IN) for e in range(M)])
    expected = linear.base_layer(x) + 2.0 * (p[..., None] * low.view(2 * T, M, OUT)).sum(1).view(2, T, OUT)
    y = linear(x)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    trained = [mixture.lora_A, mixture.lora_B, mixture.router.weight, x]
    grad = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad(out, trained, grad, retain_graph=True) for out in (y, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)
    assert not linear.base_layer.weight.requires_grad


@TOP_K
def test_vectors_by_the_formula(top_k: int | None) -> None:
    torch.manual_seed(0)
    mixture = VectorMixture(M, top_k, IN, OUT, CPU)
    fill(mixture)
    linear = MixedLinear(Linear(IN, OUT), mixture)
    x = torch.randn(T, IN)
    scale = 1 + shares_of(mixture, x, top_k) @ mixture.scales
    torch.testing.assert_close(linear(x), linear.base_layer(x) * scale, atol=1e-5, rtol=1e-4)


def layer() -> MoELayer:
    router = RouterConfig(num_experts=4, num_experts_per_tok=2)
    made = MoELayer(MoEConfig(router=router, moe_intermediate_size=8, n_shared_experts=1), IN)
    fill(made)
    return made


def test_thin_experts_beside_a_mixture() -> None:
    torch.manual_seed(0)
    plain, x = layer(), torch.randn(2, T, IN)
    before, routing = plain(x)
    adapters = LowRankMixture(M, 2, IN, IN, R, 3.0, CPU)
    fill(adapters)
    plain.experts = ExpertsBeside(plain.experts, adapters)
    after, same = plain(x)
    torch.testing.assert_close(after - before, adapters(x.view(-1, IN)).view_as(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(routing.expert_ids, same.expert_ids)
    for implementation in ("eager", "grouped_mm"):
        plain.experts.implementation = implementation
        torch.testing.assert_close(plain(x)[0], after, atol=1e-4, rtol=1e-4)


def test_whoever_looks_past_thin_experts_is_refused() -> None:
    plain = layer()
    plain.experts = ExpertsBeside(plain.experts, LowRankMixture(M, 2, IN, IN, R, 3.0, CPU))
    for look in (lambda: plain(torch.randn(T, IN), keep_outputs=True), lambda: plain.experts.stacked([0])):
        with pytest.raises(ConfigError, match="perft"):
            look()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_ones_change_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(T, IN, dtype=dtype)
    for top_k in (None, 1, 2):
        for mixture in (LowRankMixture(M, top_k, IN, OUT, R, 3.0, CPU), VectorMixture(M, top_k, IN, OUT, CPU)):
            mixture.reset_parameters(torch.Generator().manual_seed(0))
            linear = MixedLinear(Linear(IN, OUT), mixture)
            assert torch.equal(linear(x), linear.base_layer(x))
