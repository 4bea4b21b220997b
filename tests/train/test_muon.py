"""Muon against hand-checked cases, its definition in float64, and torch.optim.Muon."""

import pytest
import torch
from torch import nn

from manyhands.train import muon
from manyhands.train.muon import Muon, newton_schulz


def defined_ns(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The formula of docs/algorithms.md §8 for one matrix, in float64."""
    X = (G.T if G.shape[0] > G.shape[1] else G).double()
    X = X / X.norm()
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_hand_checked_values() -> None:
    ortho = newton_schulz(torch.diag(torch.tensor([3.0, 1.0])))
    torch.testing.assert_close(ortho, torch.diag(torch.tensor([0.753, 1.134])), atol=5e-4, rtol=0)


def test_one_scalar_step() -> None:
    # A matrix [[.5, 0], [0, √.75]] has norm 1, so its first entry goes through one bare step of the quintic.
    ortho = newton_schulz(torch.diag(torch.tensor([0.5, 0.75**0.5])), steps=1)
    assert ortho[0, 0].item() == pytest.approx(1.1889, abs=5e-5)


@pytest.mark.parametrize("shape", [(24, 24), (24, 32), (32, 24), (16, 64), (64, 16), (1, 8), (8, 1)])
@pytest.mark.parametrize("steps", [1, 5, 7])
def test_equals_definition_on_both_paths(shape: tuple[int, int], steps: int) -> None:
    G = torch.randn(3, 2, *shape, generator=torch.Generator().manual_seed(1))
    ortho = newton_schulz(G, steps)
    assert ortho.shape == G.shape and ortho.dtype == G.dtype
    expected = torch.stack([defined_ns(m, steps) for m in G.flatten(0, 1)]).view_as(G).float()
    torch.testing.assert_close(ortho, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_singular_values_after_five_steps(shape: tuple[int, int]) -> None:
    G = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    left, values, right = torch.linalg.svd(G, full_matrices=False)
    G = left @ torch.diag(values.clamp(min=0.05 * values.max().item())) @ right
    values = torch.linalg.svdvals(newton_schulz(G))
    assert values.min() > 0.67 and values.max() < 1.21
    assert values.max() - values.min() > 0.05, "values near one everywhere would be another algorithm"


def test_rank_deficient_gradient_is_exact_on_the_gram_path() -> None:
    generator = torch.Generator().manual_seed(3)
    G = torch.randn(64, 3, generator=generator) @ torch.randn(3, 256, generator=generator)
    torch.testing.assert_close(newton_schulz(G).double(), defined_ns(G.double()), atol=1e-4, rtol=0)
    assert newton_schulz(G, steps=20).isfinite().all()


def test_zero_gradient_only_decays() -> None:
    weight = nn.Parameter(torch.ones(2, 3, 8))
    weight.grad = torch.zeros_like(weight)
    weight.grad[1] = torch.eye(3, 8)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight[0], torch.full((3, 8), 1 - 0.05))
    assert weight[1].isfinite().all() and not torch.equal(weight[1], weight[0])


def test_absent_gradient_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3, 8))
    optimizer = Muon([weight], lr=0.1)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3, 8)) and not optimizer.state[weight]


@pytest.mark.parametrize("nesterov", [True, False])
def test_two_steps_of_the_formula(nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    start, g1, g2 = torch.randn(3, 6, 10, generator=generator)
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.01, momentum=0.7, nesterov=nesterov, weight_decay=0.1)
    expected, M = start.double(), torch.zeros(6, 10, dtype=torch.double)
    for g in (g1, g2):
        weight.grad = g.clone()
        optimizer.step()
        M = 0.7 * M + g
        ortho = defined_ns(g + 0.7 * M if nesterov else M) * (0.2 * 10**0.5)
        expected = expected - 0.01 * (ortho + 0.1 * expected)
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=0)
    assert list(optimizer.state[weight]) == ["momentum_buffer"]


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (32, 128)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_agrees_with_torch(shape: tuple[int, int], nesterov: bool) -> None:
    """torch's momentum is (1 − μ) times ours, which normalisation removes; its arithmetic is bfloat16, ours float32."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    train(Muon([ours], lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1), [ours], steps=3)
    oracle = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    train(oracle, [theirs], steps=3)
    ours_moved, theirs_moved = ours.detach() - start, theirs.detach() - start
    assert (ours_moved - theirs_moved).norm() < 0.02 * theirs_moved.norm()


def test_stack_equals_loop_over_experts() -> None:
    start = torch.randn(5, 12, 30, generator=torch.Generator().manual_seed(6))
    stacked = nn.Parameter(start.clone())
    single = [nn.Parameter(w.clone()) for w in start]
    optimizers = [Muon([stacked], lr=0.02), *(Muon([p], lr=0.02) for p in single)]
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        stacked.grad = torch.randn(start.shape, generator=generator)
        for p, g in zip(single, stacked.grad, strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in single]), atol=1e-6, rtol=0)


def test_fused_gate_and_up_equal_separate_ones() -> None:
    generator = torch.Generator().manual_seed(8)
    start, grad = torch.randn(2, 3, 20, 16, generator=generator)
    fused, whole = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    gate, up = (nn.Parameter(w.clone()) for w in start.chunk(2, dim=1))
    fused.grad, whole.grad = grad.clone(), grad.clone()
    gate.grad, up.grad = (g.clone() for g in grad.chunk(2, dim=1))
    Muon([fused], lr=0.02, split=2).step()
    Muon([whole], lr=0.02).step()
    Muon([gate, up], lr=0.02).step()
    torch.testing.assert_close(fused.detach(), torch.cat([gate.detach(), up.detach()], dim=1), atol=1e-6, rtol=0)
    assert (fused - whole).abs().max() > 1e-3


def test_batches_across_parameters_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(8, 16), (16, 8), (5, 8, 16), (4, 16, 8), (8, 8), (3, 8, 16)]
    generator = torch.Generator().manual_seed(9)
    starts = [torch.randn(s, generator=generator) for s in shapes]
    together = [nn.Parameter(w.clone()) for w in starts]
    alone = [nn.Parameter(w.clone()) for w in starts]
    sizes: list[int] = []

    def counted(G: torch.Tensor, steps: int) -> torch.Tensor:
        sizes.append(len(G))
        return newton_schulz(G, steps)

    monkeypatch.setattr(muon, "newton_schulz", counted)
    monkeypatch.setattr(muon, "CPU_BATCH_ELEMENTS", 4 * 8 * 16)
    train(Muon(together, lr=0.02), together, steps=1)
    assert max(sizes) == 4 and sum(sizes) == 15 and sizes[0] == 2, sizes
    monkeypatch.undo()
    for p, q in zip(alone, together, strict=True):
        p.grad = q.grad
        Muon([p], lr=0.02).step()
        torch.testing.assert_close(q.detach(), p.detach(), atol=1e-6, rtol=0)


def test_gradient_of_another_layout() -> None:
    start = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(10))
    grad = torch.randn(6, 4, 10, generator=torch.Generator().manual_seed(11)).transpose(0, 1)
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one.grad, two.grad = grad, grad.contiguous()
    Muon([one], lr=0.1).step()
    Muon([two], lr=0.1).step()
    assert torch.equal(one, two) and not torch.equal(one, start)


def test_refuses_what_is_no_matrix() -> None:
    with pytest.raises(AssertionError):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(AssertionError):
        Muon([nn.Parameter(torch.zeros(3, 4))], lr=0.1, split=2)
