"""A routing that is given back, at one layer: replay, mask, swap, force."""

import copy
import pickle
import re
from dataclasses import fields, replace

import pytest
import torch
from torch.utils import _pytree as pytree

from manyhands.config import RouterConfig
from manyhands.errors import ConfigError
from manyhands.moe import Edit, Force, Mask, MoELayer, Replay, Router, Routing, Swap
from manyhands.moe.edit import fewest_left

from .make_routing import make_layer, make_router, tokens

E, D = 8, 16
ROUTERS = {
    "mixtral": {},
    "switch": {"num_experts_per_tok": 1},
    "v3": {"score": "sigmoid", "bias": True, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3},
    "v3 groups": {"score": "sigmoid", "bias": True, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2},
    "v2 groups": {"n_group": 2, "topk_group": 1, "group_score": "max", "norm_topk_prob": False},
    "olmoe": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "gpt-oss": {"logit_bias": True, "num_experts_per_tok": 4},
}
every_router = pytest.mark.parametrize("router", [{"num_experts": E, **r} for r in ROUTERS.values()], ids=ROUTERS)


def layer_with(router: dict) -> MoELayer:
    layer = make_layer(D=D, F=16, router=router)
    bias = layer.router.e_score_correction_bias
    if bias is not None:
        bias.copy_(tokens(1, E, seed=8)[0] / 4)
    return layer


def same(a: Routing, b: Routing) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("expert_ids", "weights", "scores", "logits", "kept"))


@every_router
@pytest.mark.parametrize("weights", [False, True])
def test_a_replay_is_the_recorded_run_bit_for_bit(router: dict, weights: bool) -> None:
    layer, x = layer_with(router), tokens(40, D)
    y, routing = layer(x)
    for edit in (Replay.of(routing, weights), *(() if weights else (routing, Replay(routing.expert_ids.int())))):
        again, replayed = layer(x, edit=edit)
        assert torch.equal(again, y) and same(replayed, routing)


@every_router
def test_a_replay_by_another_router_weighs_the_recorded_experts(router: dict) -> None:
    layer, x = layer_with(router), tokens(40, D)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.router.weight.add_(torch.randn(E, D, generator=torch.Generator().manual_seed(3)))
    _, routing = layer(x)
    free, (_, given) = other(x)[1], other(x, edit=routing)
    assert torch.equal(given.expert_ids, routing.expert_ids) and not torch.equal(free.expert_ids, routing.expert_ids)
    assert torch.equal(given.scores, free.scores)
    c, chosen = other.router.config, given.scores.gather(1, routing.expert_ids)
    if c.norm_topk_prob and c.num_experts_per_tok > 1:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(given.weights, chosen * c.routed_scaling_factor)
    _, recorded = other(x, edit=Replay.of(routing, weights=True))
    assert torch.equal(recorded.weights, routing.weights)


def test_gradients_are_those_of_the_same_experts() -> None:
    """A trainer that replays a rollout: the router's weights get the gradient of these experts, and no others."""
    layer, x = layer_with({"num_experts": E, "num_experts_per_tok": 2}), tokens(40, D)
    y, routing = layer(x)
    target = tokens(40, D, seed=5)
    ((y * target).sum()).backward()
    expected = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    plain = Replay(routing.expert_ids.clone())
    ((layer(x, edit=plain)[0] * target).sum()).backward()
    for name, p in layer.named_parameters():
        assert torch.equal(p.grad, expected[name]), name
    layer.zero_grad()
    ids = torch.stack((routing.expert_ids[:, 0], routing.expert_ids.roll(1, 0)[:, 1]), 1)
    ids[:, 1] = torch.where(ids[:, 1] == ids[:, 0], (ids[:, 0] + 1) % E, ids[:, 1])
    _, given = layer(x, edit=Replay(ids))
    (given.weights * tokens(40, 2, seed=6)).sum().backward()
    got = layer.router.weight.grad.clone()
    weight = layer.router.weight.detach().double().requires_grad_()
    chosen = (x.double() @ weight.t()).softmax(-1).gather(1, ids)
    ((chosen / chosen.sum(-1, keepdim=True)) * tokens(40, 2, seed=6).double()).sum().backward()
    torch.testing.assert_close(got.double(), weight.grad, rtol=1e-4, atol=1e-5)
    layer.zero_grad()
    layer(x, edit=Replay.of(routing, weights=True))[0].sum().backward()
    assert layer.router.weight.grad is None or not layer.router.weight.grad.any()


def without(layer: MoELayer, off: list[int]) -> MoELayer:
    """A layer that never had these experts."""
    keep = torch.tensor([e for e in range(E) if e not in off])
    c = layer.router.config
    other = make_layer(D=D, F=16, router={**c.model_dump(), "num_experts": len(keep), "n_group": 1, "topk_group": 1})
    with torch.no_grad():
        state = layer.state_dict()
        other.load_state_dict(
            {n: t[keep] if n.startswith("experts.") or "router" in n else t for n, t in state.items()}
        )
    return other


