"""RMSNorm: value, hand-written gradient, precision; LayerNorm: value and precision."""

import pytest
import torch

from manyhands.layers.norm import LayerNorm, RMSNorm


def norm(width: int, dtype: torch.dtype = torch.float32, eps: float = 1e-6) -> RMSNorm:
    module = RMSNorm(width, eps).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 1.5, width))
    return module


def test_gradcheck_input_and_weight() -> None:
    module = norm(6, torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, module.weight))


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 4, 8), (0, 8)])
def test_value_and_gradient_are_those_of_torch(shape: tuple[int, ...]) -> None:
    module, x = norm(8, eps=1e-3), torch.randn(*shape, requires_grad=True)
    other, weight = x.detach().clone().requires_grad_(), module.weight.detach().clone().requires_grad_()
    expected = torch.nn.functional.rms_norm(other, (8,), weight, 1e-3)
    y = module(x)
    torch.testing.assert_close(y, expected)
    r = torch.randn_like(y)
    (y * r).sum().backward()
    (expected * r).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)


def test_zero_row_is_finite() -> None:
    module, x = norm(4), torch.zeros(2, 4, requires_grad=True)
    module(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.count_nonzero(module(x)) == 0


def test_statistics_in_float32() -> None:
    """4096 equal entries: their bf16 sum of squares would stop growing at 256."""
    module = RMSNorm(4096, 1e-6)
    with torch.no_grad():
        module.weight.fill_(1.0)
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16, requires_grad=True)
    y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-2)
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and module.weight.grad.dtype == torch.float32


def test_large_float16_values_do_not_overflow() -> None:
    y = norm(8)(torch.full((1, 8), 6e4, dtype=torch.float16))
    torch.testing.assert_close(y.float()[0], torch.linspace(0.5, 1.5, 8), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_gradients_it_is_the_same(dtype: torch.dtype) -> None:
    module, x = norm(96, dtype), torch.randn(2, 3, 96).to(dtype)
    with torch.no_grad():
        fast = module(x)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, module(x).detach(), rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)


def test_layer_norm_by_hand() -> None:
    module = LayerNorm(4, 0.5)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        module.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 10.0]))
    y = module(torch.tensor([[1.0, 2.0, 4.0, 5.0]]))  # mean 3, variance 2.5: divided by √3
    expected = torch.tensor([[-2.0, -2.0, 3.0, 8.0]]) / 3**0.5 + module.bias
    torch.testing.assert_close(y, expected)


def test_layer_norm_statistics_in_float32() -> None:
    """The mean of 1000 and its neighbours in bf16 is lost in bf16 itself."""
    module = LayerNorm(4096, 1e-6).to(torch.bfloat16)
    x = torch.full((1, 4096), 1000.0, dtype=torch.bfloat16)
    x[:, ::2] += 8.0
    y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, torch.tensor([1.0, -1.0], dtype=torch.bfloat16).repeat(1, 2048), rtol=0, atol=1e-2)
