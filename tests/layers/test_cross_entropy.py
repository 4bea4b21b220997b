"""The fused head and loss against `F.cross_entropy(F.linear(…))`, at any chunk size."""

import pytest
import torch
import torch.nn.functional as F

from manyhands.layers import cross_entropy
from manyhands.layers.cross_entropy import linear_cross_entropy


def inputs(T: int = 13, D: int = 6, V: int = 11, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    states = torch.randn(T, D, generator=g).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=g).requires_grad_()
    return states, head, torch.randint(0, V, (T,), generator=g), torch.rand(T, generator=g) > 0.3


def reference(states, head, targets, mask):
    states, head = states.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    loss = F.cross_entropy(F.linear(states, head)[mask], targets[mask])
    loss.backward()
    return loss.detach(), states.grad, head.grad


@pytest.mark.parametrize("chunk_rows", [1, 4, 13, 100])
def test_value_and_gradients(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_VALUES", chunk_rows * 11)
    states, head, targets, mask = inputs()
    loss = linear_cross_entropy(states, head, targets, mask)
    (3.0 * loss).backward()
    expected, dstates, dhead = reference(states, head, targets, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and loss.dtype == torch.float32
    torch.testing.assert_close(states.grad.double(), 3 * dstates, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.grad.double(), 3 * dhead, rtol=1e-5, atol=1e-6)


def test_float64_is_good_to_float32() -> None:
    """The loss is summed in float32 whatever the states are."""
    states, head, targets, mask = inputs(dtype=torch.float64)
    linear_cross_entropy(states, head, targets, mask).backward()
    _, dstates, dhead = reference(states, head, targets, mask)
    torch.testing.assert_close(states.grad, dstates, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(head.grad.double(), dhead, rtol=1e-5, atol=1e-6)


def test_bfloat16_states_float32_head() -> None:
    states, head, targets, mask = inputs(T=64, D=16, V=32, dtype=torch.bfloat16)
    loss = linear_cross_entropy(states, head, targets, mask)
    loss.backward()
    expected, dstates, dhead = reference(states, head, targets, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert states.grad.dtype == torch.bfloat16 and head.grad.dtype == torch.float32
    torch.testing.assert_close(states.grad.double(), dstates, rtol=0, atol=0.02 * dstates.abs().max().item())
    torch.testing.assert_close(head.grad.double(), dhead, rtol=0, atol=0.02 * dhead.abs().max().item())


def test_huge_logits_do_not_overflow() -> None:
    states = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    head = torch.eye(2)
    right = linear_cross_entropy(states, head, torch.tensor([0]), torch.tensor([True]))
    wrong = linear_cross_entropy(states, head, torch.tensor([1]), torch.tensor([True]))
    assert right.item() == 0.0 and wrong.item() == 1000.0


def test_masked_targets_count_nowhere() -> None:
    states, head, targets, mask = inputs()
    base = linear_cross_entropy(states, head, targets, mask)
    other = torch.where(mask, targets, (targets + 1) % 11)
    assert torch.equal(linear_cross_entropy(states, head, other, mask), base)
    base.backward()
    assert torch.count_nonzero(states.grad[~mask]) == 0 and torch.count_nonzero(states.grad[mask]) > 0


def test_no_targets_at_all() -> None:
    states, head, targets, _ = inputs()
    loss = linear_cross_entropy(states, head, targets, torch.zeros(13, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and torch.count_nonzero(states.grad) == 0 and torch.count_nonzero(head.grad) == 0
    assert linear_cross_entropy(states[:0], head, targets[:0], torch.ones(0, dtype=torch.bool)) == 0


def test_only_what_needs_a_gradient_gets_one() -> None:
    states, head, targets, mask = inputs()
    linear_cross_entropy(states.detach(), head, targets, mask).backward()
    linear_cross_entropy(states, head.detach(), targets, mask).backward()
    expected = inputs()
    linear_cross_entropy(*expected).backward()
    torch.testing.assert_close(states.grad, expected[0].grad)
    torch.testing.assert_close(head.grad, expected[1].grad)
    with torch.no_grad():
        assert not linear_cross_entropy(states, head, targets, mask).requires_grad


@pytest.mark.parametrize("chunk_rows", [4, 100])
def test_a_bias(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_VALUES", chunk_rows * 11)
    states, head, targets, mask = inputs()
    bias = torch.randn(head.shape[0], requires_grad=True)
    (3.0 * linear_cross_entropy(states, head, targets, mask, bias)).backward()
    found = [t.grad.double() for t in (states, head, bias)]
    leaves = [t.detach().double().requires_grad_() for t in (states, head, bias)]
    (3.0 * F.cross_entropy(F.linear(*leaves)[mask], targets[mask])).backward()
    for ours, theirs in zip(found, leaves, strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-5, atol=1e-6)
    bias.grad = None
    loss = linear_cross_entropy(states.detach(), head.detach(), targets, mask, bias)  # it alone
    (again,) = torch.autograd.grad(loss, bias, create_graph=True)
    torch.testing.assert_close(again.double(), leaves[2].grad / 3.0, rtol=1e-5, atol=1e-6)
