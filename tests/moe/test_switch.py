"""Switch (§4): capacity, drops, jitter on a copy; and capacity in general."""

import pytest
import torch

from manyhands.config import RouterConfig
from manyhands.moe.capacity import apply_capacity, capacity

from .make_routing import make_layer, make_router, route_logits, tokens


def test_token_3_is_dropped_and_its_output_is_zero() -> None:
    """Assignment [0, 0, 1, 0] with two rows per expert."""
    layer = make_layer(
        D=4, router={"num_experts": 2, "num_experts_per_tok": 1, "capacity_factor": 1.0, "min_capacity": 1}
    )
    x = torch.zeros(4, 4)
    x[:, 2] = 1.0
    x[:, 0] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    y, routing = layer(x)
    assert routing.expert_ids.flatten().tolist() == [0, 0, 1, 0]
    assert routing.kept.flatten().tolist() == [True, True, True, False]
    assert torch.count_nonzero(y[3]) == 0 and (y[:3].abs().amax(1) > 0).all()
    assert routing.expert_counts().tolist() == [3, 1], "f counts the choice, not what fitted"


@pytest.mark.parametrize(
    ("T", "E", "k", "factor", "minimum", "expected"),
    [
        (64, 8, 1, 1.25, 0, 10),
        (64, 8, 2, 1.0, 0, 16),
        (64, 8, 1, 0.1, 4, 4),
        (3, 8, 1, 1.0, 4, 3),
        (0, 8, 1, 1.0, 4, 0),
    ],
)
def test_capacity(T: int, E: int, k: int, factor: float, minimum: int, expected: int) -> None:
    config = RouterConfig(num_experts=E, num_experts_per_tok=k, min_capacity=minimum)
    assert capacity(torch.tensor([T]), config, factor).tolist() == [expected]


@pytest.mark.parametrize("k", [1, 2])
def test_factor_e_never_drops(k: int) -> None:
    z = torch.zeros(32, 4)  # all ties: everyone goes to the same experts
    routing = route_logits(z, num_experts_per_tok=k, eval_capacity_factor=4.0, min_capacity=0)
    assert routing.kept.all() and routing.expert_counts().tolist() == [32] * k + [0] * (4 - k)


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("factor", [0.3, 0.8, 1.25])
def test_no_expert_exceeds_its_room_and_no_room_is_wasted(policy: str, factor: float) -> None:
    routing = route_logits(
        2 * tokens(60, 6), num_experts_per_tok=2, eval_capacity_factor=factor, min_capacity=1, drop_policy=policy
    )
    room = int(factor * 60 * 2 / 6)
    kept = torch.bincount(routing.expert_ids[routing.kept], minlength=6)
    assert torch.equal(kept, routing.expert_counts().clamp(max=room))


def test_probability_keeps_the_highest_weights() -> None:
    z = 2 * tokens(40, 4)
    routing = route_logits(
        z, num_experts_per_tok=2, eval_capacity_factor=0.5, min_capacity=1, drop_policy="probability"
    )
    for e in range(4):
        chosen = routing.expert_ids == e
        kept, dropped = routing.weights[chosen & routing.kept], routing.weights[chosen & ~routing.kept]
        assert not dropped.numel() or kept.min() >= dropped.max()


def test_probability_ties_go_to_the_earlier_token() -> None:
    routing = route_logits(
        torch.zeros(8, 2), num_experts_per_tok=1, eval_capacity_factor=0.5, min_capacity=1, drop_policy="probability"
    )
    assert routing.kept.flatten().tolist() == [True] * 2 + [False] * 6


def test_capacity_is_for_training_unless_evaluation_has_its_own() -> None:
    z = torch.zeros(16, 4)
    fields = {"num_experts_per_tok": 1, "capacity_factor": 1.0, "min_capacity": 1}
    assert int(route_logits(z, train=True, **fields).kept.sum()) == 4
    assert route_logits(z, train=False, **fields).kept.all()
    assert int(route_logits(z, train=False, eval_capacity_factor=2.0, **fields).kept.sum()) == 8


def test_padding_takes_no_room() -> None:
    ids, weights = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1)
    mask = torch.tensor([False, True, False, True, True, True])
    config = RouterConfig(num_experts=2, num_experts_per_tok=1, min_capacity=0)
    kept = apply_capacity(ids, weights, torch.ones(6, 1, dtype=torch.bool), mask, config, 1.0)  # 4 real → 2 rows
    assert kept.flatten().tolist() == [False, True, False, True, False, False]


def test_jitter_does_not_reach_the_experts() -> None:
    """With an empty router every gate is the same whatever the jitter, so any difference would be the experts'."""
    layer = make_layer(router={"num_experts": 3, "num_experts_per_tok": 1, "jitter": 0.5})
    with torch.no_grad():
        layer.router.weight.zero_()
    x = tokens(10, 8)
    before = x.clone()
    first, second = layer(x)[0], layer(x)[0]
    assert torch.equal(x, before), "the input is not changed in place"
    assert torch.equal(first, second) and torch.equal(first, layer.eval()(x)[0])


def test_jitter_stays_within_its_range() -> None:
    router = make_router(D=1, num_experts=2, num_experts_per_tok=1, jitter=0.01)
    with torch.no_grad():
        router.weight.fill_(1.0)
    factors = router(torch.ones(5000, 1)).logits[:, 0]
    assert 0.99 <= factors.min() < 0.991 and 1.009 < factors.max() <= 1.01


def test_evaluation_is_deterministic() -> None:
    layer = make_layer(router={"num_experts": 4, "noisy": True, "jitter": 0.1, "random_second": True}).eval()
    x = tokens(20, 8)
    assert torch.equal(layer(x)[0], layer(x)[0])
