"""For `scale.py`: what all-to-alls over gloo take, of even sizes and of a trace's exchanges. Run by each process."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from manyhands.config.parallel import Layout
from manyhands.parallel.group import Group
from manyhands.simulate.exchange import dealt, splits
from manyhands.simulate.tokens import Tokens
from manyhands.trace.foreign import opened
from manyhands.trace.placement import contiguous

FIT = (65_536, 524_288, 2_097_152)
"""Bytes that a rank sends to others, of the sizes that are fitted: up to what the training of `scale.py` sends."""
UNSEEN = (131_072, 1_048_576, 1_572_864)
BEYOND = (6_291_456,)
"""More than a core's cache holds."""
REPEATED = 4
MOST_EXCHANGES = 12
"""Of a trace: layers of its largest pass."""


def measure(ranks: Group, asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each size, and of each exchange of the trace, out and back: the slowest rank's, in the best round."""
    R, row = ranks.size, asked["row_bytes"] // 4
    rows_XRR = np.array(asked["rows"], np.int64)
    even = {size: [size // (R - 1) // 4] * R for size in (*FIT, *UNSEEN, *BEYOND)}
    best: dict[Any, float] = {}
    for _ in range(asked["rounds"]):
        for size, parts in even.items():
            seconds = timed(ranks, parts, parts, 1)
            best[size] = min(best.get(size, seconds), seconds)
        for i, rows_RR in enumerate(rows_XRR):
            out, back = rows_RR[ranks.rank].tolist(), rows_RR[:, ranks.rank].tolist()
            for way, sizes in (("out", (out, back)), ("back", (back, out))):
                seconds = timed(ranks, *sizes, row)
                best[way, i] = min(best.get((way, i), seconds), seconds)
    return {
        "even": {size: best[size] for size in even},
        "trace": [best["out", i] + best["back", i] for i in range(len(rows_XRR))],
    }


def timed(ranks: Group, send: list[int], receive: list[int], width: int) -> float:
    """Seconds of an all-to-all of float32 rows, of the slowest rank: the best of `REPEATED` in turn.

    One goes before, untimed: memory is touched, and both ends are awake.
    """
    rows, arrived = torch.ones(sum(send), width), torch.ones(sum(receive), width)
    dist.all_to_all_single(arrived, rows, receive, send, group=ranks.group)
    seconds = []
    for _ in range(REPEATED):
        began = time.perf_counter()
        dist.all_to_all_single(arrived, rows, receive, send, group=ranks.group)
        seconds.append(time.perf_counter() - began)
    return float(ranks.max(torch.tensor(seconds, dtype=torch.float64)).min())


def trace_rows(path: Path | None, ranks: int) -> npt.NDArray[np.int64]:
    """[X, R, R] rows by pairs of some exchanges: the layers of a trace's largest pass, or of one that is made up."""
    tokens, experts = made_up() if path is None else of_trace(path)
    slots = contiguous(tokens.expert_ids.shape[1], experts, ranks)
    device_TLK = slots.device_of(tokens.expert_ids, np.arange(len(tokens)), tokens.none)
    pairs_LRR, _ = splits(device_TLK, dealt(len(tokens), ranks), Layout(1, ranks))
    return pairs_LRR[:MOST_EXCHANGES]


def of_trace(path: Path) -> tuple[Tokens, int]:
    """The largest pass of a trace, and its number of experts."""
    with opened(path) as trace:
        every = Tokens.of(trace, kept=True)
        step = np.bincount(every.step).argmax()
        chosen = every.step == step
        experts, steps, sequences, decode = (
            array[chosen] for array in (every.expert_ids, every.step, every.sequence, every.decode)
        )
        return Tokens(experts, steps, sequences, decode, every.none), trace.manifest.num_experts


def made_up(T: int = 2048, L: int = 8, E: int = 16, K: int = 4) -> tuple[Tokens, int]:
    """Tokens whose experts are the more popular the lower their number: the first of four ranks gets nearly half."""
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=(T, L, E)) - 1.2 * np.log1p(np.arange(E))
    zeros = np.zeros(T, np.int32)
    return Tokens(np.argsort(-scores, axis=-1)[..., :K].astype(np.uint8), zeros, zeros, zeros > 0, 255), E


def remote(rows_XRR: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    found: npt.NDArray[np.int64] = rows_XRR.sum((1, 2)) - np.trace(rows_XRR, axis1=1, axis2=2)
    return found
