"""Processes that were started together, by torchrun or by a test: how they meet, and what they say to each other.

    torchrun --nproc-per-node 4 -m manyhands train …

gloo joins CPUs, NCCL GPUs; nothing else differs. W processes form a mesh of W/ep × ep: `dp` of it holds the same
experts, `ep` shares them out.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from manyhands import strict_json
from manyhands.errors import ConfigError, EndedElsewhere, ProcessLost, exit_code_of
from manyhands.parallel.ranks import Alone, Ranks
from manyhands.parallel.started import started_together

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another before all of them end: longer than anything that only one of them does."""


@dataclass(frozen=True, slots=True)
class Group:
    """The processes of one job, as `Ranks`."""

    group: dist.ProcessGroup
    rank: int
    size: int
    device: torch.device
    """Where collectives take their tensors: what the backend joins."""
    store: Store | None = None
    """Where processes find each other; it outlives any of them but the one that keeps it, which torchrun does."""
    local_size: int = 1
    """How many of them are on this machine."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every rank's `value`; `value` itself stays as it is."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """The largest of every rank's `value`."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: Tensor, how: Any) -> Tensor:
        found = value.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(found, how, group=self.group)
        return found.to(value.device)

    def tell(self, message: Any) -> Any:
        """What rank 0 brings, on every rank: anything JSON can say. The others' `message` is not looked at."""
        said = json.dumps(message).encode() if self.rank == 0 else b""
        length = int(self.sum(torch.tensor(len(said))))
        text = torch.zeros(length, dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            text.copy_(torch.frombuffer(bytearray(said), dtype=torch.uint8))
        dist.broadcast(text, group=self.group, group_src=0)
        return strict_json.loads(text.cpu().numpy().tobytes())

    def first_to_fail(self, exit_code: int) -> int | None:
        """Be the one that says why the job ends: None for the first that asks, for the others that one's exit code."""
        if self.store is None:
            return None
        mine = f"{self.rank} {exit_code}"
        try:
            said: str = self.store.compare_set("ended", "", mine).decode()
        except RuntimeError:  # who keeps the store is gone: nobody else can be asked
            return None
        return None if said == mine else int(said.split()[1])


def patient(ranks: Ranks) -> Ranks:
    """The same processes, which wait for each other as long as it takes: for work that comes when it comes. Collective.

    A process that dies is noticed all the same.
    """
    if not isinstance(ranks, Group) or ranks.size == 1:
        return Alone()
    return replace(ranks, group=dist.new_group(timeout=timedelta(days=365)))


@dataclass(frozen=True, slots=True)
class Mesh:
    """How a model lies on the processes: experts over `ep`, then `dp`; everything else over `world`."""

    whole: DeviceMesh
    """[W/ep, ep], its dimensions named dp and ep."""
    world: DeviceMesh
    """[W], the same processes in a row."""

    @property
    def dp(self) -> DeviceMesh:
        """Of the processes that hold the same experts as this one."""
        return self.whole["dp"]

    @property
    def ep(self) -> DeviceMesh:
        """Of the processes that share out one set of experts with this one."""
        return self.whole["ep"]


def mesh_of(ranks: Ranks, ep: int) -> Mesh | None:
    """The mesh of `ranks` with the experts shared out over `ep` of them; None for one process.

    Raises `ConfigError` unless `ep` divides the number of processes. A collective call, like all below.
    """
    if ranks.size % ep:
        raise ConfigError(f"parallel.ep = {ep} does not divide the {ranks.size} processes of this job")
    if not isinstance(ranks, Group) or ranks.size == 1:
        return None
    whole = init_device_mesh(ranks.device.type, (ranks.size // ep, ep), mesh_dim_names=("dp", "ep"))
    return Mesh(whole, whole["dp", "ep"]._flatten("world"))  # kept: asked for again at the root, torch warns


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Meet the other processes of this job until the block ends; `Alone` where there are none.

    `device`: `train.device`. Of GPUs each process takes the one of its place on its machine (`LOCAL_RANK`).

    When processes fail one says why. Of an error in the block the first leaves it as it is, the others end by
    `EndedElsewhere`; what a collective raises because a process died without a word is `ProcessLost` for the first.
    """
    if not started_together():
        yield Alone()
        return
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    # torch 2.13 no longer tells a restarted job from the one before it: addresses of dead processes would be found.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt_{attempt}", store)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None
    ranks = Group(group, rank, size, place, store, int(os.environ.get("LOCAL_WORLD_SIZE", str(size))))
    try:
        yield ranks
    except EndedElsewhere:
        raise
    except Exception as error:
        said = ranks.first_to_fail(exit_code_of(error))
        if said is not None:
            raise EndedElsewhere(said) from error
        if _is_of_another(error):
            raise ProcessLost(_LOST) from error
        raise
    finally:
        with suppress(RuntimeError):  # of a group that a dead process has broken already
            dist.destroy_process_group()


_LOST = (
    "another process of this job ended without a word (killed, or out of memory?), and with it all of them: "
    "start it again, a run goes on from its newest checkpoint"
)


def _is_of_another(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)
