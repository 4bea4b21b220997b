"""Shazeer's noisy top-k and its smooth load (§2)."""

import pytest
import torch

from manyhands.moe.balance import load_loss, smooth_load

from .make_routing import make_router, route_logits, tokens


def zero_router(E: int = 4, k: int = 2):
    router = make_router(num_experts=E, num_experts_per_tok=k, noisy=True)
    with torch.no_grad():
        for p in router.parameters():
            p.zero_()
    return router


def test_zero_init_makes_all_experts_equally_likely() -> None:
    torch.manual_seed(0)
    counts = zero_router()(tokens(8000, 8)).expert_counts().double()
    assert counts.sum() == 16000
    assert (counts / 16000 - 0.25).abs().max() < 0.012  # 3.5 σ


def test_noise_is_softplus_plus_epsilon() -> None:
    torch.manual_seed(0)
    routing = zero_router()(tokens(20000, 8))
    expected = 0.6931 + 1e-2
    torch.testing.assert_close(routing.noise_std, torch.full((20000, 4), expected), rtol=0, atol=1e-4)
    assert routing.noisy_logits.std().item() == pytest.approx(expected, rel=0.02)
    assert torch.count_nonzero(routing.logits) == 0, "logits are without noise"


def test_weights_are_the_softmax_over_the_kept_noisy_logits() -> None:
    routing = route_logits(tokens(30, 6), num_experts_per_tok=3, noisy=True, train=True)
    kept = routing.noisy_logits.gather(1, routing.expert_ids)
    assert torch.equal(routing.expert_ids, routing.noisy_logits.topk(3).indices)
    torch.testing.assert_close(routing.weights, kept.softmax(-1))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_are_of_the_clean_logits(score: str) -> None:
    z = tokens(10, 5)
    routing = route_logits(z, noisy=True, train=True, score=score)
    torch.testing.assert_close(routing.scores, z.softmax(-1) if score == "softmax" else z.sigmoid())


def test_smooth_load_is_the_chance_when_only_noise_i_is_drawn_again() -> None:
    """Monte Carlo: keep the others' noise, redraw expert i's, count how often i is among the k."""
    torch.manual_seed(3)
    z, k, draws = tokens(1, 5, seed=4), 2, 40000
    routing = route_logits(z, num_experts_per_tok=k, noisy=True, train=True)
    load = smooth_load(routing).detach()
    for i in range(5):
        noisy = routing.noisy_logits.detach().repeat(draws, 1)
        noisy[:, i] = z[0, i].detach() + torch.randn(draws) * routing.noise_std[0, i].detach()
        frequency = (noisy.topk(k).indices == i).any(1).float().mean()
        assert load[i].item() == pytest.approx(frequency.item(), abs=0.01)


def test_smooth_load_adds_over_tokens_and_skips_padding() -> None:
    torch.manual_seed(0)
    z = tokens(6, 4)
    routing = route_logits(z, noisy=True, train=True, mask=[True] * 4 + [False] * 2)
    noisy, std = routing.noisy_logits, routing.noise_std
    expected = torch.zeros(4)
    for t in range(4):
        for i in range(4):
            others = torch.cat((noisy[t, :i], noisy[t, i + 1 :])).sort(descending=True).values
            expected[i] += torch.special.ndtr((routing.logits[t, i] - others[1]) / std[t, i])
    torch.testing.assert_close(smooth_load(routing), expected)


def test_load_loss_reaches_both_weights() -> None:
    torch.manual_seed(0)
    router = make_router(num_experts=4, noisy=True)
    load_loss(router(tokens(32, 8))).backward()
    assert router.weight.grad.abs().max() > 0 and router.noise_weight.grad.abs().max() > 0


def test_no_noise_in_evaluation_means_hard_counts() -> None:
    router, x = make_router(num_experts=4, noisy=True).eval(), tokens(16, 8)
    routing = router(x)
    assert routing.noisy_logits is None and torch.equal(routing.weights, router(x).weights)
    assert torch.equal(smooth_load(routing), routing.expert_counts().float())


def test_k_equal_to_e_has_no_next_value() -> None:
    routing = route_logits(tokens(7, 3), num_experts_per_tok=3, noisy=True, train=True)
    assert smooth_load(routing).tolist() == [7.0, 7.0, 7.0] and load_loss(routing) == 0


def test_works_beside_a_random_second_expert() -> None:
    """An unsampled second expert has id -1; whether it was among the k best is another question."""
    torch.manual_seed(0)
    routing = route_logits(2 * tokens(64, 4), noisy=True, random_second=True, train=True)
    assert (routing.expert_ids == -1).any()
    load = smooth_load(routing)
    assert torch.isfinite(load).all() and load.sum().item() == pytest.approx(128, rel=0.2)
