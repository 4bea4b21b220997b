"""Expert extremes: idle experts, one for all, one token, none, ties, everything dropped."""

import pytest
import torch

from manyhands.kernels import backend_names

from .dense_oracle import assert_matches_oracle, forward_and_gradients, make_case

pytestmark = pytest.mark.parametrize("backend", sorted(backend_names()))


def test_idle_experts_get_a_zero_gradient_not_none(backend: str) -> None:
    ids = torch.tensor([[1, 3]] * 6)
    case = make_case(6, 8, 8, 5, 2, bias=True, ids=ids)
    assert_matches_oracle(case, backend)
    _, grads = forward_and_gradients(case.cast(torch.float32), backend)
    for name in ("up", "down", "up_bias", "down_bias"):
        idle, busy = grads[name][[0, 2, 4]], grads[name][[1, 3]]
        assert torch.count_nonzero(idle) == 0
        assert (busy.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("expert", [0, 2, 4])
def test_all_tokens_to_one_expert(backend: str, expert: int) -> None:
    assert_matches_oracle(make_case(9, 8, 8, 5, 1, bias=True, ids=torch.full((9, 1), expert)), backend)


def test_one_token(backend: str) -> None:
    assert_matches_oracle(make_case(1, 8, 8, 7, 3, bias=True), backend)


def test_one_expert(backend: str) -> None:
    assert_matches_oracle(make_case(5, 8, 8, 1, 1, bias=True), backend)


def test_every_expert_for_every_token(backend: str) -> None:
    assert_matches_oracle(make_case(5, 8, 8, 6, 6, bias=True), backend)


def test_empty_batch(backend: str) -> None:
    case = make_case(0, 8, 8, 4, 2, bias=True)
    y, grads = forward_and_gradients(case.cast(torch.float32), backend)
    assert y.shape == (0, 8)
    for name, grad in grads.items():
        assert grad is not None and torch.count_nonzero(grad) == 0, name


def test_every_pair_dropped(backend: str) -> None:
    case = make_case(7, 8, 8, 4, 2, bias=True, drop=1.1)
    y, grads = forward_and_gradients(case.cast(torch.float32), backend)
    assert torch.count_nonzero(y) == 0
    for name, grad in grads.items():
        assert grad is not None and torch.count_nonzero(grad) == 0, name


def test_identical_tokens(backend: str) -> None:
    case = make_case(6, 8, 8, 4, 2, ids=torch.tensor([[0, 2]] * 6))
    case.x = case.x[:1].repeat(6, 1)
    case.weights = case.weights[:1].repeat(6, 1)
    case.kept = torch.ones(6, 2, dtype=torch.bool)
    assert_matches_oracle(case, backend)
    y, _ = forward_and_gradients(case.cast(torch.float32), backend)
    torch.testing.assert_close(y, y[:1].expand(6, -1), rtol=1e-6, atol=1e-6)


def test_id_minus_one_is_nobody(backend: str) -> None:
    """GShard's unsampled second expert and expert choice's untaken pairs have id -1 and are not kept."""
    case = make_case(5, 8, 8, 4, 2, bias=True)
    case.kept = torch.tensor([[True, False]] * 5)
    with_ids, _ = forward_and_gradients(case.cast(torch.float32), backend)
    case.ids = torch.where(case.kept, case.ids, -1)
    without, grads = forward_and_gradients(case.cast(torch.float32), backend)
    assert torch.equal(with_ids, without)
    assert torch.count_nonzero(grads["weights"][:, 1]) == 0
    assert_matches_oracle(case, backend)


def test_a_dropped_pair_has_no_say(backend: str) -> None:
    """Changing the expert and the weight of a dropped pair changes neither output nor gradient."""
    case = make_case(6, 8, 8, 4, 2, seed=3)
    case.kept = torch.rand(6, 2, generator=torch.Generator().manual_seed(1)) > 0.4
    y1, grads1 = forward_and_gradients(case.cast(torch.float32), backend)
    case.weights = torch.where(case.kept, case.weights, 123.0)
    y2, grads2 = forward_and_gradients(case.cast(torch.float32), backend)
    assert torch.equal(y1, y2)
    assert all(torch.equal(grads1[name], grads2[name]) for name in grads1)


def test_a_dropped_pair_does_not_see_an_infinite_expert(backend: str) -> None:
    """Expert 0 overflows for token 0. Token 2, whose pairs are dropped, must not inherit it through 0 · inf."""
    case = make_case(3, 8, 8, 2, 1, ids=torch.tensor([[0], [1], [1]]))
    case.experts.up[0] = float("inf")
    case.kept = torch.tensor([[True], [True], [False]])
    y, _ = forward_and_gradients(case.cast(torch.float32), backend)
    assert y.isfinite().all(1).tolist() == [False, True, True]


def test_non_contiguous_tokens(backend: str) -> None:
    case = make_case(6, 8, 8, 4, 2)
    plain, _ = forward_and_gradients(case.cast(torch.float32), backend)
    strided = case.cast(torch.float32)
    strided.x = case.x.t().contiguous().t().requires_grad_()
    y, _ = forward_and_gradients(strided, backend)
    torch.testing.assert_close(y, plain)


def test_expert_permutation_commutes(backend: str) -> None:
    case = make_case(12, 8, 8, 5, 2, bias=True)
    y, _ = forward_and_gradients(case.cast(torch.float32), backend)
    perm = torch.tensor([3, 0, 4, 1, 2])  # the new expert i is the old perm[i]
    e = case.experts
    case.experts = e._replace(
        up=e.up[perm], down=e.down[perm], up_bias=e.up_bias[perm], down_bias=e.down_bias[perm]
    )  # fmt: skip
    case.ids = perm.argsort()[case.ids]
    permuted, _ = forward_and_gradients(case.cast(torch.float32), backend)
    torch.testing.assert_close(permuted, y, rtol=1e-5, atol=1e-5)
