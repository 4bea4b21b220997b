"""Ties, orders and integer counts."""

from dataclasses import fields, replace

import pytest
import torch

from manyhands.kernels.policy import FEW_SCORES
from manyhands.moe.routing import Routing, count_experts, top_k_stable

from .make_routing import route_logits, routing_from, tokens


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_ties_go_to_the_lower_index(k: int) -> None:
    assert top_k_stable(torch.full((3, 5), 0.25), k).tolist() == [list(range(k))] * 3


def test_negative_zero_equals_zero() -> None:
    assert top_k_stable(torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0]]), 2).tolist() == [[0, 1], [0, 1]]


def test_order_of_all_kinds_of_floats() -> None:
    inf = float("inf")
    row = [1e-45, -1e-45, inf, -inf, 3.0, -3.0, 0.0, 1e38, -1e38]
    expected = sorted(range(len(row)), key=lambda i: -row[i])
    assert top_k_stable(torch.tensor([row]), len(row)).tolist() == [expected]


def test_equals_a_stable_sort_on_many_tied_rows() -> None:
    scores = tokens(500, 16).mul(2).round().div(2)  # many exact ties
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :6]
    assert torch.equal(top_k_stable(scores, 6), expected)


def test_nan_rows_still_give_different_valid_indices() -> None:
    nan = torch.full((1, 6), float("inf")) - torch.full((1, 6), float("inf"))
    for row in (nan, -nan):
        ids = top_k_stable(row, 3)[0].tolist()
        assert len(set(ids)) == 3 and all(0 <= i < 6 for i in ids)


def test_no_tokens() -> None:
    assert top_k_stable(torch.zeros(0, 4), 2).shape == (0, 2)


def test_counts_skip_padding_and_nobody() -> None:
    ids = torch.tensor([[0, 1], [1, -1], [2, 1], [0, 2]])
    mask = torch.tensor([True, True, True, False])
    counts = count_experts(ids, mask, 4)
    assert counts.tolist() == [1, 3, 1, 0] and counts.dtype == torch.int64


def test_counts_do_not_saturate() -> None:
    """bf16 counts stop at 256; these do not."""
    assert count_experts(torch.zeros(3000, 1, dtype=torch.int64), torch.ones(3000, dtype=torch.bool), 2)[0] == 3000


def test_counts_are_before_capacity() -> None:
    routing = route_logits([[1.0, 0.0]] * 8, num_experts_per_tok=1, eval_capacity_factor=0.5, min_capacity=1)
    assert int(routing.kept.sum()) == 2 and routing.expert_counts().tolist() == [8, 0]


def test_routing_is_frozen() -> None:
    routing = routing_from([[0]], [[0.5, 0.5]])
    with pytest.raises(AttributeError):
        routing.weights = routing.weights * 2  # type: ignore[misc]


@pytest.mark.parametrize("values", ["floats", "ties", "zeros", "infinities"])
def test_few_and_many_rows_choose_the_same(values: str) -> None:
    """A few rows are sorted, many are ranked by their bits: row by row and all at once must agree."""
    scores = torch.randn(FEW_SCORES // 32 + 40, 48)
    if values == "ties":
        scores = scores.round()
    if values == "zeros":
        scores = torch.where(scores > 0, 0.0, -0.0)
    if values == "infinities":
        scores[:, 5:40] = -torch.inf
    assert scores.numel() > FEW_SCORES
    few = torch.cat([top_k_stable(row[None], 12) for row in scores])
    assert torch.equal(top_k_stable(scores, 12), few)


def full(T: int, seed: int) -> Routing:
    """Every field set, each different in every token."""
    routing = route_logits(tokens(T, 4, seed=seed).tolist(), num_experts_per_tok=2)
    extra = {name: tokens(T, 4, seed=seed + 1) for name in ("noisy_logits", "noise_std")}
    groups = route_logits(tokens(T, 2, seed=seed + 3).tolist(), num_experts_per_tok=1)
    return replace(routing, **extra, expert_outputs=tokens(T, 6, seed=seed + 2).view(T, 2, 3), groups=groups)


def tensors(routing: Routing) -> dict[str, torch.Tensor]:
    """Every field, and those of the first level of a hierarchy."""
    found = {field.name: getattr(routing, field.name) for field in fields(Routing)}
    groups = found.pop("groups")
    above = {} if groups is None else {f"groups.{n}": t for n, t in tensors(groups).items()}
    return {name: t for name, t in (found | above).items() if t is not None}


def test_rows_slice_every_field() -> None:
    routing = full(7, seed=0)
    for tokens_of in (slice(2, 5), slice(6, None, 7), torch.tensor([4, 0]), torch.arange(7) > 3):
        some = tensors(routing.rows(tokens_of))
        assert len(some) == len(fields(Routing)) - 1 + 6  # the first level has neither noise nor outputs
        for name, whole in tensors(routing).items():
            assert torch.equal(some[name], whole[tokens_of]), name
    assert replace(routing, noise_std=None).rows(slice(2)).noise_std is None


def test_cat_undoes_rows_and_leaves_out_what_is_missing() -> None:
    routing = full(7, seed=0)
    again = Routing.cat([routing.rows(slice(0, 3)), routing.rows(slice(3, 3)), routing.rows(slice(3, 7))])
    for name, whole in tensors(routing).items():
        assert torch.equal(tensors(again)[name], whole), name
    both = Routing.cat([routing, replace(routing, noise_std=None)])
    assert both.noise_std is None and both.noisy_logits.shape == (14, 4)
