"""What a process holds of a tensor, on meshes of every form and where some hold nothing."""

import pytest
import torch
from torch import nn

from manyhands.parallel.group import Group
from manyhands.parallel.shards import held_rows, laid_out, local, share, sum_over_shards_, whole
from tests.gloo import on_processes
from tests.sharded import LAYOUTS, cut, mesh_for


def model_of(rows: int, experts: int) -> nn.Module:
    root = nn.Module()
    root.experts = nn.Module()
    root.matrix = nn.Parameter(torch.arange(rows * 3.0).view(rows, 3))
    root.vector = nn.Parameter(torch.arange(float(rows)))
    root.experts.stack = nn.Parameter(torch.arange(experts * 4.0).view(experts, 2, 2))
    root.experts.bias = nn.Parameter(torch.arange(experts * 2.0).view(experts, 2))
    return root


def _pieces(ranks: Group, cases: list[tuple[int, int, int]]) -> list[list[int]]:
    """How many rows of each tensor lie here, after everything is seen to be consistent."""
    found = []
    for ep, rows, experts in cases:
        mesh = mesh_for(ranks, ep)
        one, model = model_of(rows, experts), cut(model_of(rows, experts), mesh)
        for full, param in zip(one.parameters(), model.parameters(), strict=True):
            full, held = full.detach(), local(param.detach())
            mine = held_rows(param)
            assert mine is not None
            assert torch.equal(full[mine], held) and torch.equal(share(full, param), held)
            assert torch.equal(whole(param.detach()), full)
            again = laid_out(held * 2, param, full.shape)
            assert torch.equal(whole(again), full * 2) and again.placements == param.placements  # type: ignore[attr-defined]
            assert torch.equal(sum_over_shards_(held.sum(), param), full.sum()), "small whole numbers add up exactly"
        found.append([len(local(param)) for param in model.parameters()])
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_every_row_lies_on_one_process(size: int) -> None:
    cases = [(ep, rows, experts) for ep in LAYOUTS[size] for rows, experts in [(1, 4), (5, 8), (16, 12)]]
    cases += [(2, 3, 2), (1, 4, 2)]
    found = on_processes(size, _pieces, cases)
    for i, (_, rows, experts) in enumerate(cases):
        assert [sum(held) for held in zip(*(rank[i] for rank in found), strict=True)] == [rows, rows, experts, experts]


def test_experts_are_cut_over_ep_first() -> None:
    """Six experts on 2 × 2: ranks 0 and 2 share the first three, so that one set of processes has them all."""
    found = on_processes(4, _pieces, [(2, 4, 6), (2, 4, 2)])
    assert [[held[2] for held in rank] for rank in found] == [[2, 1], [2, 1], [1, 0], [1, 0]]


def test_what_is_not_cut_is_whole() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert held_rows(x) is None
    for same in (local(x), whole(x), share(x, x), laid_out(x, x, x.shape), sum_over_shards_(x, x)):
        assert same is x
