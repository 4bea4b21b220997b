"""Several processes of this machine: what talking takes, and what training makes of it: `python benchmarks/scale.py`.

Network: all-to-alls over gloo at three sizes give α + β·bytes; it is then held against sizes it has not seen and
against the exchanges of a trace's passes, whose busiest rank counts. `--network FILE` keeps the fit for
`manyhands plan --scale --network FILE` and `simulate --layout --network FILE`.

Training: the same run under torchrun on 1, 2 and 4 processes that share out the experts (ep): tokens/s, what the
exchange of tokens took and moved, what a process holds; beside it the forecast from one process's speed, its trace
and the network. The rows that a trace says are sent must be those that were.

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
from pathlib import Path
from typing import Any

import numpy as np
from scale_network import FIT, UNSEEN, measure, remote, trace_rows
from scale_train import Trained, forecast, prepared, train, train_as_told

from manyhands.parallel.group import Group, joined
from manyhands.plan.host import cpu_name, usable_cores
from manyhands.plan.network import Network, fitted
from manyhands.simulate.exchange import busiest_port


def main() -> None:
    """Parse, start the processes, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--trace", type=Path, help="whose exchanges are forecast; default: made up, and skewed")
    parser.add_argument("--row-bytes", type=int, default=1024, help="of a token on its way: width 256 in float32")
    parser.add_argument("--network", type=Path, help="keep the fit of the last number of ranks in this file")
    parser.add_argument("--only", choices=["network", "training"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dispatch", choices=["by_pairs", "by_tokens"], default="by_pairs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker)
        return
    networks = [network_of(ranks, arguments) for ranks in arguments.ranks]
    if arguments.network is not None:
        arguments.network.write_text(Network(**networks[-1]["network"]).model_dump_json(indent=2) + "\n")
    trained = [] if arguments.only == "network" else training(networks, arguments)
    if arguments.json:
        print(json.dumps({"cpu": cpu_name(), "cores": usable_cores(), "networks": networks, "training": trained}))


def work(asking: Path) -> None:
    """What each of the processes does."""
    asked = json.loads(asking.read_text())
    if "arguments" in asked:
        train_as_told(asked)
        return
    with joined("cpu") as ranks:
        assert isinstance(ranks, Group)
        found = measure(ranks, asked)
        if ranks.rank == 0:
            asking.with_suffix(".found").write_text(json.dumps(found))


def together(ranks: int, asked: dict[str, Any], folder: Path) -> Path:
    """Start so many processes of `work`; where they were told what to do."""
    asking = folder / "asked.json"
    asking.write_text(json.dumps(asked))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([*command, "--worker", str(asking)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the processes ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return asking


def network_of(ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, fit, forecast, print: of `ranks` processes."""
    matrices = trace_rows(arguments.trace, ranks)
    asked = {"rounds": arguments.rounds, "row_bytes": arguments.row_bytes, "rows": matrices.tolist()}
    with tempfile.TemporaryDirectory() as folder:
        measured = json.loads(together(ranks, asked, Path(folder)).with_suffix(".found").read_text())
    samples = {int(size): seconds for size, seconds in measured["even"].items()}
    latency, bandwidth = fitted([(size, samples[size]) for size in FIT])
    source = f"gloo, {ranks} processes on {usable_cores()} cores of {cpu_name()}, benchmarks/scale.py"
    network = Network(latency=latency, bandwidth=bandwidth, duplex=False, ranks=ranks, source=source)
    _, both = busiest_port(matrices[:, None])
    predicted = sum(network.seconds(rows * arguments.row_bytes, 2) for rows in both.tolist())
    trace = sum(measured["trace"])
    result = {
        "network": network.model_dump(),
        "sizes": [[size, samples[size], network.seconds(size)] for size in sorted(samples)],
        "trace": {"exchanges": len(both), "measured": trace, "forecast": predicted},
        "skew": float(np.mean(both) / 2 / (remote(matrices).mean() / ranks)),
    }
    if not arguments.json:
        busy = ", more processes than cores" if ranks > usable_cores() else ""
        where = f"{ranks} processes on {usable_cores()} cores{busy}"
        print(f"{where}: α {latency * 1e6:.0f} µs, {bandwidth / 1e9:.2f} GB/s")
        for size in sorted(samples):
            seen = "fitted" if size in FIT else "unseen" if size in UNSEEN else "beyond the cache"
            print(_line(f"  {size / 1e6:8.3f} MB, {seen}", samples[size], network.seconds(size)))
        print(_line(f"  {len(both)} exchanges of a trace, skew {result['skew']:.2f}", trace, predicted), flush=True)
    return result


def _line(what: str, measured: float, predicted: float) -> str:
    return f"{what:<42} {measured * 1e6:10,.0f} µs, forecast {predicted * 1e6:10,.0f} ({predicted / measured - 1:+.0%})"


def training(networks: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The run on one process and on each number of ranks."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = prepared(Path(folder))
        one = train(1, together, Path(folder), text, arguments.steps, arguments.dispatch)
        found.append(_told(one, None, arguments))
        for network in networks:
            fit = Network(**network["network"])
            assert fit.ranks is not None
            here = train(fit.ranks, together, Path(folder), text, arguments.steps, arguments.dispatch)
            found.append(_told(here, forecast(one, here, fit, arguments.dispatch), arguments))
    return found


def _told(here: Trained, predicted: dict[str, float] | None, arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.json:
        print(
            f"{here.ranks} rank{'s' if here.ranks > 1 else ' '}: {here.tokens / here.step:7,.0f} tokens/s, "
            f"step {here.step * 1e3:6.0f} ms, "
            f"exchange {here.exchange / here.step:4.0%} of it, {here.moved / 1e6:6.2f} MB sent by a rank in a step, "
            f"experts {here.experts / 1e6:5.1f} MB, process {here.peak / 1e6:5.0f} MB"
        )
        if predicted is not None:
            speed, apart = here.tokens / predicted["step"], here.step / predicted["step"] - 1
            share = predicted["exchange"] / predicted["step"]
            print(f"    forecast: {speed:7,.0f} tokens/s ({apart:+.0%}), exchange {share:4.0%} of a step")
            print(f"    rows sent: {here.rows:,}; by the trace {predicted['rows']:,.0f}", flush=True)
    return {name: value for name, value in vars(here).items() if name != "trace"} | {"forecast": predicted}


if __name__ == "__main__":
    main()
