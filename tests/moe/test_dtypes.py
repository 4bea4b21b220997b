"""Router, bias and counts stay float32 and integer: after `.to(bfloat16)`, on the way through a checkpoint (§17.8)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .make_routing import make_layer, tokens

V3 = {"num_experts": 256, "num_experts_per_tok": 8, "score": "sigmoid", "bias": True, "noisy": True}


def v3_layer():
    layer = make_layer(D=16, F=8, router=V3)
    layer.router.e_score_correction_bias.copy_(1.0 + torch.arange(256) * 1e-4)  # bf16 would merge these
    return layer


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_casting_the_model_leaves_the_router(cast) -> None:
    layer = v3_layer()
    bias, weight = layer.router.e_score_correction_bias.clone(), layer.router.weight.detach().clone()
    cast(layer)
    assert layer.experts.down_proj.dtype != torch.float32
    assert torch.equal(layer.router.e_score_correction_bias, bias) and torch.equal(layer.router.weight, weight)
    assert layer.router.noise_weight.dtype == torch.float32
    assert layer.router.e_score_correction_bias.unique().numel() == 256


def test_a_bf16_layer_routes_in_float32() -> None:
    layer = v3_layer().to(torch.bfloat16).eval()
    y, routing = layer(tokens(6, 16).bfloat16())
    assert y.dtype == torch.bfloat16
    assert routing.scores.dtype == routing.logits.dtype == routing.weights.dtype == torch.float32
    assert routing.expert_ids.dtype == routing.expert_counts().dtype == torch.int64


def test_float32_masters_serve_a_bf16_forward() -> None:
    layer = make_layer(router={"num_experts": 4}, n_shared_experts=1, shared_expert_gate=True, expert_bias=True)
    x = tokens(6, 8)
    y, _ = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    torch.testing.assert_close(y.float(), layer(x.bfloat16().float())[0], rtol=0, atol=0.1)


def test_safetensors_round_trip_is_bit_equal(tmp_path: Path) -> None:
    layer = v3_layer().to(torch.bfloat16)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = make_layer(D=16, F=8, seed=7, router=V3).to(torch.bfloat16)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for name, t in layer.state_dict().items():
        assert t.dtype == other.state_dict()[name].dtype and torch.equal(t, other.state_dict()[name]), name
    assert other.router.e_score_correction_bias.dtype == other.router.weight.dtype == torch.float32


def test_moving_to_another_device_still_works() -> None:
    layer = v3_layer().to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.router.e_score_correction_bias.dtype == torch.float32
    both = v3_layer().to("meta", torch.bfloat16)
    assert both.router.weight.device.type == "meta" and both.router.weight.dtype == torch.float32
