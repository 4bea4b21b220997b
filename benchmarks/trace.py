"""What recording a trace costs while a model generates: `python benchmarks/trace.py runs/quickstart`.

The engine runs with a recorder; the clock is around what is recorded after each pass, and around all of it. So both are
of the same run, and another program on the machine slows both. That tokens stay the same is tests/engine's.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from manyhands.checkpoint.model import load
from manyhands.config import SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.engine.recording import PassRecorder, recorder_for

CASES = {"decoding, 1 request": (1, 8, 300), "decoding, 16 requests": (16, 8, 100), "prompts, 8 of 250": (8, 250, 1)}
"""Requests, tokens of each prompt, new tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    spent: list[float] = []
    real = PassRecorder.ran

    def ran(self: PassRecorder, *passed: Any) -> None:
        began = time.perf_counter()
        real(self, *passed)
        spent.append(time.perf_counter() - began)

    PassRecorder.ran = ran  # type: ignore[method-assign]
    for name, (B, length, new) in CASES.items():
        shares, each = [], []
        for _ in range(arguments.repeats):
            spent.clear()
            with (
                tempfile.TemporaryDirectory() as folder,
                recorder_for(model, tokenizer, Path(folder) / "trace", "a benchmark") as recorder,
            ):
                engine = Engine(model, tokenizer, max_sequences=B, trace=recorder, prefix_caching=False)
                sampling = SamplingConfig(max_new_tokens=new, ignore_eos=True, temperature=0)
                began = time.perf_counter()
                engine.generate([[100 + i] * length for i in range(B)], sampling)
                took = time.perf_counter() - began
            shares.append(sum(spent) / took)
            each.append(statistics.median(spent))
        print(f"{name}: {statistics.median(shares):.1%} of the time, {statistics.median(each) * 1e6:.0f} µs a pass")


if __name__ == "__main__":
    main()