@pytest.mark.parametrize("off", [[2], [0, 7], [1, 3, 4]])
@pytest.mark.parametrize("router", [r for n, r in ROUTERS.items() if "groups" not in n])
def test_a_mask_is_a_layer_whose_router_never_had_them(router: dict, off: list[int]) -> None:
    layer, x = layer_with({"num_experts": E, **router}), tokens(60, D)
    y, routing = layer(x, edit=Mask(tuple(off)))
    expected, never = without(layer, off)(x)
    keep = torch.tensor([e for e in range(E) if e not in off])
    assert torch.equal(routing.expert_ids, keep[never.expert_ids])
    torch.testing.assert_close(routing.weights, never.weights)
    torch.testing.assert_close(routing.scores[:, keep], never.scores)
    torch.testing.assert_close(y, expected)
    assert not routing.scores[:, off].any() and (routing.logits[:, off] == float("-inf")).all()


def test_a_bias_does_not_bring_back_what_is_off() -> None:
    router = make_router(D=D, num_experts=4, num_experts_per_tok=2, score="sigmoid", bias=True)
    router.e_score_correction_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    x = tokens(50, D)
    assert (router(x).expert_ids == 0).any() and not (router(x, edit=Mask((0,))).expert_ids == 0).any()


def test_a_group_counts_the_experts_that_are_left() -> None:
    """Its one expert that is left scores it: a sum of -inf would shut it, 0 beside negative ones would favour it."""
    router = Router(
        RouterConfig(num_experts=4, num_experts_per_tok=1, score="sigmoid", bias=True, n_group=2, topk_group=1), 4
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.tensor([[5.0, 4.0, -3.0, -3.0]])
    assert router(x, edit=Mask((0,))).expert_ids.tolist() == [[1]]
    assert router(x, edit=Mask((0, 1))).expert_ids.tolist()[0][0] in (2, 3)


def test_a_masked_expert_gets_no_gradient_and_the_rest_finite() -> None:
    layer, x = layer_with({"num_experts": E, "num_experts_per_tok": 2}), tokens(40, D)
    layer(x, edit=Mask((3,)))[0].square().sum().backward()
    grad = layer.router.weight.grad
    assert not grad[3].any() and grad.isfinite().all() and grad[[0, 1, 2, 4]].abs().sum() > 0


@every_router
def test_a_swap_is_a_layer_whose_experts_changed_places(router: dict) -> None:
    layer, x = layer_with(router), tokens(40, D)
    a, b = layer.router(x).expert_ids[0, 0].item(), layer.router(x).expert_ids[1, -1].item()
    b = b if b != a else (a + 1) % E
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for p in other.experts.parameters():
            p[[a, b]] = p[[b, a]].clone()
    (y, routing), (expected, plain) = layer(x, edit=Swap(a, b)), other(x)
    torch.testing.assert_close(y, expected)
    assert torch.equal(routing.weights, plain.weights) and not torch.equal(routing.expert_ids, plain.expert_ids)


def test_force_sends_every_token_there() -> None:
    layer, x = layer_with({"num_experts": E, "num_experts_per_tok": 2}), tokens(40, D)
    _, routing = layer(x, edit=Force((6, 1)))
    assert routing.expert_ids.unique(dim=0).tolist() == [[6, 1]] and routing.kept.all()
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(40))
    y, one = layer(x, edit=Force((5,)))
    assert one.expert_ids.unique(dim=0).tolist() == [[5, -1]] and one.kept.unique(dim=0).tolist() == [[True, False]]
    torch.testing.assert_close(one.weights, torch.tensor([1.0, 0.0]).expand(40, 2))
    torch.testing.assert_close(y, layer.experts(x, replace(one, expert_ids=one.expert_ids.clamp(min=0))))
    assert layer(x[:0], edit=Force((5,)))[1].expert_ids.shape == (0, 2)


def test_where_nothing_was_recorded_the_router_decides() -> None:
    layer, x = layer_with({"num_experts": E, "num_experts_per_tok": 2}), tokens(6, D)
    y, free = layer(x)
    ids = free.expert_ids.clone()
    ids[2] = torch.tensor([-1, -1])
    ids[4] = (ids[4] + 1) % E
    again, routing = layer(x, edit=Replay(ids, torch.full((6, 2), 0.25), ids >= 0))
    assert torch.equal(again[2], y[2]) and torch.equal(routing.expert_ids[4], ids[4]) and routing.kept.all()
    assert torch.equal(routing.weights[2], free.weights[2]) and (routing.weights[4] == 0.25).all()


def test_what_was_dropped_is_dropped_again() -> None:
    router = {"num_experts": 4, "num_experts_per_tok": 2, "eval_capacity_factor": 0.5, "min_capacity": 1}
    layer, x = make_layer(D=D, router=router).eval(), tokens(32, D)
    y, routing = layer(x)
    assert not routing.kept.all()
    half, part = layer(x[:16], edit=routing.rows(slice(16)))
    assert torch.equal(half, y[:16]) and torch.equal(part.kept, routing.kept[:16])
    assert not torch.equal(layer(x[:16], edit=Replay(routing.expert_ids[:16]))[1].kept, part.kept)


