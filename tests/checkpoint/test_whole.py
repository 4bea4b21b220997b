"""Sharded tensors in files: the same bytes however they lie, and each process reads its own rows back."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from manyhands.checkpoint.state import save_whole
from manyhands.checkpoint.whole import TensorReader, Whole, fill, written_together
from manyhands.errors import CheckpointError, EndedElsewhere, StorageError
from manyhands.parallel.group import Group, mesh_of
from manyhands.parallel.ranks import Alone
from manyhands.parallel.shards import local
from tests.gloo import on_processes


def tensors() -> dict[str, Tensor]:
    """Rows that no number of processes divides, fewer rows than processes, none, a scalar."""
    draw = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(7, 3, generator=draw),
        "a.experts": torch.randn(8, 2, 3, generator=draw),
        "a.half": torch.randn(5, 4, generator=draw).bfloat16(),
        "few": torch.randn(2, generator=draw),
        "step": torch.tensor(3.0),
        "counts": torch.arange(4),
        "wide": torch.randn(3, 3, generator=draw).double(),
    }


def spread(ranks: Group, ep: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts over ep and then dp, as FSDP2 lays them; matrices and vectors over all; the rest whole."""
    mesh = mesh_of(ranks, ep)
    assert mesh is not None
    found = dict(given)
    for name in ("b.weight", "a.half", "few"):
        found[name] = distribute_tensor(given[name], mesh.world, [Shard(0)])
    stack = given["a.experts"]
    of_ep = stack.chunk(ep)[mesh.ep.get_local_rank()]
    mine = of_ep.chunk(mesh.dp.size())[mesh.dp.get_local_rank()]
    from torch.distributed.tensor.placement_types import _StridedShard

    placements = [_StridedShard(0, split_factor=ep), Shard(0)]
    found["a.experts"] = DTensor.from_local(
        mine, mesh.whole, placements, run_check=False, shape=stack.shape, stride=stack.stride()
    )
    return found


def _written(ranks: Group, ep: int, path: str) -> None:
    parts = spread(ranks, ep, tensors())
    written_together(parts, ranks, lambda whole: save_whole(path, whole))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_process_writes_what_the_library_writes(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "theirs")
    written_together(tensors(), Alone(), lambda whole: save_whole(tmp_path / "ours", whole))
    assert digest(tmp_path / "ours") == digest(tmp_path / "theirs")


@pytest.mark.parametrize(("size", "ep"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_the_same_bytes_from_every_layout(tmp_path: Path, size: int, ep: int) -> None:
    save_file(tensors(), tmp_path / "one")
    on_processes(size, _written, ep, str(tmp_path / "many"))
    assert digest(tmp_path / "many") == digest(tmp_path / "one")


def _read(ranks: Group, ep: int, path: str) -> list[bool]:
    right = {name: local(t).clone() for name, t in spread(ranks, ep, tensors()).items()}
    empty = spread(ranks, ep, {name: torch.zeros_like(t) for name, t in tensors().items()})
    fill(empty, TensorReader([Path(path)]), "here")
    return [torch.equal(local(empty[name]), right[name]) for name in right]


@pytest.mark.parametrize(("size", "ep"), [(2, 2), (4, 1), (4, 2)])
def test_each_process_reads_its_rows(tmp_path: Path, size: int, ep: int) -> None:
    save_file(tensors(), tmp_path / "one")
    assert on_processes(size, _read, ep, str(tmp_path / "one")) == [[True] * 7] * size


def _refused(ranks: Group, path: str) -> str:
    def write(whole: Whole) -> None:
        for number, name in enumerate(whole):
            assert whole[name].shape == tensors()[name].shape
            if number == 2:
                raise StorageError("cannot write it: no space")

    try:
        written_together(spread(ranks, 1, tensors()), ranks, write)
    except (StorageError, EndedElsewhere) as error:
        ranks.sum(torch.ones(1))  # nobody was left behind in a collective
        return f"{type(error).__name__} {error.exit_code}"
    return "written"


def test_a_disk_that_refuses_ends_all(tmp_path: Path) -> None:
    assert on_processes(2, _refused, str(tmp_path / "x")) == ["StorageError 1", "EndedElsewhere 1"]


def test_other_tensors_are_refused_before_anything_is_changed(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "one")
    reader = TensorReader([tmp_path / "one"])
    for change, said in (
        ({"few": torch.zeros(3)}, r"few is \[2\]; the model has \[3\]"),
        ({"more": torch.zeros(3)}, "more is missing"),
    ):
        mine = {name: torch.zeros_like(t) for name, t in tensors().items()} | change
        with pytest.raises(CheckpointError, match=f"mine: {said}"):
            fill(mine, reader, "mine")
        assert not any(t.any() for t in mine.values())
    mine.pop("more"), mine.pop("few")
    with pytest.raises(CheckpointError, match="mine: few has no place in this model"):
        fill(mine, reader, "mine")
    with pytest.raises(CheckpointError, match="no such file"):
        TensorReader([tmp_path / "two"])
    (tmp_path / "bad").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="bad: not a readable safetensors file"):
        TensorReader([tmp_path / "bad"])
