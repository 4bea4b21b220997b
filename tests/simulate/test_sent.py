"""Rows that a simulation counts are those that processes send, integer for integer: a real model on 2 and 4 of them.

Each process runs its slice of a batch; every call of the exchange says to whom it sent how many rows, and the routings
that all had are recorded as one pass of a trace.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from manyhands.config.parallel import Layout
from manyhands.models import Decoder
from manyhands.moe import Routing
from manyhands.parallel.group import Group, mesh_of
from manyhands.simulate.parallel import Settings, laid_out
from manyhands.trace.recording import Phase, Recorder
from manyhands.train.layout import build_on
from tests.gloo import on_processes

from ..small_runs import small_run

CALLS: dict[Literal["by_pairs", "by_tokens"], int] = {"by_pairs": 2, "by_tokens": 4}
"""Of a layer's forward pass: rows and results; rows, weights, ids and results. The first says how many rows go."""
CASES = {
    "as it comes": [],
    "capacity leaves pairs out": ["model.moe.router.capacity_factor=0.75", "model.moe.router.capacity_per=sequence"],
    "top-3 of 16": ["model.moe.router.num_experts=16", "model.moe.router.num_experts_per_tok=3"],
}


Pass = tuple[list[list[int]], dict[int, Any]]
"""Sizes of each layer's first exchange, and (ids, kept) of each layer's tokens of one process."""


def _sent(ranks: Group, ep: int) -> dict[tuple[str, str], Pass]:
    """By case and dispatch: all in one job, since starting processes is what takes time."""
    mesh = mesh_of(ranks, ep)
    assert mesh is not None
    found = {}
    for case, changes in CASES.items():
        run = small_run(Path("unused"), "train.dtype=float32", *changes)
        model = build_on(run, mesh, torch.device("cpu")).train()
        found |= {(case, dispatch): _pass(ranks, model, dispatch) for dispatch in CALLS}
    return found


def _pass(ranks: Group, model: Decoder, dispatch: Literal["by_pairs", "by_tokens"]) -> Pass:
    for layer in model.sparse_layers().values():
        layer.experts.placement = replace(layer.experts.placement, dispatch=dispatch)
    ids = torch.randint(0, 300, (8, 32), generator=torch.Generator().manual_seed(7))
    real, sizes = dist.all_to_all_single, []

    def watched(arriving: torch.Tensor, rows: torch.Tensor, *splits: list[int], **how: Any) -> Any:
        sizes.extend(splits[1:])  # of what is sent; where nobody says, it is the exchange of how many rows come
        return real(arriving, rows, *splits, **how)

    with torch.no_grad(), mock.patch.object(dist, "all_to_all_single", watched):
        out = model.hidden(ids.chunk(ranks.size)[ranks.rank])
    return sizes[:: CALLS[dispatch]], {n: (r.expert_ids.numpy(), r.kept.numpy()) for n, r in out.routings.items()}


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(1, 4), Layout(2, 2)], ids=str)
def test_rows_are_those_that_were_sent(tmp_path: Path, layout: Layout) -> None:
    jobs = on_processes(layout.size, _sent, layout.ep)
    for number, ((case, dispatch), (_, first)) in enumerate(jobs[0].items()):
        found = [job[case, dispatch] for job in jobs]
        both = {n: [torch.from_numpy(np.concatenate([r[n][i] for _, r in found])) for i in (0, 1)] for n in first}
        trace = tmp_path / str(number)
        every = _record(trace, both, CASES[case])
        counted = laid_out(trace, Settings(layout)).exchange
        rows_LWR = counted.pairs_LWR if dispatch == "by_pairs" else counted.tokens_LWR
        assert [sizes for sizes, _ in found] == rows_LWR.swapaxes(0, 1).tolist(), (case, dispatch)
        assert counted.pairs_LWR.sum() == every
        assert (every < sum(kept.numel() for _, kept in both.values())) == (case == "capacity leaves pairs out")


def _record(path: Path, both: dict[int, list[torch.Tensor]], changes: list[str]) -> int:
    """One pass of a trace; how many pairs were kept."""
    router = small_run(Path("unused"), *changes).model.moe.router
    shape = {"num_experts": router.num_experts, "num_experts_per_tok": router.num_experts_per_tok}
    with Recorder(path, layers=sorted(both), recorded=("kept",), **shape) as recorder:
        routings = {n: _routing(ids, kept, router.num_experts) for n, (ids, kept) in both.items()}
        recorder.add(routings, -1, sequence=0, position=0, phase=Phase.TRAINING, step=0)
    return sum(int(kept.sum()) for _, kept in both.values())


def _routing(ids: torch.Tensor, kept: torch.Tensor, E: int) -> Routing:
    T = len(ids)
    return Routing(ids, torch.ones(ids.shape), torch.zeros(T, E), torch.zeros(T, E), kept, torch.ones(T).bool())
