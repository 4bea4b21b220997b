"""The layer as a whole: invariants of §0 and §17, shared experts, padding, precision."""

import copy

import pytest
import torch

from .make_routing import make_layer, tokens

ROUTERS = {
    "mixtral": {},
    "switch": {"num_experts_per_tok": 1},
    "v3": {"score": "sigmoid", "bias": True, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
    "olmoe": {"norm_topk_prob": False, "num_experts_per_tok": 3},
}
every_router = pytest.mark.parametrize("router", [{"num_experts": 6, **r} for r in ROUTERS.values()], ids=ROUTERS)


def permute_experts(layer, perm: torch.Tensor):
    """Expert i of the result is expert perm[i] of `layer`."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for t in [other.router.weight, *other.experts.parameters()]:
            t.copy_(t[perm])
        if other.router.e_score_correction_bias is not None:
            other.router.e_score_correction_bias.copy_(layer.router.e_score_correction_bias[perm])
    return other


@every_router
def test_permuting_experts_changes_nothing(router: dict) -> None:
    layer, x = make_layer(router=router, expert_bias=True), tokens(20, 8)
    perm = torch.tensor([4, 3, 5, 1, 0, 2])  # keeps groups of three together, as group-limited routing needs
    if layer.router.e_score_correction_bias is not None:
        layer.router.e_score_correction_bias.copy_(tokens(1, 6, seed=8)[0] / 4)
    y, routing = layer(x)
    permuted, rerouted = permute_experts(layer, perm)(x)
    torch.testing.assert_close(permuted, y, rtol=1e-5, atol=1e-5)
    assert torch.equal(perm[rerouted.expert_ids], routing.expert_ids)
    assert torch.equal(rerouted.expert_counts(), routing.expert_counts()[perm])


@every_router
def test_permuting_tokens_commutes(router: dict) -> None:
    layer, x = make_layer(router=router), tokens(20, 8)
    perm = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    y, routing = layer(x)
    shuffled, rerouted = layer(x[perm])
    torch.testing.assert_close(shuffled, y[perm], rtol=1e-5, atol=1e-5)
    assert torch.equal(rerouted.expert_ids, routing.expert_ids[perm])


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu", "swiglu_oai", "geglu_tanh"])
def test_equal_experts_with_weights_of_sum_one_are_the_dense_network(activation: str) -> None:
    layer = make_layer(router={"num_experts": 6, "num_experts_per_tok": 3}, hidden_act=activation, n_shared_experts=1)
    dense, layer.shared_experts = layer.shared_experts, None
    with torch.no_grad():
        up = dense.up_proj.weight
        up = up if dense.gate_proj is None else torch.cat((dense.gate_proj.weight, up))
        getattr(layer.experts, layer.experts._up_name).copy_(up.expand(6, -1, -1))
        layer.experts.down_proj.copy_(dense.down_proj.weight.expand(6, -1, -1))
    x = tokens(10, 8)
    torch.testing.assert_close(layer(x)[0], dense(x), rtol=1e-5, atol=1e-5)


def test_shared_experts_are_added_and_may_be_gated() -> None:
    x = tokens(7, 8)
    for gated in (False, True):
        layer = make_layer(router={"num_experts": 4}, n_shared_experts=2, shared_expert_gate=gated)
        routed = layer.experts(x, layer.router(x))
        shared = layer.shared_experts(x)
        assert layer.shared_experts.up_proj.weight.shape == (16, 8), "one network, twice as wide"
        if gated:
            shared = shared * torch.sigmoid(x @ layer.shared_expert_gate.weight.T)
        torch.testing.assert_close(layer(x)[0], routed + shared)


def test_two_shared_experts_are_their_sum() -> None:
    layer, x = make_layer(router={"num_experts": 4}, n_shared_experts=2), tokens(5, 8)
    wide, parts = layer.shared_experts, 0
    for half in (slice(0, 8), slice(8, 16)):
        gate, up = x @ wide.gate_proj.weight[half].T, x @ wide.up_proj.weight[half].T
        parts = parts + (torch.nn.functional.silu(gate) * up) @ wide.down_proj.weight[:, half].T
    torch.testing.assert_close(wide(x), parts, rtol=1e-5, atol=1e-5)


@every_router
@pytest.mark.parametrize("factor", [None, 1.0])
def test_appended_padding_changes_no_real_token(router: dict, factor: float | None) -> None:
    layer = make_layer(router={**router, "capacity_factor": factor, "min_capacity": 1})
    x, padding = tokens(12, 8), 5 * tokens(6, 8, seed=9)
    y, routing = layer(x)
    for padded, real in (
        (torch.cat((x, padding)), slice(0, 12)),
        (torch.cat((padding, x)), slice(6, 18)),
    ):
        mask = torch.zeros(18, dtype=torch.bool)
        mask[real] = True
        got, rerouted = layer(padded, mask)
        torch.testing.assert_close(got[real], y, rtol=1e-5, atol=1e-5)
        assert torch.equal(rerouted.kept[real], routing.kept)
        assert torch.equal(rerouted.expert_counts(), routing.expert_counts())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_idle_experts_have_a_zero_gradient(implementation: str) -> None:
    layer = make_layer(router={"num_experts": 4, "num_experts_per_tok": 1}, implementation=implementation)
    with torch.no_grad():
        layer.router.weight.zero_()  # ties: everyone goes to expert 0
    y, routing = layer(tokens(5, 8))
    y.square().sum().backward()
    assert routing.expert_counts().tolist() == [5, 0, 0, 0]
    for p in layer.parameters():
        assert p.grad is not None
    assert torch.count_nonzero(layer.experts.gate_up_proj.grad[1:]) == 0
    assert torch.count_nonzero(layer.experts.gate_up_proj.grad[0]) > 0


def test_shapes_and_the_empty_batch() -> None:
    layer = make_layer(router={"num_experts": 4})
    y, routing = layer(tokens(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert y.shape == (2, 3, 8) and routing.expert_ids.shape == (6, 2)
    nothing, routing = layer(torch.zeros(0, 8, requires_grad=True))
    nothing.sum().backward()
    assert nothing.shape == (0, 8) and routing.expert_counts().tolist() == [0] * 4


def test_backends_are_switchable_per_layer() -> None:
    layer, x = make_layer(router={"num_experts": 4}), tokens(9, 8)
    outputs = []
    for name in ("eager", "grouped_mm", "auto"):
        layer.experts.implementation = name
        outputs.append(layer(x)[0])
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-5, atol=1e-5)