WRONG: dict[str, tuple[dict, Edit, str]] = {
    "no such expert": ({}, Mask((8,)), "there is no expert 8: the layer's are numbered from 0 to 7"),
    "too few left": ({}, Mask(tuple(range(7))), "without 7 experts 1 of 8 are left, and a token needs 2"),
    "too few in a group": (
        {"n_group": 4, "topk_group": 1}, Mask((0,)), "1 in the worst choice of 1 groups are left, and a token needs 2",
    ),
    "swap with itself": ({}, Swap(1, 1), "Swap names experts [1, 1]: give different ones"),
    "force too many": ({}, Force((1, 2, 3)), "Force names 3 experts; a token has 2 at most"),
    "force nobody": ({}, Force(()), "at least one"),
    "hash": ({"select": "hash", "num_experts_per_tok": 1}, Mask((1,)), "select = 'hash'"),
    "expert choice": ({"select": "expert_choice"}, Mask((1,)), "select = 'expert_choice'"),
    "floats": ({}, Replay(torch.zeros(4, 2)), "not integers [tokens, 2]"),
    "other K": ({}, Replay(torch.zeros(4, 3, dtype=torch.int64)), "expert_ids are [4, 3], not integers [tokens, 2]"),
    "other tokens": ({}, Replay(torch.tensor([[0, 1]] * 3)), "are [3, 2], the tokens and their experts [4, 2]"),
    "other weights": ({}, Replay(torch.tensor([[0, 1]] * 4), torch.ones(4)), "a replay's weights are [4]"),
    "beyond": ({}, Replay(torch.tensor([[0, 8]] * 4)), "a replay holds expert 8; the layer has 8, from 0 on"),
    "below": ({}, Replay(torch.tensor([[0, -2]] * 4)), "a replay holds expert -2"),
    "twice": ({}, Replay(torch.tensor([[1, 1]] * 4)), "gives a token one expert twice"),
}  # fmt: skip


@pytest.mark.parametrize("router, edit, says", WRONG.values(), ids=WRONG)
def test_what_cannot_be_followed_is_one_clear_error(router: dict, edit: Edit, says: str) -> None:
    layer = make_layer(D=D, router={"num_experts": E, **router})
    with pytest.raises(ConfigError, match=re.escape(says)):
        layer(tokens(4, D), token_ids=torch.arange(4), edit=edit)


def test_fewest_left_counts_the_groups_that_leave_fewest() -> None:
    config = RouterConfig(num_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2)
    assert [fewest_left(off, config) for off in ((), (0,), (0, 0), (0, 2), (0, 1))] == [4, 3, 3, 2, 4]


def test_edits_are_plain_values() -> None:
    _, routing = layer_with({"num_experts": E})(tokens(5, D))
    for value in (routing, Replay.of(routing, weights=True), Replay(routing.expert_ids)):
        value = pytree.tree_map(torch.detach, value)
        leaves, spec = pytree.tree_flatten(value)
        assert leaves and type(pytree.tree_unflatten(leaves, spec)) is type(value)
        again = pickle.loads(pickle.dumps(value))  # noqa: S301
        for field in fields(value):
            a, b = getattr(value, field.name), getattr(again, field.name)
            assert (a is None and b is None) or torch.equal(a, b)
    for value in (Mask((1, 2)), Swap(1, 2), Force((0,))):
        again = pickle.loads(pickle.dumps(value))  # noqa: S301
        assert again == value and hash(again) == hash(value)


class _Edited(torch.nn.Module):
    def __init__(self, layer: MoELayer, edit: Edit | None) -> None:
        super().__init__()
        self.layer, self.edit = layer, edit

    def forward(self, x: torch.Tensor, replay: Replay | None = None) -> tuple[torch.Tensor, Routing]:
        return self.layer(x, edit=self.edit if replay is None else replay)


@pytest.mark.parametrize("edit", [None, Mask((3,)), Force((1, 2)), Swap(0, 1)], ids=str)
def test_a_routing_comes_through_torch_export(edit: Edit | None) -> None:
    layer, x = make_layer(D=D, router={"num_experts": E}, implementation="grouped_mm").eval(), tokens(12, D)
    with torch.no_grad():
        made = torch.export.export(_Edited(layer, edit), (x,)).module()
        (y, routing), (expected, eager) = made(x), layer(x, edit=edit)
    assert isinstance(routing, Routing) and torch.equal(routing.expert_ids, eager.expert_ids)
    torch.testing.assert_close(y, expected)


def test_a_replay_goes_into_torch_export() -> None:
    layer, x = make_layer(D=D, router={"num_experts": E}, implementation="grouped_mm").eval(), tokens(12, D)
    with torch.no_grad():
        y, routing = layer(x)
        replay = Replay(routing.expert_ids)
        made = torch.export.export(_Edited(layer, None), (x, replay)).module()
        torch.testing.assert_close(made(x, replay)[0], y)
        turned = Replay((routing.expert_ids + 1) % E)
        assert torch.equal(made(x, turned)[1].expert_ids, turned.expert_ids)
