"""GShard (§3): masked-einsum dispatch equals gather dispatch, buffers, the random second expert."""

import pytest
import torch

from .make_routing import make_layer, make_router, route_logits, tokens


def dispatch_and_combine(routing, size: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """GShard's tensors [G, S, E, C], filled by the queue of algorithm 1: all first choices, then all second ones.

    The last group is filled up with tokens that go nowhere. `combine` carries the gradient of the weights.
    """
    T, K = routing.expert_ids.shape
    G, E = -(-T // size), routing.num_experts
    dispatch, combine = torch.zeros(G, size, E, room), torch.zeros(G, size, E, room)
    for g in range(G):
        used = [0] * E
        for k in range(K):
            for s in range(min(size, T - g * size)):
                e, real = int(routing.expert_ids[g * size + s, k]), bool(routing.token_mask[g * size + s])
                if real and e >= 0 and used[e] < room:
                    here = torch.zeros(G, size, E, room)
                    here[g, s, e, used[e]] = 1.0
                    dispatch, combine = dispatch + here, combine + here * routing.weights[g * size + s, k]
                    used[e] += 1
    return dispatch, combine


def einsum_path(layer, x_TD: torch.Tensor, routing, size: int, room: int) -> torch.Tensor:
    """GShard's algorithm 2: GSEC,GSM→EGCM, every expert over its C places of every group, and back."""
    dispatch, combine = dispatch_and_combine(routing, size, room)
    filled = torch.cat((x_TD, x_TD.new_zeros(len(dispatch) * size - len(x_TD), x_TD.shape[1])))
    sent = torch.einsum("gsec,gsm->egcm", dispatch, filled.view(len(dispatch), size, -1))
    gate, up = torch.einsum("egcm,ehm->egch", sent, layer.experts.gate_up_proj).chunk(2, -1)
    done = torch.einsum("egch,emh->egcm", torch.nn.functional.silu(gate) * up, layer.experts.down_proj)
    return torch.einsum("gsec,egcm->gsm", combine, done).flatten(0, 1)[: len(x_TD)]


@pytest.mark.parametrize("random_second", [False, True])
def test_with_room_for_all_nothing_drops_and_einsum_equals_gather(random_second: bool) -> None:
    torch.manual_seed(0)
    layer, x = make_layer(router={"num_experts": 4, "random_second": random_second}), tokens(24, 8)
    y, routing = layer(x)
    assert torch.equal(routing.kept, routing.expert_ids >= 0)
    for size in (24, 8):
        torch.testing.assert_close(einsum_path(layer, x, routing, size, room=size), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "size", "room"),
    [
        ({"capacity_factor": 0.5}, 33, 8),  # ⌊0.5 · 33·2/4⌋
        ({"capacity_factor": 1.0, "capacity_per": "group", "capacity_group": 8}, 8, 4),
        ({"capacity_factor": 0.75, "capacity_per": "sequence"}, 11, 4),
        ({"capacity_tokens": 3, "capacity_per": "group", "capacity_group": 8, "random_second": True}, 8, 3),
        ({"capacity_tokens": 5, "capacity_per": "sequence", "random_second": True}, 11, 5),
        ({"capacity_tokens": 9}, 33, 9),
    ],
)
def test_with_little_room_einsum_equals_gather(fields: dict[str, object], size: int, room: int) -> None:
    """Outputs to 1e-6, gradients of everything too; T = 33 tokens, three sequences of 11, E = 4."""
    torch.manual_seed(0)
    layer = make_layer(router={"num_experts": 4, "min_capacity": 1, **fields})
    x = tokens(3, 11, 8).requires_grad_()
    probe = tokens(33, 8, seed=2)
    y, routing = layer(x)
    wanted = routing.expert_ids >= 0
    assert not torch.equal(routing.kept, wanted), "pairs are dropped, or this compares nothing"
    both = [einsum_path(layer, x.flatten(0, 1), routing, size, room), y.flatten(0, 1)]
    torch.testing.assert_close(both[1], both[0], rtol=0, atol=1e-6)
    parameters = (x, *layer.parameters())
    expected, found = (torch.autograd.grad((y * probe).sum(), parameters, retain_graph=True) for y in both)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_first_choices_fill_before_second_choices() -> None:
    """Token 0's second choice is expert 1, whose two rows the first choices of tokens 2 and 3 take."""
    z = [[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0]]
    routing = route_logits(z, eval_capacity_factor=0.75, min_capacity=1)  # 0.75 · 4·2/3 → 2 rows
    assert routing.expert_ids.tolist() == [[0, 1], [0, 2], [1, 2], [1, 2]]
    assert routing.kept.tolist() == [[True, False], [True, True], [True, True], [True, False]]


def test_what_is_dropped_is_not_given_to_the_others() -> None:
    z = tokens(16, 4)
    free, tight = route_logits(z), route_logits(z, eval_capacity_factor=0.5, min_capacity=1)
    assert torch.equal(free.weights, tight.weights) and not tight.kept.all()


def test_second_expert_is_used_with_twice_its_weight() -> None:
    """g2 = 0.1 is used in 20% of cases, g2 ≥ 0.5 never occurs, g2 = 0.45 in 90%."""
    torch.manual_seed(0)
    for g2 in (0.1, 0.3, 0.45):
        z = torch.tensor([[1 - g2, g2]]).log().repeat(20000, 1)
        routing = route_logits(z, random_second=True, train=True)
        share = (routing.expert_ids[:, 1] >= 0).float().mean().item()
        assert share == pytest.approx(2 * g2, abs=0.01)
        assert torch.equal(routing.kept[:, 1], routing.expert_ids[:, 1] >= 0)
        torch.testing.assert_close(routing.weights[:, 0], torch.full((20000,), 1 - g2))


def test_the_chance_does_not_depend_on_the_scale() -> None:
    torch.manual_seed(0)
    z = torch.tensor([[0.9, 0.1]]).log().repeat(5000, 1)
    routing = route_logits(z, random_second=True, train=True, routed_scaling_factor=2.5)
    assert (routing.expert_ids[:, 1] >= 0).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_second_expert_is_always_used_in_evaluation() -> None:
    assert (route_logits(tokens(50, 4), random_second=True).expert_ids >= 0).all()


def test_an_unsampled_second_choice_takes_no_room() -> None:
    torch.manual_seed(10)
    z = torch.tensor([[0.7, 0.3]]).log().repeat(20, 1)
    routing = route_logits(z, random_second=True, train=True, capacity_factor=0.15, min_capacity=1)  # 3 rows
    sampled = (routing.expert_ids[:, 1] >= 0).nonzero().flatten()
    assert 3 < sampled.numel() < 20 and sampled[0] > 0, "a seed that means something"
    assert routing.kept[:, 1].nonzero().flatten().tolist() == sampled[:3].tolist()
    assert int(routing.expert_counts()[1]) == sampled.numel()


def test_gradient_passes_through_both_gates_and_not_through_the_coin() -> None:
    torch.manual_seed(0)
    router = make_router(num_experts=4, random_second=True)
    routing = router(tokens(16, 8))
    (routing.weights * routing.kept).square().sum().backward()
    assert router.weight.grad.abs().max() > 0
