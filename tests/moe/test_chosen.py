"""Chosen experts beside frozen ones: the whole bank's outputs and gradients, whichever backend; nothing else moves."""

from dataclasses import replace

import pytest
import torch

from manyhands.config import MoEConfig, RouterConfig, parse
from manyhands.kernels import backend_names
from manyhands.moe import Experts, MoELayer
from manyhands.moe.chosen import ChosenExperts

E, K, D, F, T = 8, 3, 16, 8, 40


def layer(seed: int, **fields: object) -> MoELayer:
    torch.manual_seed(seed)
    router = RouterConfig(num_experts=E, num_experts_per_tok=K)
    config = parse(MoEConfig, {"router": router, "moe_intermediate_size": F, **fields})
    made = MoELayer(config, D)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("ids", [(2, 5), (7, 0, 3), (4,), tuple(range(E))])
@pytest.mark.parametrize("fields", [{}, {"expert_bias": True}, {"hidden_act": "relu"}], ids=["swiglu", "bias", "relu"])
def test_outputs_and_gradients_are_the_whole_banks(
    backend: str, ids: tuple[int, ...], fields: dict[str, object]
) -> None:
    whole, some = layer(0, **fields).train(), layer(0, **fields).train()
    assert isinstance(some.experts, Experts)
    chosen = some.experts = ChosenExperts(some.experts, ids)
    whole.experts.implementation = chosen.implementation = backend
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [moe(given)[0] for moe, given in zip((whole, some), inputs, strict=True)]
    torch.testing.assert_close(results[1], results[0], atol=2e-6, rtol=1e-5)
    for result in results:
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(some.router.weight.grad, whole.router.weight.grad, atol=1e-5, rtol=1e-5)
    for name, parameter in whole.experts.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(chosen.get_parameter(name).grad, parameter.grad[list(ids)], atol=1e-5, rtol=1e-5)
    assert all(p.grad is None for p in chosen.base.parameters())


def test_dropped_pairs_and_minus_one_are_left_out() -> None:
    whole, some = layer(0), layer(0)
    assert isinstance(some.experts, Experts)
    some.experts = ChosenExperts(some.experts, (1, 6))
    x = torch.randn(T, D)
    routing = whole.router(x)
    ids, kept = routing.expert_ids.clone(), routing.kept.clone()
    kept[::3, 0] = False
    ids[::3, 0] = -1
    routing = replace(routing, expert_ids=ids, kept=kept)
    torch.testing.assert_close(some.experts(x, routing), whole.experts(x, routing), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        some.experts.outputs(x, routing), whole.experts.outputs(x, routing), atol=2e-6, rtol=1e-5
    )


def test_what_is_trained_goes_back_into_its_places() -> None:
    bank = layer(0).experts
    assert isinstance(bank, Experts)
    before = {name: parameter.clone() for name, parameter in bank.named_parameters()}
    chosen = ChosenExperts(bank, (5, 2))
    with torch.no_grad():
        for name in before:
            chosen.get_parameter(name).add_(1.0)
    each = chosen.stacked([0, 2, 5])
    assert torch.equal(each.down, torch.stack([before["down_proj"][0], *(before["down_proj"][[2, 5]] + 1)]))
    back = chosen.put_back()
    assert back is bank
    for name, was in before.items():
        now = bank.get_parameter(name)
        assert torch.equal(now[[5, 2]], was[[5, 2]] + 1)
        others = [e for e in range(E) if e not in (2, 5)]
        assert torch.equal(now[others], was[others])


def test_bfloat16_experts_are_trained_in_float32_and_rounded_once() -> None:
    bank = layer(0).experts.bfloat16()
    assert isinstance(bank, Experts)
    chosen = ChosenExperts(bank, (1,))
    assert chosen.get_parameter("down_proj").dtype == torch.float32 and bank.down_proj.dtype == torch.bfloat16
    with torch.no_grad():
        chosen.get_parameter("down_proj").add_(0.01)
    trained = chosen.get_parameter("down_proj").detach().clone()
    assert torch.equal(chosen.put_back().down_proj[1], trained[0].bfloat16())
