"""Tensors of which every process holds some rows: what lies here, which rows that are, and the whole.

A model on a `Mesh` has them as parameters, gradients and optimiser state: DTensors cut along their first dimension, by
one dimension of the mesh or by two. What no mesh cuts is an ordinary tensor, whole on every process; all functions
here take both.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

Rows = slice | None
"""Which rows of a tensor a process holds; None: the tensor is whole there (or has no rows)."""
Reader = Callable[[str, Rows], Tensor]
"""Reads those rows of the tensor of that name, of a file for instance."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds some rows of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, in the same storage; it may have no rows at all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, on every process. Collective: all of them call it for the same tensors in the same order."""
    if not isinstance(tensor, DTensor):
        return tensor
    # What FSDP cut on top of another cut comes together first; both at once, torch warns about on stderr.
    inner = [Replicate() if cuts_rows(p) and type(p) is not Shard else p for p in tensor.placements]
    return tensor.redistribute(placements=inner).full_tensor()


def held_rows(tensor: Tensor) -> Rows:
    """The rows that `local(tensor)` are."""
    if not isinstance(tensor, DTensor):
        return None
    assert all(p.is_replicate() or cuts_rows(p) for p in tensor.placements), tensor.placements
    numbers = torch.arange(tensor.shape[0])  # cut like the tensor itself, so that no rule of torch is repeated here
    mesh = tensor.device_mesh
    mine = local(distribute_tensor(numbers.to(mesh.device_type), mesh, tensor.placements, src_data_rank=None))
    if not len(mine):
        return slice(0, 0)
    first, last = int(mine[0]), int(mine[-1])
    assert last - first + 1 == len(mine), "rows of a process lie together"
    return slice(first, last + 1)


def cuts_rows(placement: object) -> bool:
    """Whether a placement of a DTensor gives each process rows: the plain way, or FSDP's on top of another."""
    return getattr(placement, "dim", None) == 0 and "Shard" in type(placement).__name__


def take(full: Tensor, rows: Rows) -> Tensor:
    """Those rows of `full`; a view."""
    return full if rows is None else full[rows]


def share(full: Tensor, like: Tensor) -> Tensor:
    """The rows of `full` that this process holds of `like`, which has as many; a view."""
    return take(full, held_rows(like))


def put(tensor: Tensor, full: Tensor) -> None:
    """Give `tensor` the values of `full`, of which only the rows that this process holds are looked at."""
    local(tensor.detach()).copy_(share(full, tensor))


def laid_out(rows: Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of `shape` of which this process holds `rows`, cut along its rows as `like` is."""
    if not isinstance(like, DTensor):
        return rows
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def sum_over_shards_(value: Tensor, like: Tensor) -> Tensor:
    """Replace `value`, computed on this process's rows of `like`, by its sum over all that hold other rows of it."""
    if isinstance(like, DTensor):
        for dim, placement in enumerate(like.placements):
            if cuts_rows(placement):
                dist.all_reduce(value, group=like.device_mesh.get_group(dim))
    return value


def reshard(model: nn.Module) -> None:
    """After passes without a backward pass: parameters are their shards again, whoever looks at them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
