"""The joint scaling law reproduces its paper's optima and keeps its shape."""

import pytest

from manyhands.plan import law


def test_the_papers_optima() -> None:
    """arXiv 2502.05172, at 10^20 FLOPs: 1.73 B and 9.6 B tokens dense; 0.99 B and 16.8 B with 8 experts."""
    for experts, active, tokens in ((1, 1.73e9, 9.6e9), (8, 0.99e9, 16.8e9)):
        best = law.best_split(1e20, experts)
        assert best.active == pytest.approx(active, rel=0.01)
        assert best.tokens == pytest.approx(tokens, rel=0.01)
        assert 6 * best.active * best.tokens == pytest.approx(1e20)


def test_the_band_is_where_the_loss_says() -> None:
    best = law.best_split(1e20, 8)
    assert best.smallest < best.active < best.largest
    for n in (best.smallest, best.largest):
        assert law.loss(n, 1e20 / (6 * n), 8) == pytest.approx(best.loss * (1 + law.BAND), rel=1e-6)


def test_loss_falls_in_everything() -> None:
    assert law.loss(2e9, 2e10, 8) < law.loss(1e9, 2e10, 8)
    assert law.loss(1e9, 4e10, 8) < law.loss(1e9, 2e10, 8)
    losses = [law.loss(1e9, 2e10, experts) for experts in law.EXPERTS]
    assert losses == sorted(losses, reverse=True)


def test_what_is_extrapolated_says_so() -> None:
    assert not law.best_split(1e20, 1).extrapolated
    assert law.best_split(1e22, 1).extrapolated
    many = law.best_split(1e20, 32)
    assert many.active < law.ACTIVE_RANGE[1] and many.total > law.TOTAL_RANGE[1] and many.extrapolated


def test_one_expert_counts_as_the_fit_says() -> None:
    assert law.effective_experts(1) == pytest.approx(law.E_START)
    assert law.effective_experts(1e9) == pytest.approx(law.E_MAX, rel=1e-6)
