"""Load statistics: MaxVio, CV², entropy, dead experts, dropped share, top-1 weight."""

import math

import pytest
import torch

from manyhands.moe import LoadCounter

from .make_routing import make_layer, make_router, route_logits, routing_from, tokens


def counted(*routings, E: int = 4) -> LoadCounter:
    counter = LoadCounter.empty(E)
    for routing in routings:
        counter.add(routing)
    return counter


def test_hand_checked_summary() -> None:
    scores = torch.full((4, 4), 0.25)
    s = counted(routing_from([[0], [0], [0], [1]], scores, weights=[[0.5], [0.6], [0.7], [0.8]])).summary()
    assert s.load == [0.75, 0.25, 0.0, 0.0]
    assert s.max_vio == pytest.approx(2.0) and s.dead == 2 and s.dropped == 0.0
    assert s.cv2 == pytest.approx(1.5)  # counts 3,1,0,0: variance 1.5, mean 1
    assert s.entropy == pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4))
    assert s.top1_weight == pytest.approx(0.65)


def test_perfect_balance_and_all_for_one() -> None:
    scores = torch.full((4, 4), 0.25)
    even = counted(routing_from([[0], [1], [2], [3]], scores)).summary()
    assert (even.max_vio, even.cv2, even.dead) == (0.0, 0.0, 0) and even.entropy == pytest.approx(1.0)
    one = counted(routing_from([[2]] * 4, scores)).summary()
    assert (one.max_vio, one.dead) == (3.0, 3) and one.entropy == pytest.approx(0.0, abs=1e-12)


def test_micro_batches_add_up() -> None:
    z = tokens(24, 4).detach()
    whole = counted(route_logits(z.clone()))
    parts = counted(*(route_logits(z[i : i + 8].clone()) for i in (0, 8, 16)))
    assert torch.equal(whole.counts, parts.counts) and whole.counts.dtype == torch.int64
    assert whole.summary().load == parts.summary().load
    assert whole.summary().top1_weight == pytest.approx(parts.summary().top1_weight)


def test_padding_is_not_load() -> None:
    z = tokens(8, 4).detach()
    padded = counted(route_logits(z.clone(), mask=[True] * 5 + [False] * 3)).summary()
    real = counted(route_logits(z[:5].clone())).summary()
    assert padded.load == real.load and padded.top1_weight == pytest.approx(real.top1_weight)
    capped = route_logits(z.clone(), mask=[True] * 5 + [False] * 3, eval_capacity_factor=4.0)
    assert counted(capped).summary().dropped == 0.0, "padding is not dropped either"


def test_dropped_share() -> None:
    routing = route_logits(torch.zeros(8, 4), num_experts_per_tok=1, eval_capacity_factor=1.0, min_capacity=1)
    assert counted(routing).summary().dropped == pytest.approx(0.75)


def test_unsampled_second_experts_are_neither_load_nor_dropped() -> None:
    torch.manual_seed(0)
    routing = route_logits(tokens(100, 4), random_second=True, train=True)
    sampled = int((routing.expert_ids >= 0).sum())
    counter = counted(routing)
    assert int(counter.counts.sum()) == sampled < 200 and counter.summary().dropped == 0.0


def test_top1_weight_of_expert_choice_is_of_what_was_taken() -> None:
    routing = make_router(num_experts=4, select="expert_choice")(tokens(16, 8))
    taken = torch.where(routing.kept, routing.weights, 0.0).amax(1)
    assert counted(routing).summary().top1_weight == pytest.approx(taken.mean().item())


def test_nothing_counted() -> None:
    s = LoadCounter.empty(4).summary()
    assert s.load == [0.25] * 4 and s.dead == 4 and s.max_vio == 0.0 and s.dropped == 0.0


def test_one_expert() -> None:
    s = counted(routing_from([[0]] * 3, [[1.0]] * 3), E=1).summary()
    assert s.entropy == 1.0 and s.max_vio == 0.0


def test_evaluation_keeps_no_statistics_in_the_module() -> None:
    """Reliability case 16: nothing in the layer remembers a batch."""
    layer = make_layer(router={"num_experts": 4, "bias": True}).eval()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer(tokens(10, 8))
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
