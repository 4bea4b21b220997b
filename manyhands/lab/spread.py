"""One MoE layer's forward pass with its experts spread over processes (gloo), and the time that sending takes.

Each rank has its own tokens and E/R of the experts. A pair of token and expert travels to the expert's rank and its
output back: two all-to-alls. The router is on every rank.

R ranks, T tokens of a rank, E experts, K experts per token, D model width.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manyhands import strict_json
from manyhands.config import MoEConfig, RouterConfig
from manyhands.kernels import run_experts
from manyhands.moe import MoELayer


@dataclass(frozen=True, slots=True)
class Size:
    """What every rank does."""

    ranks: int
    tokens: int
    width: int
    num_experts: int
    num_experts_per_tok: int
    expert_width: int
    rounds: int
    seed: int

    def layer(self) -> MoELayer:
        """The whole layer, the same on every rank."""
        torch.manual_seed(self.seed)
        router = RouterConfig(num_experts=self.num_experts, num_experts_per_tok=self.num_experts_per_tok)
        return MoELayer(MoEConfig(router=router, moe_intermediate_size=self.expert_width), self.width)


@dataclass(frozen=True, slots=True)
class Spread:
    """What rank 0 measured."""

    seconds: float
    """Of the median forward pass."""
    sending: float
    """Of these, in collectives, waiting for the slowest rank included."""
    error: float
    """Largest difference from the layer in one process, as a share of its largest output, over all ranks."""
    remote: float
    """Rows that left a rank, per token and direction."""


def measure(size: Size, delays: list[float], scratch: Path) -> list[Spread]:
    """A run for each delay, in seconds, by which every collective is held up as a slow link would."""
    asked = scratch / f"spread-{len(list(scratch.iterdir()))}"
    asked.mkdir()
    (asked / "size.json").write_text(json.dumps({"size": asdict(size), "delays": delays}))
    torch.multiprocessing.spawn(_rank, (str(asked),), nprocs=size.ranks)  # type: ignore[attr-defined,no-untyped-call]
    return [Spread(**each) for each in strict_json.loads((asked / "found.json").read_bytes())]


def _rank(rank: int, folder: str) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    asked: dict[str, Any] = strict_json.loads(Path(folder, "size.json").read_bytes())
    size = Size(**asked["size"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size.ranks)
    try:
        found = [_timed(size, rank, delay) for delay in asked["delays"]]
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps([asdict(each) for each in found]))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def _timed(size: Size, rank: int, delay: float) -> Spread:
    layer = size.layer()
    x_TD = torch.randn(size.tokens, size.width, generator=torch.Generator().manual_seed(size.seed + 1 + rank))
    whole, _ = layer(x_TD)
    took, sent, apart, remote = [], [], 0.0, 0.0
    for _ in range(size.rounds + 1):
        link = _Link(delay)
        dist.barrier()
        began = time.perf_counter()
        y_TD = _forward(layer, x_TD, rank, size.ranks, link)
        took.append(time.perf_counter() - began)
        sent.append(link.seconds)
        apart, remote = float((y_TD - whole).abs().max() / whole.abs().max()), link.remote / size.tokens
    worst = torch.tensor(apart)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    median = statistics.median(took[1:])  # the first opens connections
    return Spread(median, statistics.median(sent[1:]), float(worst), remote)


class _Link:
    """all-to-all of rows, timed; each takes `delay` seconds more."""

    def __init__(self, delay: float) -> None:
        self.delay, self.seconds, self.remote = delay, 0.0, 0

    def send(self, rows: Tensor, counts_R: list[int], arriving_R: list[int]) -> Tensor:
        """Rows sorted by rank go out, others arrive."""
        began = time.perf_counter()
        time.sleep(self.delay)
        out = rows.new_empty(sum(arriving_R), *rows.shape[1:])
        dist.all_to_all_single(out, rows, arriving_R, counts_R)
        self.seconds += time.perf_counter() - began
        return out


def _forward(layer: MoELayer, x_TD: Tensor, rank: int, ranks: int, link: _Link) -> Tensor:
    routing = layer.router(x_TD)
    here = routing.num_experts // ranks
    T, K = routing.expert_ids.shape
    order = routing.expert_ids.flatten().argsort(stable=True)
    ids_N = routing.expert_ids.flatten()[order]
    counts_R = torch.bincount(ids_N // here, minlength=ranks)
    arriving_R = link.send(counts_R, [1] * ranks, [1] * ranks).tolist()
    out_R: list[int] = counts_R.tolist()
    link.remote += sum(out_R) - out_R[rank]
    rows_ND = link.send(x_TD[order // K], out_R, arriving_R)
    mine_N1 = link.send(ids_N, out_R, arriving_R)[:, None] - rank * here
    bank = layer.experts.stacked(range(rank * here, (rank + 1) * here))
    ones = torch.ones(mine_N1.shape)
    done_ND = run_experts("auto", rows_ND, mine_N1, ones, ones.bool(), bank)
    back_ND = link.send(done_ND, arriving_R, out_R)
    y_TKD = torch.empty(T * K, x_TD.shape[1]).index_copy_(0, order, back_ND).view(T, K, -1)
    return (routing.weights[..., None] * y_TKD).sum(1)
