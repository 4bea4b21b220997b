"""Sharded tensors are drawn as one process draws the whole."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from manyhands.parallel.drawing import DrawnWhole
from manyhands.parallel.group import Group, mesh_of
from manyhands.parallel.shards import held_rows, is_sharded, local, put, whole
from tests.gloo import on_processes

SHAPES = [(8, 6, 16), (8, 3, 5), (3, 16), (40, 32), (1, 4), (7,), (64,), (3,)]


def _empty(shape: tuple[int, ...], ranks: Group, ep: int) -> DTensor:
    mesh = mesh_of(ranks, ep)
    assert mesh is not None
    return distribute_tensor(torch.zeros(shape), mesh.world, [Shard(0)], src_data_rank=None)


def _fill(tensor: Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        tensor.normal_(0.0, 0.5, generator=generator)
        tensor.uniform_(-1.0, 2.0, generator=generator)
        tensor.add_(1.0)
        tensor.copy_(nn.init.trunc_normal_(torch.empty(tensor.shape), 0.0, 0.3, -0.6, 0.6, generator=generator))
        tensor.mul_(2.0)


def _rows(ranks: Group) -> list[str]:
    wrong = []
    for shape in SHAPES:
        value = torch.arange(float(torch.Size(shape).numel())).view(shape)
        tensor = _empty(shape, ranks, 1)
        put(tensor, value)
        if not torch.equal(local(tensor), value[held_rows(tensor)]) or not torch.equal(whole(tensor), value):
            wrong.append(f"{shape} was put wrong")
        own, alike = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
        plain = torch.zeros(shape)
        with DrawnWhole():
            _fill(tensor, own)
        _fill(plain, alike)
        if not torch.equal(whole(tensor), plain):
            wrong.append(f"{shape} was drawn otherwise")
        if not torch.equal(torch.rand(3, generator=own), torch.rand(3, generator=alike)):
            wrong.append(f"{shape} left the generator elsewhere")
        assert is_sharded(tensor) and not is_sharded(plain)
    with pytest.raises(AssertionError, match="a slice of a sharded tensor is a copy"), DrawnWhole():
        tensor[0] = 1.0
    return wrong


@pytest.mark.parametrize("size", [2, 4])
def test_rows_and_draws(size: int) -> None:
    assert on_processes(size, _rows) == [[]] * size
