"""Several processes of this machine: what talking takes, and what training makes of it: `python benchmarks/scale.py`.

Network: all-to-alls over gloo at three sizes give α + β·bytes; it is then held against sizes it has not seen and
against the exchanges of a trace's passes, whose busiest rank counts. `--network FILE` keeps the fit for
`manyhands plan --scale --network FILE` and `simulate --layout --network FILE`.

Each time is the best of the rounds: other programs only make it longer. On loopback a processor copies what a rank
sends and what it gets, so the mean of both counts (`duplex` false), and this holds the form α + β·bytes, not a network.
With more processes than cores they also wait for each other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from manyhands.config.parallel import Layout
from manyhands.parallel.group import Group, joined
from manyhands.plan.host import cpu_name, usable_cores
from manyhands.plan.network import Network, fitted
from manyhands.simulate.exchange import busiest_port, dealt, splits
from manyhands.simulate.tokens import Tokens
from manyhands.trace.foreign import opened
from manyhands.trace.placement import contiguous

FIT = (32_768, 524_288, 4_194_304)
"""Bytes that a rank sends to others, of the sizes that are fitted."""
UNSEEN = (131_072, 1_572_864, 6_291_456)
REPEATED = 4
MOST_EXCHANGES = 12
"""Of a trace: layers of its largest pass."""


def main() -> None:
    """Parse, start the processes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trace", type=Path, help="whose exchanges are forecast; default: made up, and skewed")
    parser.add_argument("--row-bytes", type=int, default=2048, help="of a token on its way: width 512 in float32")
    parser.add_argument("--network", type=Path, help="keep the fit of the last number of ranks in this file")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        asked = json.loads(arguments.worker.read_text())
        with joined("cpu") as ranks:
            assert isinstance(ranks, Group)
            found = measure(ranks, asked)
            if ranks.rank == 0:
                arguments.worker.with_suffix(".found").write_text(json.dumps(found))
        return
    results = [network_of(ranks, arguments) for ranks in arguments.ranks]
    if arguments.network is not None:
        arguments.network.write_text(Network(**results[-1]["network"]).model_dump_json(indent=2) + "\n")
    if arguments.json:
        print(json.dumps({"cpu": cpu_name(), "cores": usable_cores(), "networks": results}))


def network_of(ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, fit, forecast, print: of `ranks` processes."""
    matrices = trace_rows(arguments.trace, ranks)
    asked = {"rounds": arguments.rounds, "row_bytes": arguments.row_bytes, "rows": matrices.tolist()}
    measured = together(ranks, asked)
    samples = {int(size): seconds for size, seconds in measured["even"].items()}
    latency, bandwidth = fitted([(size, samples[size]) for size in FIT])
    source = f"gloo, {ranks} processes on {usable_cores()} cores of {cpu_name()}, benchmarks/scale.py"
    network = Network(latency=latency, bandwidth=bandwidth, duplex=False, ranks=ranks, source=source)
    _, both = busiest_port(matrices[:, None])
    forecast = sum(network.seconds(rows * arguments.row_bytes, 2) for rows in both.tolist())
    trace = sum(measured["trace"])
    result = {
        "network": network.model_dump(),
        "sizes": [[size, samples[size], network.seconds(size)] for size in sorted(samples)],
        "trace": {"exchanges": len(both), "measured": trace, "forecast": forecast},
        "skew": float(np.mean(both) / 2 / (_remote(matrices).mean() / ranks)),
    }
    if not arguments.json:
        busy = ", more processes than cores" if ranks > usable_cores() else ""
        print(
            f"{ranks} processes on {usable_cores()} cores{busy}: α {latency * 1e6:.0f} µs, {bandwidth / 1e9:.2f} GB/s"
        )
        for size in sorted(samples):
            seen = "fitted" if size in FIT else "unseen"
            print(_line(f"  {size / 1e6:8.3f} MB, {seen}", samples[size], network.seconds(size)))
        print(_line(f"  {len(both)} exchanges of a trace, skew {result['skew']:.2f}", trace, forecast), flush=True)
    return result


def _line(what: str, measured: float, forecast: float) -> str:
    return f"{what:<42} {measured * 1e6:10,.0f} µs, forecast {forecast * 1e6:10,.0f} ({forecast / measured - 1:+.0%})"


def together(ranks: int, asked: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 of so many processes found."""
    with tempfile.TemporaryDirectory() as folder:
        asking = Path(folder) / "asked.json"
        asking.write_text(json.dumps(asked))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run([*command, "--worker", str(asking)], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the processes ended with {done.returncode}:\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(asking.with_suffix(".found").read_text())
        return found


def measure(ranks: Group, asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each size, and of each exchange of the trace, out and back: the slowest rank's, in the best round."""
    R, row = ranks.size, asked["row_bytes"] // 4
    rows_XRR = np.array(asked["rows"], np.int64)
    even = {size: [size // (R - 1) // 4] * R for size in (*FIT, *UNSEEN)}
    best: dict[Any, float] = {}
    for _ in range(asked["rounds"]):
        for size, parts in even.items():
            seconds = timed(ranks, parts, parts, 1)
            best[size] = min(best.get(size, seconds), seconds)
        for i, rows_RR in enumerate(rows_XRR):
            out, back = rows_RR[ranks.rank].tolist(), rows_RR[:, ranks.rank].tolist()
            seconds = timed(ranks, out, back, row) + timed(ranks, back, out, row)
            best["trace", i] = min(best.get(("trace", i), seconds), seconds)
    return {
        "even": {size: best[size] for size in even},
        "trace": [best["trace", i] for i in range(len(rows_XRR))],
    }


def timed(ranks: Group, send: list[int], receive: list[int], width: int) -> float:
    """Seconds of an all-to-all of float32 rows, the slowest rank's mean of `REPEATED` in turn, as a step has them.

    One goes before, untimed: memory is touched, and both ends are awake.
    """
    rows, arrived = torch.ones(sum(send), width), torch.ones(sum(receive), width)
    dist.all_to_all_single(arrived, rows, receive, send, group=ranks.group)
    began = time.perf_counter()
    for _ in range(REPEATED):
        dist.all_to_all_single(arrived, rows, receive, send, group=ranks.group)
    return float(ranks.max(torch.tensor((time.perf_counter() - began) / REPEATED, dtype=torch.float64)))


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
        rows = (array[chosen] for array in (every.expert_ids, every.step, every.sequence, every.decode))
        return Tokens(*rows, every.none), trace.manifest.num_experts


def made_up(T: int = 2048, L: int = 8, E: int = 16, K: int = 4) -> tuple[Tokens, int]:
    """Tokens whose experts are the more popular the lower their number: the first of four ranks gets nearly half."""
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=(T, L, E)) - 1.2 * np.log1p(np.arange(E))
    zeros = np.zeros(T, np.int32)
    return Tokens(np.argsort(-scores, axis=-1)[..., :K].astype(np.uint8), zeros, zeros, zeros > 0, 255), E


def _remote(rows_XRR: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    found: npt.NDArray[np.int64] = rows_XRR.sum((1, 2)) - np.trace(rows_XRR, axis1=1, axis2=2)
    return found


if __name__ == "__main__":
    main()
