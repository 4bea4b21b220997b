"""OLMoE's expert layer from 1 to 2,048 rows, each format beside kt-kernel's: the table of `experts.py --layer`.

Both multiply bfloat16 rows with random weights of one kind, rounded as each rounds them. The peer is a process of its
own and stands still while ours runs. Shares: of the level's fastest instruction for the format, bare, and of the read
bandwidth, counting each chosen expert once; the layers that take turns are larger than the caches. Errors are against
float32 sums of the weights before rounding.

T rows, D model width, E experts, K experts per row, F expert width.
"""

import json
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from machine import at, unit
from torch import Tensor

from manyhands.kernels import ExpertWeights, native
from manyhands.quant import PackedExperts, pack_experts

SIZES = {"D": 2048, "E": 64, "K": 8, "F": 1024}
ROWS = (1, 4, 16, 64, 512, 2048)
LAYERS, TURNS = 3, 8


class KtPeer:
    """kt-kernel in the process of another interpreter, stopped unless it is asked."""

    def __init__(self, python: str, format: str, threads: int) -> None:
        command = [python, str(Path(__file__).with_name("kt_peer.py")), format, str(threads)]
        self.process = subprocess.Popen(
            [*command, *map(str, SIZES.values())], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.process.send_signal(signal.SIGSTOP)
                return json.loads(line)  # type: ignore[no-any-return]
        raise SystemExit(f"kt-kernel: exit status {self.process.wait()}: run kt_peer.py by hand to see why")

    def ask(self, rows: int) -> dict[str, Any]:
        """Seconds and error of a call with so many rows."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{rows}\n")
        self.process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@torch.no_grad()
def table(
    formats: list[str], rows: Sequence[int], level: str | None, threads: int, kt: str | None,
    read: float, units: dict[str, float], say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """One line for each format and number of rows."""
    D, E, K, F = SIZES.values()
    found = []
    with at(level) as level:
        for format in formats:
            torch.manual_seed(0)
            two = ExpertWeights(
                torch.randn(2, 2 * F, D) * D**-0.5, torch.randn(2, D, F) * F**-0.5, None, None, "swiglu"
            )
            two = two._replace(up=two.up.bfloat16().float(), down=two.down.bfloat16().float())
            packed = pack_experts(two, format, 32 if format == "int4" else 0)  # type: ignore[arg-type]
            layers = [replace(packed, records=packed.records[torch.arange(E) % 2].contiguous()) for _ in range(LAYERS)]
            peer = KtPeer(kt, format, threads) if kt and format != "float32" else None
            best = units.get(unit(format, level) or "")
            for T in rows:
                ours = measure(layers, two, T)
                row = {"format": format, "level": level, "rows": T, "ours": ours}
                distinct = E * (1 - (1 - K / E) ** T)
                row["share_of_unit"] = 6 * T * K * D * F / ours["best"] / best if best else None
                row["share_of_read"] = distinct * packed.layout.record_bytes / ours["best"] / read
                line = f"  {format:7} {level:11} {T:5} rows {ours['best'] * 1e3:8.2f} ms ({ours['median'] * 1e3:.2f}), "
                line += f"error {ours['error']:.2%}, " + (f"{row['share_of_unit']:4.0%} of the unit, " if best else "")
                line += f"{row['share_of_read']:4.0%} of reading"
                if peer:
                    row["kt"] = theirs = peer.ask(T)
                    row["ratio"] = theirs["best"] / ours["best"]
                    line += f"; kt {theirs['best'] * 1e3:8.2f} ms ({theirs['median'] * 1e3:.2f}), error "
                    line += f"{theirs['error']:.1%}: {row['ratio']:.2f} x"
                say(line)
                found.append(row)
            if peer:
                peer.__exit__()
            del layers
    return found


def measure(layers: list[PackedExperts], two: ExpertWeights, T: int) -> dict[str, float]:
    """Best and median seconds, and the error of a few rows."""
    D, E, K, _ = SIZES.values()
    ids = torch.rand(TURNS, T, E).argsort(-1)[..., :K].contiguous()
    weights, kept = torch.rand(TURNS, T, K), torch.ones(T, K, dtype=torch.bool)
    x = torch.randn(TURNS, T, D).bfloat16()

    def call(i: int) -> Tensor:
        turn = i % TURNS
        return native.packed_experts(x[turn], ids[turn], weights[turn], kept, layers[i % LAYERS])

    times, end = [], time.perf_counter() + (0.8 if T < 512 else 1.4)
    for i in range(100_000):
        started = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - started)
        if i >= 8 and started > end:
            break
    y, errors = call(0).float(), []
    for t in range(min(T, 4)):
        expected = torch.zeros(D)
        for e, w in zip(ids[0, t].tolist(), weights[0, t].tolist(), strict=True):
            gate, up = (two.up[e % 2] @ x[0, t].float()).chunk(2)
            expected += w * (two.down[e % 2] @ (torch.nn.functional.silu(gate) * up))
        errors.append(float((y[t] - expected).norm() / expected.norm()))
    return {"best": min(times[3:]), "median": statistics.median(times[3:]), "error": statistics.mean(errors)}
