"""BASE's balanced assignment and Sinkhorn (§9): even while training, the best in evaluation."""

from itertools import product

import numpy as np
import pytest
import torch

from manyhands.config import RouterConfig
from manyhands.moe.assign import assign, sinkhorn_offsets

from .make_routing import make_router, route_logits, tokens

BASE = {"select": "base", "score": "sigmoid", "num_experts_per_tok": 1}
SINKHORN = {"select": "sinkhorn", "norm_topk_prob": False}


def best_sum(values: np.ndarray, room: int) -> float:
    """By looking at every assignment there is."""
    T, E = values.shape
    allowed = (a for a in product(range(E), repeat=T) if max(np.bincount(a, minlength=E)) <= room)
    return max(sum(values[t, e] for t, e in enumerate(a)) for a in allowed)


@pytest.mark.parametrize(("T", "E"), [(6, 2), (6, 3), (7, 3), (5, 4), (1, 3)])
@pytest.mark.parametrize("kind", ["random", "integers", "one is best", "all alike"])
def test_the_assignment_is_the_best_of_all(T: int, E: int, kind: str) -> None:
    values = np.random.default_rng(T * E).normal(size=(T, E))
    values = {
        "random": values,
        "integers": values.round(),
        "one is best": values + 9.0 * (np.arange(E) == 0),
        "all alike": values[:1].repeat(T, 0),
    }[kind]
    found, room = assign(values, -(-T // E)), -(-T // E)
    assert np.bincount(found, minlength=E).max() <= room
    assert values[np.arange(T), found].sum() == pytest.approx(best_sum(values, room), abs=1e-12)


def test_base_is_exactly_even_in_training_and_the_best_in_evaluation() -> None:
    router, x = make_router(num_experts=4, **BASE), tokens(40, 8) + 1.0
    assert router(x).expert_counts().tolist() == [10] * 4
    routing = router.eval()(x)
    assert torch.equal(routing.expert_ids[:, 0], routing.logits.argmax(1))
    assert routing.expert_counts().max() > 10, "without assignment this router is uneven"
    torch.testing.assert_close(routing.weights, routing.logits.sigmoid().gather(1, routing.expert_ids))


def test_base_gives_padding_no_place() -> None:
    router, x = make_router(num_experts=4, **BASE), tokens(30, 8)
    mask = torch.arange(30) < 20
    routing, alone = router(x, mask), router(x[:20])
    assert torch.equal(routing.expert_ids[:20], alone.expert_ids)
    assert routing.expert_counts().tolist() == [5] * 4
    assert router(x, torch.zeros(30, dtype=torch.bool)).expert_counts().tolist() == [0] * 4


def test_a_diverged_run_does_not_hang() -> None:
    routing = route_logits(torch.full((8, 4), float("nan")), train=True, **BASE)
    assert routing.expert_counts().tolist() == [2] * 4


def test_sinkhorn_of_two_tokens() -> None:
    """exp(z) = [[4, 1], [1, 1]] becomes [[1/3, 1/6], [1/6, 1/3]]."""
    z = torch.tensor([[4.0, 1.0], [1.0, 1.0]]).log()
    plan = (z + sinkhorn_offsets(z)).softmax(1) / 2
    torch.testing.assert_close(plan, torch.tensor([[1 / 3, 1 / 6], [1 / 6, 1 / 3]]), rtol=0, atol=1e-4)


def test_sinkhorn_evens_the_loads_in_training_and_weighs_by_the_raw_scores() -> None:
    router, x = make_router(num_experts=4, **SINKHORN), tokens(200, 8) + 1.0
    routing = router(x)
    plain = router.eval()(x)
    assert torch.equal(plain.expert_ids, plain.scores.topk(2).indices)
    even, uneven = (int(r.expert_counts().max() - r.expert_counts().min()) for r in (routing, plain))
    assert even < uneven / 2
    torch.testing.assert_close(routing.weights, routing.scores.gather(1, routing.expert_ids))


@pytest.mark.parametrize("fields", [BASE, SINKHORN])
def test_gradient_goes_by_the_chosen_scores_alone(fields: dict) -> None:
    router, x = make_router(num_experts=4, **fields), tokens(16, 8)
    routing = router(x)
    (found,) = torch.autograd.grad(routing.weights.square().sum(), router.weight)
    z = x @ router.weight.T
    scores = z.sigmoid() if fields["select"] == "base" else z.softmax(1)
    (expected,) = torch.autograd.grad(scores.gather(1, routing.expert_ids).square().sum(), router.weight)
    torch.testing.assert_close(found, expected)


def test_evaluation_is_causal() -> None:
    assert RouterConfig(**BASE).causal_safe and RouterConfig(**SINKHORN).causal_safe
