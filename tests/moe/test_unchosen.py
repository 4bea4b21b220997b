"""Default MoE and DenseMixer (§9): what the experts do that a token did not choose."""

import pytest
import torch

from manyhands.config import BalanceConfig, MoEConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.moe import LoadCounter
from manyhands.moe.control import Control
from manyhands.moe.unchosen import sum_outputs
from manyhands.parallel.ranks import Alone

from .make_routing import make_layer, tokens

RAW = {"num_experts": 4, "norm_topk_prob": False}


def every_output(layer, x: torch.Tensor) -> torch.Tensor:
    """[T, E, D]"""
    gate, up = torch.einsum("td,efd->tef", x, layer.experts.gate_up_proj).chunk(2, -1)
    return torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate) * up, layer.experts.down_proj)


def test_averages_stand_in_for_the_others() -> None:
    layer, x = make_layer(router=RAW, unchosen="average"), tokens(10, 8)
    layer.average_outputs.copy_(tokens(4, 8, seed=4))
    y, routing = layer(x)
    chosen = torch.zeros(10, 4, dtype=torch.bool).scatter(1, routing.expert_ids, True)
    said = torch.where(chosen[..., None], every_output(layer, x), layer.average_outputs)
    torch.testing.assert_close(y, torch.einsum("te,ted->td", routing.scores, said), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert layer.average_outputs.grad is None and not layer.average_outputs.requires_grad


@pytest.mark.parametrize("unchosen", ["average", "gradient"])
def test_with_all_experts_chosen_it_is_the_ordinary_layer(unchosen: str) -> None:
    router = {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": False}
    layer, plain = make_layer(router=router, unchosen=unchosen), make_layer(router=router)
    x = tokens(6, 8)
    assert torch.equal(layer(x)[0], plain(x)[0])
    for module in (layer, plain):
        module(x)[0].square().sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, plain.router.weight.grad)


def test_averages_move_once_per_step_over_micro_batches_without_padding() -> None:
    layer, x = (
        make_layer(router={**RAW, "num_experts_per_tok": 1}, unchosen="average", average_decay=0.75),
        tokens(12, 8),
    )
    before = layer.average_outputs.copy_(tokens(4, 8, seed=4)).clone()
    mask = torch.arange(12) < 10
    control, counter = Control({0: layer}, BalanceConfig()), LoadCounter.empty(4)
    assert control.wants_outputs
    _, routing = layer(x, mask, keep_outputs=True)
    for part in (slice(0, 5), slice(5, 12)):
        control.observe(0, routing.rows(part), 0.5)
        counter.add(routing.rows(part))
    assert torch.equal(layer.average_outputs, before)
    control.step({0: counter}, Alone())
    said = every_output(layer, x).detach()
    for e in range(4):
        rows = (routing.expert_ids[:, 0] == e) & mask
        right = 0.75 * before[e] + 0.25 * said[rows, e].mean(0) if rows.any() else before[e]
        torch.testing.assert_close(layer.average_outputs[e], right, rtol=1e-5, atol=1e-5)


def test_dropped_pairs_say_nothing() -> None:
    layer, x = make_layer(router={**RAW, "capacity_factor": 0.5, "min_capacity": 1}), tokens(12, 8)
    _, routing = layer(x, keep_outputs=True)
    counts = sum_outputs(routing)[1]
    assert counts.sum() == routing.kept.sum() < routing.expert_ids.numel()


@pytest.mark.parametrize("norm", [False, True])
def test_densemixer_says_the_same_and_gives_every_score_a_gradient(norm: bool) -> None:
    router = {"num_experts": 4, "norm_topk_prob": norm, "routed_scaling_factor": 1.5}
    layer, plain = make_layer(router=router, unchosen="gradient"), make_layer(router=router)
    x, probe = tokens(10, 8).requires_grad_(), tokens(10, 8, seed=7)
    y, routing = layer(x)
    assert torch.equal(y, plain(x)[0])
    routing.scores.retain_grad()
    (y * probe).sum().backward()
    found = layer.router.weight.grad.clone()
    experts = [p.grad.clone() for p in layer.experts.parameters()]
    (plain(x)[0] * probe).sum().backward()
    for ours, theirs in zip(experts, plain.experts.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)  # experts learn from their own tokens alone
    # by hand: straight through, as if all experts had been chosen, the others divided by a constant
    weight = layer.router.weight.detach().requires_grad_()
    scores = (x.detach() @ weight.T).softmax(1)
    chosen = torch.zeros_like(scores).scatter(1, routing.expert_ids, 1.0)
    total = (scores * chosen).sum(1, keepdim=True)
    weights = 1.5 * (scores * chosen / total + scores * (1 - chosen) / total.detach() if norm else scores)
    every = every_output(layer, x.detach()).detach()
    (torch.einsum("te,ted->td", weights, every) * probe).sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain.router.weight.grad)


def test_densemixer_runs_no_other_expert_in_evaluation() -> None:
    layer, x = make_layer(router=RAW, unchosen="gradient").eval(), tokens(10, 8)
    layer(x)[0].square().sum().backward()
    plain = make_layer(router=RAW).eval()
    plain(x)[0].square().sum().backward()
    assert torch.equal(layer.router.weight.grad, plain.router.weight.grad)


@pytest.mark.parametrize(
    ("unchosen", "router", "says"),
    [
        ("average", {}, "norm_topk_prob = false"),
        ("average", {"select": "hash", "num_experts_per_tok": 1}, "goes with select = 'topk'"),
        ("gradient", {"noisy": True}, "without noisy"),
        ("both", {}, "unchosen"),
    ],
)
def test_what_does_not_go_together(unchosen: str, router: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MoEConfig(unchosen=unchosen, router=RouterConfig(**router))
