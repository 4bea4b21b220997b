"""`Group`: sums, largest values and words are the same on every process."""

import pytest
import torch

from manyhands.errors import ConfigError
from manyhands.parallel.group import Group, joined, mesh_of
from manyhands.parallel.ranks import Alone
from manyhands.parallel.started import started_together
from tests.gloo import on_processes


def _sums(ranks: Group) -> tuple[list[float], list[float], list[int]]:
    mine = torch.arange(3.0) + ranks.rank
    kept = mine.clone()
    total, largest = ranks.sum(mine), ranks.max(mine)
    assert torch.equal(mine, kept)
    counts = ranks.sum(torch.tensor([ranks.rank, 1])[::1])
    return total.tolist(), largest.tolist(), counts.tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_sum_and_max(size: int) -> None:
    ranks = range(size)
    expected = [sum(i + r for r in ranks) for i in range(3)], [i + size - 1.0 for i in range(3)], [sum(ranks), size]
    assert on_processes(size, _sums) == [expected] * size


def _told(ranks: Group) -> object:
    return ranks.tell({"step": 3, "what": "Grüße", "none": None} if ranks.rank == 0 else "not looked at")


def test_everyone_hears_what_rank_0_says() -> None:
    assert on_processes(2, _told) == [{"step": 3, "what": "Grüße", "none": None}] * 2


def _meshes(ranks: Group) -> tuple[list[int], list[int], int, str]:
    mesh = mesh_of(ranks, 2)
    assert mesh is not None
    with pytest.raises(ConfigError, match=r"parallel\.ep = 3 does not divide the 4 processes"):
        mesh_of(ranks, 3)
    return mesh.dp.mesh.tolist(), mesh.ep.mesh.tolist(), mesh.world.size(), str(mesh.world.mesh_dim_names)


def test_mesh_of_four() -> None:
    found = on_processes(4, _meshes)
    assert [(dp, ep) for dp, ep, _, _ in found] == [
        ([0, 2], [0, 1]),
        ([1, 3], [0, 1]),
        ([0, 2], [2, 3]),
        ([1, 3], [2, 3]),
    ]
    assert {(size, names) for _, _, size, names in found} == {(4, "('world',)")}


def _failing(ranks: Group) -> None:
    assert ranks.rank != 1, "the second one"
    ranks.sum(torch.zeros(1))  # would wait for ever


def test_a_rank_that_fails_ends_the_job() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2: (.|\n)*the second one"):
        on_processes(2, _failing)


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not started_together()
    with joined() as ranks:
        assert ranks == Alone()
        assert mesh_of(ranks, 1) is None
        with pytest.raises(ConfigError, match="does not divide the 1 processes"):
            mesh_of(ranks, 2)
