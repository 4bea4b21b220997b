"""A linear layer with LoRA against W + s·B·A in float64, plain and packed; and what is kept for the backward pass."""

import pytest
import torch
from torch import Tensor

from manyhands.config.packing import FORMATS
from manyhands.layers.adapted import AdaptedLinear, base_name
from manyhands.layers.linear import Linear
from manyhands.layers.packed_linear import RecordLinear
from manyhands.quant import pack_linear

OUT, IN, R, SCALE = 24, 40, 3, 1.5


def plain(dtype: torch.dtype = torch.float32) -> Linear:
    layer = Linear(IN, OUT)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_(0.0, IN**-0.5, generator=g)
        layer.bias.normal_(generator=g)
    return layer.to(dtype)


def packed(format: str) -> RecordLinear:
    layer = plain()
    record = pack_linear(layer.weight, layer.bias, format)
    found = RecordLinear(record.layout)
    found.record = record.record
    return found


def adapted(base: torch.nn.Module, dropout: float = 0.0) -> AdaptedLinear:
    layer = AdaptedLinear(base, R, SCALE, dropout)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.lora_B.normal_(generator=g)
    return layer


def weight_of(base: torch.nn.Module) -> tuple[Tensor, Tensor]:
    W, b = base.packed.dequantize() if isinstance(base, RecordLinear) else (base.weight, base.bias)
    return W.detach().double(), b.detach().double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16 weights", *(f"packed {f}" for f in FORMATS)])
def test_as_merged_weights(kind, dtype) -> None:
    base = packed(kind.removeprefix("packed ")) if kind.startswith("packed") else plain()
    if kind == "bfloat16 weights":
        base.to(torch.bfloat16)
    layer = adapted(base)
    if dtype == torch.float64:
        layer.double()
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    y = layer(x)
    probe = torch.linspace(-1.0, 1.0, OUT, dtype=torch.float64)
    (y * probe.to(dtype)).sum().backward()
    W, b = weight_of(base)
    A, B = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    wide = x.detach().double().requires_grad_()
    expected = wide @ (W + SCALE * B @ A).T + b
    (expected * probe).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    right = (
        (y.detach(), expected.detach()),
        (x.grad, wide.grad),
        (layer.lora_A.grad, A.grad),
        (layer.lora_B.grad, B.grad),
    )
    for found, want in right:
        assert found is not None and want is not None
        assert float((found.double() - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))
    assert all(p.grad is None for p in base.parameters())


def test_nothing_changes_while_b_is_zero() -> None:
    base = plain()
    x = torch.randn(6, IN)
    assert torch.equal(AdaptedLinear(base, R, SCALE)(x), base(x))


def test_dropout_in_training_alone() -> None:
    layer, x = adapted(plain(), dropout=0.5), torch.randn(64, IN)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    y = layer(x)
    assert torch.equal(y, layer(x))
    torch.testing.assert_close(y, layer.base_layer(x) + x @ layer.delta().T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", [packed("int4"), plain(torch.bfloat16)], ids=["int4", "bfloat16"])
def test_no_unpacked_weights_are_kept(base) -> None:
    """The record, or the weights in their own dtype, and thin tensors: not the weights in x's dtype."""
    kept: list[Tensor] = []
    layer, x = adapted(base), torch.randn(4, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x)
    assert kept and all(t.numel() < OUT * IN for t in kept)


def test_gradients_of_gradients() -> None:
    layer = adapted(packed("int8")).double()
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), (x,))


def test_names_without_wrappers() -> None:
    assert base_name("layers.0.mlp.experts.base_layer.down_proj") == "layers.0.mlp.experts.down_proj"
    assert base_name("layers.0.self_attn.q_proj.lora_A") == "layers.0.self_attn.q_proj.lora_A"
