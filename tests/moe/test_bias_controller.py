"""The loss-free controller (§7): sign rule, centred, once per step."""

import pytest
import torch

from manyhands.errors import ConfigError
from manyhands.moe.balance import update_bias

from .make_routing import make_router, tokens


def test_hand_checked_step() -> None:
    """Counts (3,1,0,0): signs (−1,0,1,1), centred (−1.25,−.25,.75,.75)e-3."""
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([3, 1, 0, 0]), 1e-3)
    torch.testing.assert_close(bias, torch.tensor([-1.25, -0.25, 0.75, 0.75]) * 1e-3)


def test_large_counts_keep_their_sign() -> None:
    """bf16 counts would flip it (Megatron #7081): 1000001 and 1000000 are one bf16 number."""
    bias = torch.zeros(2)
    update_bias(bias, torch.tensor([1_000_001, 1_000_000]), 0.5)
    assert bias.tolist() == [-0.5, 0.5]


def test_does_not_drift() -> None:
    bias, g = torch.zeros(8), torch.Generator().manual_seed(0)
    for _ in range(300):
        update_bias(bias, torch.randint(0, 100, (8,), generator=g), 1e-3)
    assert abs(bias.sum().item()) < 1e-5 and bias.abs().max() > 0


def test_balanced_counts_or_rate_zero_change_nothing() -> None:
    bias = torch.tensor([0.25, -0.25])
    update_bias(bias, torch.tensor([5, 5]), 1.0)
    update_bias(bias, torch.tensor([9, 1]), 0.0)
    assert bias.tolist() == [0.25, -0.25]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_it_balances_a_skewed_router(score: str) -> None:
    router = make_router(num_experts=8, score=score, bias=True)
    with torch.no_grad():
        router.weight.mul_(0.3)[:2] *= 2.0
    x = tokens(1024, 8)

    def max_vio() -> float:
        counts = router(x).expert_counts().double()
        return float(counts.max() / counts.mean()) - 1

    before = max_vio()
    for _ in range(300):
        update_bias(router.e_score_correction_bias, router(x).expert_counts(), 0.01)
    assert before > 0.4 and max_vio() < 0.25


@pytest.mark.parametrize(
    ("counts", "rate", "line"),
    [
        ([4], 1e-3, r"counts of \[1\] experts for a bias of \[4\]"),
        ([3, 1, 0, 0], float("nan"), "the rate of the bias is nan"),
        ([3, 1, 0, 0], -1e-3, "the rate of the bias is -0.001"),
    ],
)
def test_what_would_do_something_else_is_refused(counts: list[int], rate: float, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        update_bias(torch.zeros(4), torch.tensor(counts), rate)
