"""Group-limited selection: DeepSeek-V3's sum of the two best, V2's best, −inf for the rest (§7)."""

import pytest
import torch

from manyhands.config import RouterConfig
from manyhands.moe.select import limit_to_groups

from .make_routing import logit, route_logits, tokens

SCORES = [[0.9, 0.1, 0.55, 0.5, 0.6, 0.3, 0.2, 0.2]]  # four groups of two


@pytest.mark.parametrize(("rule", "expected"), [("top2_sum", {0, 2}), ("max", {0, 4})])
def test_hand_checked_choice(rule: str, expected: set[int]) -> None:
    routing = route_logits(
        logit(SCORES), score="sigmoid", num_experts_per_tok=2, n_group=4, topk_group=2, group_score=rule
    )
    assert set(routing.expert_ids[0].tolist()) == expected


def test_other_groups_are_minus_infinity_not_zero() -> None:
    """With biases that make every allowed score negative, 0 would let a forbidden expert win (sglang #3705)."""
    bias = [-1.0, -2.0, -5.0, -5.0]
    routing = route_logits(
        logit([[0.6, 0.5, 0.9, 0.8]]), score="sigmoid", num_experts_per_tok=2, n_group=2, topk_group=1,
        bias_values=bias,
    )  # fmt: skip
    assert routing.expert_ids.tolist() == [[0, 1]]
    config = RouterConfig(num_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    limited = limit_to_groups(torch.tensor([[-0.4, -1.5, -4.1, -4.2]]), config)
    assert limited.tolist() == [[pytest.approx(-0.4), -1.5, float("-inf"), float("-inf")]]


@pytest.mark.parametrize("rule", ["top2_sum", "max"])
@pytest.mark.parametrize("topk_group", [1, 2, 3])
def test_at_most_m_groups_per_token(rule: str, topk_group: int) -> None:
    bias = tokens(1, 16, seed=5)[0].tolist()
    routing = route_logits(
        tokens(300, 16), score="sigmoid", num_experts_per_tok=4, n_group=4, topk_group=topk_group, group_score=rule,
        bias_values=bias,
    )  # fmt: skip
    groups = [set(row) for row in (routing.expert_ids // 4).tolist()]
    assert max(len(g) for g in groups) == topk_group
    assert all(len(set(row)) == 4 for row in routing.expert_ids.tolist())


def test_against_a_loop() -> None:
    z, bias = tokens(100, 12), tokens(1, 12, seed=7)[0]
    routing = route_logits(
        z, score="sigmoid", num_experts_per_tok=3, n_group=3, topk_group=2, bias_values=bias.tolist()
    )
    for t in range(100):
        choice = (z[t].sigmoid() + bias).tolist()
        group_score = [sum(sorted(choice[4 * g : 4 * g + 4])[-2:]) for g in range(3)]
        best = sorted(range(3), key=lambda g: -group_score[g])[:2]
        allowed = [e for e in range(12) if e // 4 in best]
        assert routing.expert_ids[t].tolist() == sorted(allowed, key=lambda e: -choice[e])[:3]


def test_groups_of_one_expert_and_tied_groups() -> None:
    singles = route_logits([[0.0, 3.0, 1.0, 2.0]], num_experts_per_tok=2, n_group=4, topk_group=2)
    assert singles.expert_ids.tolist() == [[1, 3]]
    tied = route_logits([[1.0] * 6], num_experts_per_tok=2, n_group=3, topk_group=1)
    assert tied.expert_ids.tolist() == [[0, 1]]


def test_all_groups_is_no_limit() -> None:
    z = tokens(50, 8)
    limited = route_logits(z, num_experts_per_tok=3, n_group=4, topk_group=4)
    assert torch.equal(limited.expert_ids, route_logits(z, num_experts_per_tok=3).expert_ids)
