"""Muon on parameters that lie on several processes: as one process has it, and no more said than must be.

Tolerance: a rounding ε of X grows in Newton-Schulz at most by 3.4445⁵ ≈ 485, so two orders of summation part by up to
485 ε ≈ 3e-5 in float32; sums that are the same are bit-equal.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from manyhands.parallel.group import Group
from manyhands.parallel.shards import whole
from manyhands.train import muon
from manyhands.train.muon import Muon, newton_schulz
from manyhands.train.muon_sharded import orthogonal_rows, rows_by_rank
from tests.gloo import on_processes
from tests.sharded import LAYOUTS, apart, cut, gathered, give_gradients, mesh_for, random_like

CASES = [(1, 3), (2, 0), (3, 1), (4, 0), (5, 3), (6, 2), (7, 2), (8, 1)]
"""Matrices, and the process that is the first to get one more."""
GROWN = 485 * 2.0**-23 / 2


def random(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def _rounds(ranks: Group, sizes: list[tuple[int, int, int]]) -> list[tuple[float, int]]:
    """The largest difference from orthogonalising the whole, and how many matrices came here, for each case."""
    found = []
    for count, n, first in sizes:
        rows, whole_BN = rows_by_rank(n, ranks.size), random(count, n, 8)
        mine = slice(sum(rows[: ranks.rank]), sum(rows[: ranks.rank + 1]))
        came: list[int] = []

        def orthogonalize(x_Bnm: Tensor, came: list[int] = came) -> Tensor:
            came.append(len(x_Bnm))
            return newton_schulz(x_Bnm)

        out = orthogonal_rows([x[mine].clone() for x in whole_BN], n, ranks.group, orthogonalize, first)
        assert [x.shape for x in out] == [(rows[ranks.rank], 8)] * count
        assert len(came) <= 1
        difference = [(a - newton_schulz(b)[mine]).abs() for a, b in zip(out, whole_BN, strict=True)]
        found.append((max([float(d.max()) for d in difference if d.numel()], default=0.0), sum(came)))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_whole_matrices(size: int) -> None:
    """Ranks without a row, ranks without a matrix, and more matrices than ranks."""
    sizes = [(count, n, first % size) for n in (1, 3, 5, 16) for count, first in CASES]
    found = on_processes(size, _rounds, sizes)
    for case, here in zip(sizes, zip(*found, strict=True), strict=True):
        assert max(difference for difference, _ in here) <= GROWN, case
        taken = [count for _, count in here]
        assert sum(taken) == case[0] and max(taken) - min(taken) <= 1, case
        assert taken[case[2]] == max(taken), case


@pytest.mark.parametrize(("n", "R"), [(1, 4), (3, 4), (5, 4), (16, 4), (9, 4), (2, 2)])
def test_rows_are_torchs(n: int, R: int) -> None:
    pieces = [len(piece) for piece in torch.arange(n).chunk(R)]
    assert rows_by_rank(n, R) == pieces + [0] * (R - len(pieces))


def model_of(E: int) -> nn.Module:
    """Matrices tall, wide, square and with fewer rows than ranks; stacks of E."""
    generator = torch.Generator().manual_seed(0)
    root = nn.Module()
    root.experts = nn.Module()
    for name, shape in {"q": (16, 8), "o": (8, 16), "k": (3, 8), "s": (8, 8), "t": (8, 8), "thin": (1, 8)}.items():
        root.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
    for name, shape in {"gate_up": (E, 12, 8), "down": (E, 8, 6)}.items():
        root.experts.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
    return root


def optimizer_of(model: nn.Module, nesterov: bool = True) -> Muon:
    fused = {"experts.gate_up", "q"}
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n not in fused]},
        {"params": [p for n, p in named if n in fused], "split": 2},
    ]
    return Muon(groups, lr=0.02, nesterov=nesterov)


def trained(model: nn.Module, optimizer: Muon, steps: int = 3) -> None:
    like = model_of(len(model.get_parameter("experts.down")))
    for step in range(steps):
        grads = random_like(like, step)
        if step == 1:
            del grads["s"]
        give_gradients(model, grads)
        optimizer.step()


def _steps(ranks: Group, cases: list[tuple[int, int, bool, int]]) -> list[dict[str, float]]:
    """How far weights are from one process's; momenta are equal."""
    found = []
    for ep, E, nesterov, room in cases:
        muon.CPU_BATCH_ELEMENTS = room
        one, model = model_of(E), cut(model_of(E), mesh_for(ranks, ep))
        alone, optimizer = optimizer_of(one, nesterov), optimizer_of(model, nesterov)
        trained(one, alone)
        trained(model, optimizer)
        for p, q in zip(one.parameters(), model.parameters(), strict=True):
            assert torch.equal(whole(optimizer.state[q]["momentum_buffer"]), alone.state[p]["momentum_buffer"])
        found.append(apart(gathered(model), gathered(one)))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_equals_one_process(size: int) -> None:
    """In every layout; also where batches are cut small, and with two experts on four processes."""
    cases = [(ep, 8, ep < 4, 1 << 18) for ep in LAYOUTS[size]] + [(2, 2, False, 128), (1, 8, True, 128)]
    for rank in on_processes(size, _steps, cases):
        for case, weights in zip(cases, rank, strict=True):
            assert max(weights.values()) <= 3 * 0.02 * 0.2 * 4 * GROWN, (case, weights)


class Sent(TorchDispatchMode):
    """Collectives that are called, and the bytes this process puts into them for others and for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.name().partition("::")[2]
            # all_to_all_single(output, input, …)
            given = args[1] if "alltoall" in name else args[0]
            size = sum(x.nbytes for x in (given if isinstance(given, list) else [given]) if isinstance(x, Tensor))
            self.bytes[name] = self.bytes.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def _sent(ranks: Group, ep: int) -> dict[str, int]:
    model = cut(model_of(8), mesh_for(ranks, ep))
    optimizer = optimizer_of(model)
    give_gradients(model, random_like(model_of(8), 0))
    with Sent() as sent:
        optimizer.step()
    return sent.bytes


@pytest.mark.parametrize(("size", "ep"), [(2, 1), (4, 2)])
def test_a_step_sends_each_matrix_there_and_back(size: int, ep: int) -> None:
    """Twice the bytes of the matrices over all processes, their own parts counted as well; of the experts nothing."""
    found = on_processes(size, _sent, ep)
    names = {name for rank in found for name in rank}
    assert len(names) == 1 and "alltoall" in names.pop(), found
    matrices = sum(p.nbytes for name, p in model_of(8).named_parameters() if "experts" not in name)
    assert sum(sum(rank.values()) for rank in found) == 2 * matrices


def _refused(ranks: Group) -> str:
    from torch.distributed.tensor import Shard, distribute_tensor

    columns = distribute_tensor(torch.ones(4, 8), mesh_for(ranks, 1).world, [Shard(1)], src_data_rank=None)
    with pytest.raises(AssertionError) as error:
        Muon([nn.Parameter(columns)], lr=0.1)
    return str(error.value)


def test_columns_are_refused() -> None:
    assert "Shard(dim=1)" in on_processes(2, _refused)[0]
