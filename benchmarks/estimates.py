"""How far estimates miss models that they were not fitted on: `python benchmarks/estimates.py`.

Runs the random models of `manyhands doctor --speeds` and `decode.py`'s `olmoe-4L` (OLMoE's layer, four of them) in four
formats, float32 and bf16 as plain tensors, int8 and int4 packed: a prompt of 128 tokens, decoding one sequence, and 16
together, each the best of some rounds. Then every speed is estimated from those of the other models, as `plan --machine
here` would, and both are printed. Nothing is remembered. Ends with 1 if one of `olmoe-4L` is off by more than 25 %.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from decode_work import FULL, QUICK, model_config

from manyhands.generate.typical import FORMATS, SHAPES, Shape, speeds_in
from manyhands.plan.estimate import Point, fit
from manyhands.plan.here import Here
from manyhands.plan.measure import measure
from manyhands.plan.recorded import RecordedSpeed, recorded_points

HELD_OUT, NEAR = "olmoe-4L", 0.25
SMALL = (Shape(D=256, E=8, K=2, F=128, L=2), Shape(D=256, E=16, K=4, F=128, L=2), Shape(D=512, E=8, K=2, F=256, L=1))


def main() -> None:
    """Parse, measure, estimate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        here = measure(Path(directory))
        speeds = [speed for found in run(here, arguments) for speed in found]
        again = measure(Path(directory))  # other work can only lower it
    here = here.model_copy(update={"processor": better(here, again)})
    rows = list(estimated(here, speeds))
    if arguments.json:
        print(json.dumps({"machine": here.processor.model_dump(), "load": os.getloadavg()[0], "rows": rows}))
    else:
        show(here, rows)
    worst = max(abs(row["error"]) for row in rows if row["model"] == HELD_OUT)
    sys.exit(worst > NEAR and not arguments.quick)


def run(here: Here, arguments: argparse.Namespace) -> Iterator[list[RecordedSpeed]]:
    """All models, one after the other."""
    for format in arguments.formats:
        for shape in SMALL if arguments.quick else SHAPES:
            print(f"{shape.name}, {format} …", file=sys.stderr, flush=True)
            yield speeds_in(shape.config, shape.name, format, here)
        print(f"{HELD_OUT}, {format} …", file=sys.stderr, flush=True)
        yield speeds_in(model_config(QUICK if arguments.quick else FULL), HELD_OUT, format, here)


def better(a: Here, b: Here) -> Any:
    """The better of two measurements of the processor, figure by figure."""
    one, other = a.processor, b.processor
    rates = {name: max(one.rates.get(name, 0.0), other.rates.get(name, 0.0)) for name in one.rates | other.rates}
    return one.model_copy(update={"bandwidth": max(one.bandwidth, other.bandwidth), "rates": rates})


def estimated(here: Here, speeds: list[RecordedSpeed]) -> Iterator[dict[str, Any]]:
    """Every speed beside its estimate from the other models'."""
    points = recorded_points(here, speeds)
    assert len(points) == len(speeds), "each was measured with the threads of the machine's measurement"
    for speed, point in zip(speeds, points, strict=True):
        others: list[Point] = [other for other in points if other.group != point.group]
        law = fit(others, point.kind)
        tokens = speed.context if speed.work == "prefill" else speed.batch
        found = tokens / (speed.layers * law.seconds(point.bound))
        measured, (low, high) = tokens / speed.seconds, law.band(point.bound)
        yield {
            "model": speed.model,
            "format": speed.format,
            "step": speed.work if speed.batch == 1 else f"{speed.work} {speed.batch}",
            "measured": measured,
            "bound": tokens / (speed.layers * point.bound),
            "estimate": found,
            "low": found * low,
            "high": found * high,
            "error": found / measured - 1,
        }


def show(here: Here, rows: list[dict[str, Any]]) -> None:
    """For people."""
    machine = here.processor
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine.rates.items())
    about = f"{here.cpu}: {machine.bandwidth / 1e9:.1f} GB/s, {rates}; {here.threads} threads"
    print(f"{about}; load {os.getloadavg()[0]:.1f}")
    names = f"{'measured':>9} {'bound':>9} {'estimate':>9} {'band':>17} {'off by':>7}"
    print(f"{'model':52} {'format':8} {'step':10} {names}")
    for row in rows:
        band = f"{row['low']:,.0f}–{row['high']:,.0f}"
        speeds = f"{row['measured']:9,.0f} {row['bound']:9,.0f} {row['estimate']:9,.0f} {band:>17}"
        print(f"{row['model'][:52]:52} {row['format']:8} {row['step']:10} {speeds} {row['error']:+7.0%}")
    for name, chosen in ((HELD_OUT, [row for row in rows if row["model"] == HELD_OUT]), ("all models", rows)):
        near = sum(abs(row["error"]) <= NEAR for row in chosen)
        held = sum(row["low"] <= row["measured"] <= row["high"] for row in chosen)
        middle = sorted(abs(math.log1p(row["error"])) for row in chosen)[len(chosen) // 2]
        within = f"{near} of {len(chosen)} within {NEAR:.0%}, half within {math.expm1(middle):.0%}"
        print(f"{name}: {within}, {held} in the band")


if __name__ == "__main__":
    main()
