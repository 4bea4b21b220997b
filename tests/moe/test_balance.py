"""f·P and its scale table, z-loss, importance: §0, §2, §5."""

import pytest
import torch

from manyhands.moe import balance

from .make_routing import route_logits, routing_from, tokens


@pytest.mark.parametrize("E", [2, 8])
@pytest.mark.parametrize("k", [1, 2])
def test_one_at_perfect_balance_for_any_k(E: int, k: int) -> None:
    ids = torch.stack([(torch.arange(E) + j) % E for j in range(k)], 1)
    L = balance.load_balancing_loss(routing_from(ids, torch.full((E, E), 1.0 / E)))
    assert L.item() == pytest.approx(1.0)


def test_below_one_example() -> None:
    """90% of tokens (.34, .33, .33), 10% (0, 1, 0) → 0.945: L ≥ 1 is no law."""
    scores = torch.tensor([[0.34, 0.33, 0.33]] * 9 + [[0.0, 1.0, 0.0]])
    L = balance.load_balancing_loss(routing_from([[0]] * 9 + [[1]], scores))
    assert L.item() == pytest.approx(0.9453, abs=1e-4)


def test_scale_table() -> None:
    """Other frameworks' losses as multiples of L (§0)."""
    z = tokens(64, 8)
    routing = route_logits(z, num_experts_per_tok=2)
    L, E, S = balance.load_balancing_loss(routing).item(), 8, 64
    p = z.softmax(-1).detach()
    one_hot = torch.nn.functional.one_hot(routing.expert_ids, E).float()
    mixtral = E * (one_hot.mean(0) * p.mean(0)[None]).sum().item()  # transformers' load_balancing_loss_func
    assert mixtral == pytest.approx(2 * L, rel=1e-5)
    top1 = route_logits(z, num_experts_per_tok=1)
    L1, f1 = balance.load_balancing_loss(top1).item(), top1.expert_counts().float() / S
    switch = (f1 * p.mean(0)).mean().item() * E**2
    assert switch == pytest.approx(L1, rel=1e-5)
    gshard = (f1 * p.mean(0)).sum().item() / E
    assert gshard == pytest.approx(L1 / E**2, rel=1e-5)


def test_gradient_is_through_p_only() -> None:
    z = tokens(16, 4)
    routing = route_logits(z)
    f = routing.expert_counts().float() / 32
    (grad,) = torch.autograd.grad(balance.load_balancing_loss(routing), z)
    free = z.detach().requires_grad_()
    (expected,) = torch.autograd.grad(4 * (f * free.softmax(-1).mean(0)).sum(), free)
    torch.testing.assert_close(grad, expected)


def test_sigmoid_scores_are_normalised() -> None:
    routing = route_logits(3 * tokens(32, 4), score="sigmoid")
    assert balance.mean_probability(routing).sum().item() == pytest.approx(1.0, abs=1e-5)


def test_global_scope_takes_f_from_outside() -> None:
    routing = route_logits(tokens(16, 4))
    counts = torch.tensor([10, 0, 30, 24])
    P = routing.scores.mean(0)
    expected = 4 * (counts / 64 * P).sum()
    torch.testing.assert_close(balance.load_balancing_loss(routing, counts), expected)


def test_z_loss_values() -> None:
    assert balance.z_loss(routing_z([[0.0, 0.0]])).item() == pytest.approx(0.4805, abs=1e-4)
    assert balance.z_loss(routing_z([[10.0, 0.0]])).item() == pytest.approx(100.0009, abs=1e-3)
    both = balance.z_loss(routing_z([[0.0, 0.0], [10.0, 0.0]]))
    assert (1e-3 * both).item() == pytest.approx(0.05024, abs=1e-5)


def routing_z(z):
    return route_logits(z, num_experts_per_tok=1)


def test_a_shift_of_all_logits_changes_only_the_z_loss() -> None:
    z = tokens(10, 4).detach()
    one, two = routing_z(z.clone()), routing_z(z + 5)
    assert torch.equal(one.expert_ids, two.expert_ids)
    assert balance.z_loss(two) > balance.z_loss(one) + 5
    torch.testing.assert_close(balance.load_balancing_loss(one), balance.load_balancing_loss(two))


def test_cv_squared_is_the_population_variance() -> None:
    assert balance.cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)  # with n−1: 0.5


def test_perfect_balance_has_no_nan_in_value_or_gradient() -> None:
    v = torch.ones(8, requires_grad=True)
    loss = balance.cv_squared(v)
    loss.backward()
    assert loss == 0 and torch.equal(v.grad, torch.zeros(8))
    zero = torch.zeros(8, requires_grad=True)
    balance.cv_squared(zero).backward()
    assert torch.isfinite(zero.grad).all()


def test_importance_is_the_sum_of_gates() -> None:
    weights = [[0.7, 0.3], [0.6, 0.4], [1.0, 9.0]]
    routing = routing_from([[0, 1], [0, 2], [1, -1]], torch.full((3, 3), 1 / 3), weights=weights)
    assert balance.gates(routing).tolist() == [
        pytest.approx([0.7, 0.3, 0.0]), pytest.approx([0.6, 0.0, 0.4]), pytest.approx([0.0, 1.0, 0.0]),
    ]  # fmt: skip
    importance = torch.tensor([1.3, 1.3, 0.4])
    expected = importance.var(correction=0) / importance.mean() ** 2
    torch.testing.assert_close(balance.importance_loss(routing), expected)


def test_importance_reaches_the_router_through_the_gates() -> None:
    z = tokens(16, 4)
    balance.importance_loss(route_logits(z)).backward()
    assert z.grad.abs().max() > 0


ALL = [
    balance.load_balancing_loss,
    balance.z_loss,
    balance.importance_loss,
    balance.load_loss,
    balance.variance_loss,
    lambda r: balance.sequence_balancing_loss(r, 2),
    lambda r: balance.complementary_sequence_loss(r, 2),
]


@pytest.mark.parametrize("loss", ALL)
def test_no_tokens_and_only_padding_are_finite(loss) -> None:
    nothing = loss(route_logits(torch.zeros(0, 4)))
    padding = loss(route_logits(tokens(4, 4), mask=[False] * 4))
    assert torch.isfinite(nothing) and torch.isfinite(padding)
    if padding.requires_grad:  # the load in evaluation is a plain count
        padding.backward()


@pytest.mark.parametrize("loss", ALL[:5])
def test_padding_counts_nowhere(loss) -> None:
    z = tokens(12, 4)
    mask = [i % 3 != 0 for i in range(12)]
    real = z.detach()[torch.tensor(mask)]
    torch.testing.assert_close(loss(route_logits(z, mask=mask)), loss(route_logits(real)))


@pytest.mark.parametrize("loss", ALL[:5])
def test_permuting_experts_or_tokens_changes_no_loss(loss) -> None:
    z = tokens(12, 4).detach()
    expected = loss(route_logits(z.clone()))
    torch.testing.assert_close(loss(route_logits(z[:, torch.tensor([2, 0, 3, 1])])), expected)
    torch.testing.assert_close(loss(route_logits(z.flip(0))), expected)
