"""Gradients of gradients, transforms and autocast: right through every backend, or one clear error."""

import pytest
import torch
from torch.func import functional_call

from manyhands.config import MoEConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.kernels import backend_names, native
from manyhands.kernels.experts import swiglu
from manyhands.kernels.permute import combine, gather, sort_pairs
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.layers.norm import RMSNorm
from manyhands.layers.rope import apply_rope
from manyhands.moe import MoELayer
from manyhands.quant import pack_experts

from .dense_oracle import make_case


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_()


def test_hand_written_gradients_have_gradients() -> None:
    case = make_case(5, 4, 4, 3, 2, drop=0.3)
    p = sort_pairs(case.ids, case.kept, 3)
    rows = leaf(int(case.kept.sum()), 4, seed=1)
    angles = leaf(1, 1, 3, 2, seed=5).detach()
    norm = RMSNorm(4, 1e-3).double()
    targets, mask = torch.tensor([1, 2, 0]), torch.tensor([True, False, True])
    check = torch.autograd.gradgradcheck
    assert check(swiglu, (leaf(3, 4),))
    assert check(lambda x: gather(x, p), (leaf(5, 4),))
    assert check(lambda r, w: combine(r, w, p), (rows, leaf(5, 2, seed=2)))
    assert check(lambda x: apply_rope(x, (angles.cos(), angles.sin()), False), (leaf(1, 2, 3, 4),))
    assert check(lambda x: norm(x), (leaf(3, 4),))
    assert check(lambda s, h: linear_cross_entropy(s, h, targets, mask), (leaf(3, 4), leaf(5, 4, seed=3)))


def layer_of(implementation: str) -> tuple[MoELayer, torch.Tensor]:
    torch.manual_seed(0)
    config = MoEConfig(router=RouterConfig(num_experts=4), moe_intermediate_size=16, n_shared_experts=1)
    layer = MoELayer(config, 32, implementation)
    for q in layer.parameters():
        torch.nn.init.normal_(q, 0, 0.3)
    return layer, torch.randn(6, 32)


def penalised(layer: MoELayer, x: torch.Tensor, grad) -> list[torch.Tensor]:
    """The gradients of ‖d loss / d weights‖²."""
    weights = list(layer.parameters())
    first = grad(layer(x)[0].square().sum(), weights)
    penalty = sum(g.square().sum() for g in first)
    return list(torch.autograd.grad(penalty, weights))


@pytest.mark.parametrize("name", [*backend_names(), "auto"])
def test_through_every_backend(name: str) -> None:
    layer, x = layer_of(name)
    found = penalised(layer, x, lambda y, w: torch.autograd.grad(y, w, create_graph=True))
    exact = layer_of("eager")[0].double()
    exact.router.double()
    expected = penalised(exact, x.double(), lambda y, w: torch.autograd.grad(y, w, create_graph=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_packed_experts_say_that_they_have_none() -> None:
    if not native.available():
        return
    case = make_case(4, 32, 16, 3, 2).cast(torch.float32)
    packed, x = pack_experts(case.experts, "int8"), case.x.detach().requires_grad_()
    y = native.packed_experts(x, case.ids, case.weights, case.kept, packed)
    with pytest.raises(ConfigError, match="second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", [*backend_names(), "auto"])
def test_transforms(name: str) -> None:
    layer, x = layer_of(name)
    weights = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(w: dict, x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, w, (x,))[0].square().sum()

    layer(x)[0].square().sum().backward()
    for key, gradient in torch.func.grad(loss)(weights, x).items():
        torch.testing.assert_close(gradient, layer.get_parameter(key).grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = torch.stack([layer(x[None, i])[0] for i in range(6)])
        torch.testing.assert_close(torch.func.vmap(lambda r: layer(r[None])[0])(x), expected, rtol=1e-4, atol=1e-5)
        direction = torch.randn_like(x)
        _, forward = torch.func.jvp(lambda x: layer(x)[0].square().sum(), (x,), (direction,))
    again = x.clone().requires_grad_()
    (backward,) = torch.autograd.grad(layer(again)[0].square().sum(), again)
    torch.testing.assert_close(forward, (backward * direction).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", [*backend_names(), "auto"])
def test_autocast_is_followed(name: str, gradients: bool) -> None:
    """Products in bfloat16, as PyTorch's are; the router stays float32; what comes back has x's dtype."""
    layer, x = layer_of(name)
    exact = layer(x)[0]
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x)
        outside = layer.router(x)
    assert torch.equal(routing.logits, outside.logits) and routing.weights.dtype == torch.float32
    assert torch.equal(routing.logits, layer.router(x).logits)
    error = float((y - exact).detach().norm() / exact.detach().norm())
    assert 1e-4 < error < 3e-2, error  # 2^-9 for each rounding; float32 would be 1e-7
    if gradients:
        y.sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "native"])
def test_at_the_input_which_the_router_reads_too(implementation: str) -> None:
    def gradient(implementation: str, create_graph: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        router = RouterConfig(num_experts=4, num_experts_per_tok=2)
        layer = MoELayer(MoEConfig(router=router, moe_intermediate_size=16), 32, implementation)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0.0, 0.1)
        x = torch.randn(6, 32, requires_grad=True)
        (first,) = torch.autograd.grad(layer(x)[0].pow(2).sum(), x, create_graph=create_graph)
        if not create_graph:
            return first, first
        return first.detach(), torch.autograd.grad(first.pow(2).sum(), x)[0]

    first, second = gradient(implementation, True)
    torch.testing.assert_close(first, gradient(implementation, False)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, gradient("eager", True)[1], rtol=1e-3, atol=1e-3)
