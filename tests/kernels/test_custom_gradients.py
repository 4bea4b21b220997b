"""Hand-written backward passes against finite differences in float64, and the sort they rest on."""

import pytest
import torch

from manyhands.kernels.experts import activate, swiglu
from manyhands.kernels.permute import combine, gather, sort_pairs

from .dense_oracle import make_case


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_()


def test_swiglu_gradcheck() -> None:
    assert torch.autograd.gradcheck(swiglu, (leaf(5, 8),))
    assert torch.autograd.gradcheck(swiglu, (leaf(2, 3, 6),))


def test_swiglu_with_an_expanded_output_gradient() -> None:
    h = leaf(4, 6)
    swiglu(h).sum().backward()  # the incoming gradient has stride 0
    other = h.detach().clone().requires_grad_()
    gate, up = other.chunk(2, -1)
    (torch.nn.functional.silu(gate) * up).sum().backward()
    torch.testing.assert_close(h.grad, other.grad)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu", "swiglu_oai", "geglu_tanh"])
def test_activations_gradcheck(activation: str) -> None:
    assert torch.autograd.gradcheck(lambda h: activate(h, activation), (leaf(4, 6, seed=2),))


def test_hand_checked_swiglu() -> None:
    h = torch.tensor([[1.0, 0.0, 2.0, 3.0]])  # gate (1, 0), up (2, 3)
    torch.testing.assert_close(swiglu(h), torch.tensor([[2 * 0.7310586, 0.0]]))


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_gather_gradcheck(drop: float) -> None:
    case = make_case(6, 4, 4, 3, 2, drop=drop)
    p = sort_pairs(case.ids, case.kept, 3)
    assert torch.autograd.gradcheck(lambda x: gather(x, p), (leaf(6, 4),))


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_combine_gradcheck(drop: float) -> None:
    case = make_case(6, 4, 4, 3, 2, drop=drop)
    p = sort_pairs(case.ids, case.kept, 3)
    rows = leaf(int(case.kept.sum()), 4, seed=1)
    assert torch.autograd.gradcheck(lambda r, w: combine(r, w, p), (rows, leaf(6, 2, seed=2)))


def test_combine_float32_and_float64_paths_agree() -> None:
    case = make_case(9, 8, 4, 3, 2, drop=0.3)
    p = sort_pairs(case.ids, case.kept, 3)
    rows = leaf(int(case.kept.sum()), 8).detach()
    fast = combine(rows.float(), case.weights, p)
    torch.testing.assert_close(fast, combine(rows, case.weights, p).float())


def test_sort_is_by_expert_then_token() -> None:
    ids = torch.tensor([[2, 0], [0, 1], [2, 0]])
    kept = torch.tensor([[True, True], [True, True], [False, True]])
    p = sort_pairs(ids, kept, 4)
    assert p.token_N.tolist() == [0, 1, 2, 1, 0]
    assert p.pair_N.tolist() == [1, 2, 5, 3, 0]
    assert p.offsets_E.tolist() == [3, 4, 5, 5] and p.offsets_E.dtype == torch.int32
    kept_rows = p.row_TK[kept]
    assert kept_rows.sort().values.tolist() == list(range(5)), "each kept pair has a row of its own"
    assert torch.equal(p.pair_N[p.row_TK[1, 0]], torch.tensor(2))


def test_every_kept_pair_is_combined_exactly_once() -> None:
    case = make_case(20, 4, 4, 6, 3, drop=0.25)
    p = sort_pairs(case.ids, case.kept, 6)
    ones = torch.ones(int(case.kept.sum()), 4)
    y = combine(ones, torch.ones(20, 3), p)
    assert torch.equal(y[:, 0], case.kept.sum(1).float())
