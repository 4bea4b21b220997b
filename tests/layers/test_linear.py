"""`Linear` without a gradient: the native kernels for few rows, float32 for many in bfloat16; with one, PyTorch's."""

import copy

import pytest
import torch

from manyhands.kernels import linear as module
from manyhands.layers.linear import Linear


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(64, 37, True), (48, 80, False), (50, 33, True)])
@pytest.mark.parametrize("shape", [(1, 1), (0,), (3, 5), (40,)])
def test_without_a_gradient(dtype, inputs, outputs, bias, shape, monkeypatch) -> None:
    monkeypatch.setattr(module, "slow_bf16", lambda: True)
    monkeypatch.setattr(module, "ROUND_ROWS", 32)
    linear = Linear(inputs, outputs, bias).to(dtype)
    x = draw(*shape, inputs).to(dtype)
    weight, b = linear.weight.double(), None if linear.bias is None else linear.bias.double()
    expected = torch.nn.functional.linear(x.double(), weight, b)
    with torch.no_grad():
        y = linear(x)
    assert y.shape == expected.shape and y.dtype == dtype
    torch.testing.assert_close(y.double(), expected.detach(), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)
    torch.testing.assert_close(linear(x), y, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def test_weights_that_move_are_followed() -> None:
    linear, x = Linear(16, 4), draw(2, 16)
    with torch.no_grad():
        linear(x)
        linear.weight.data = draw(4, 16)
        linear.bias.data = torch.ones(4)
        torch.testing.assert_close(linear(x), x @ linear.weight.T + 1)
        other = copy.deepcopy(linear)
        linear.weight.zero_()
        assert not torch.equal(other(x), linear(x)) and torch.equal(linear(x), torch.ones(2, 4))
