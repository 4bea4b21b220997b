"""Training and decoding alone and beside a busy process: `python benchmarks/neighbour.py`.

PyTorch's operators leave the threads of GNU's OpenMP spinning, for milliseconds, on cores that somebody else may need.
A neighbour then stops a step at each of its hundreds of barriers until the scheduler comes round. How long a thread
spins before it sleeps is decided when the library is loaded (`GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`), unless the native
kernels make it sleep (`native/openmp.cpp`: in every arm). `--before DIR` adds an arm with another tree's package. Every
arm is a process of its own.

Works: `quickstart` and `train-66M`, one optimiser step each on random tokens; `generate`, 32 tokens greedily from the
quickstart's model. Neighbours: none; `loop`, one thread that never waits; `torch`, matrix products on all cores. The
arms take turns, round after round, and the reported ratio is a median of ratios within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ARMS = {
    "default": {},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
NEIGHBOURS = {
    "none": None,
    "loop": "while True: pass",
    "torch": "import torch\na = torch.randn(512, 512)\nwhile True: torch.relu(a @ a)",
}
WORKS = ("quickstart", "train-66M", "generate")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each arm works")
    parser.add_argument("--works", nargs="*", default=list(WORKS), choices=WORKS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--neighbours", nargs="*", default=list(NEIGHBOURS), choices=list(NEIGHBOURS))
    parser.add_argument("--before", metavar="DIR", help="another tree, built, as the first arm")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(times(arguments.child, arguments.seconds)))
        return
    if arguments.before:
        ARMS["before"] = {"PYTHONPATH": arguments.before}
        arguments.arms.insert(0, "before")
    rows = []
    for work in arguments.works:
        for neighbour in arguments.neighbours:
            rows.append(compare(work, neighbour, arguments))
            if not arguments.json:
                print(line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps(rows))


def compare(work: str, neighbour: str, arguments: argparse.Namespace) -> dict[str, object]:
    """The median seconds of a step in each arm, and its ratio to the first arm of the same round."""
    medians: dict[str, list[float]] = {arm: [] for arm in arguments.arms}
    for turn in range(arguments.rounds):
        for arm in arguments.arms if turn % 2 == 0 else arguments.arms[::-1]:
            with beside(NEIGHBOURS[neighbour]):
                medians[arm].append(run(arm, work, arguments.seconds))
    first = medians[arguments.arms[0]]
    return {
        "work": work,
        "neighbour": neighbour,
        "ms": {arm: round(1e3 * statistics.median(values), 2) for arm, values in medians.items()},
        "speed over the first arm": {
            arm: round(statistics.median(a / b for a, b in zip(first, values, strict=True)), 3)
            for arm, values in medians.items()
        },
    }


def line(row: dict) -> str:
    """One row for people."""
    cells = (f"{arm} {ms:.1f} ms ({row['speed over the first arm'][arm]:.2f}×)" for arm, ms in row["ms"].items())
    return f"{row['work']}, neighbour {row['neighbour']}: " + ", ".join(cells)


@contextmanager
def beside(program: str | None) -> Iterator[None]:
    """A busy process for as long as the block lasts."""
    if program is None:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        time.sleep(2)
        yield
    finally:
        process.kill()
        process.wait()


def run(arm: str, work: str, seconds: float) -> float:
    """The median time of one step in a process of its own."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, __file__, "--child", work, "--seconds", str(seconds)]
    made = subprocess.run(command, env=plain | ARMS[arm], stdout=subprocess.PIPE, text=True, check=True)
    return statistics.median(json.loads(made.stdout))


def times(work: str, seconds: float) -> list[float]:
    """The seconds of each step, after three that warm up."""
    step = generating() if work == "generate" else training(work)
    for _ in range(3):
        step()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return taken


def training(work: str) -> Callable[[], object]:
    """One optimiser step on random tokens."""
    import torch
    from train import LR, RUN

    from manyhands.config.load import load_preset, parse_run
    from manyhands.models import Decoder, init_weights
    from manyhands.train.guard import SpikeGuard
    from manyhands.train.memory import keep_freed_memory
    from manyhands.train.optim import build_optimizers
    from manyhands.train.step import train_step

    keep_freed_memory()
    run = parse_run(RUN, work) if work == "train-66M" else load_preset("quickstart")
    model = Decoder(run.model, "auto")
    init_weights(model, 0)
    model.train()
    optimizers, guard = build_optimizers(model, run.optim), SpikeGuard(run.guard)
    batch = torch.randint(run.model.vocab_size, (run.train.batch_size, run.train.sequence_length + 1))
    return lambda: train_step(model, optimizers, guard, batch, run, 1, LR, torch.float32)


def generating() -> Callable[[], object]:
    """32 tokens, greedily, one sequence."""
    import torch

    from manyhands.config import SamplingConfig
    from manyhands.config.load import load_preset
    from manyhands.generate.steps import generate
    from manyhands.models import Decoder, init_weights

    model = Decoder(load_preset("quickstart").model, "auto")
    init_weights(model, 0)
    prompt = torch.randint(model.config.vocab_size, (1, 16))
    return lambda: list(generate(model, prompt, SamplingConfig(max_new_tokens=32, temperature=0.0)))


if __name__ == "__main__":
    main()
