"""The MoE layer's experts, every backend side by side in one run: `python benchmarks/experts.py [--quick]`.

`--layer` prints one table instead: OLMoE's layer from 1 to 2,048 rows in every format, the best and the median time, as
a share of the bare instruction rate and of the read bandwidth, beside kt-kernel where `--kt` names the Python that has
it (kt_peer.py says how).

Otherwise three tables. *Many tokens*: forward, and forward + backward, of each backend and of PyTorch's dense SwiGLU
network of the same active FLOPs, as a share of the matrix rate measured in the same run; and what `auto` takes. *Few
tokens*: each packed format as a share of the read bandwidth measured in the same run; the experts chosen change from
call to call, so that weights come from memory. *Cost against E*: time per token at fixed K and F, relative to 8
experts, each with 16 tokens or more. Routing is uniform at random. The systems of a row take turns, and the best time
of each counts: the machine may be busy.

T tokens, D model width, E experts, K experts per token, F expert width.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import expert_layer
import torch
import torch.nn.functional as nnf
from machine import unit_rates
from torch import Tensor

from manyhands.kernels import ExpertWeights, choose, native, run_experts
from manyhands.kernels.experts import swiglu
from manyhands.quant import PackedExperts, pack_experts
from manyhands.train.memory import keep_freed_memory

MANY = [  # T, D, E, K, F
    (1024, 512, 8, 1, 2048),
    (1024, 512, 64, 8, 128),
    (1024, 1024, 64, 8, 512),
    (4096, 384, 32, 4, 256),
    (4096, 512, 8, 2, 2048),
    (4096, 512, 512, 8, 128),
    (4096, 1024, 64, 8, 512),
    (16384, 384, 32, 4, 256),
    (16384, 512, 128, 4, 512),
]
QUICK_MANY = [(1024, 384, 32, 4, 256), (1024, 512, 8, 2, 1024), (2048, 512, 256, 8, 128)]
FORMATS = ("float32", "bf16", "int8", "int4")
Works = dict[str, Callable[[], object]]


def main() -> None:
    """Parse, measure the roofs, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, fewer repeats: about a minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the first table")
    parser.add_argument("--layer", action="store_true", help="OLMoE's layer alone; about two minutes with --kt")
    parser.add_argument("--kt", metavar="PYTHON", help="with --layer: a Python that has kt-kernel")
    parser.add_argument("--formats", nargs="*", default=["bf16", "int8", "int4"], choices=FORMATS, help="with --layer")
    parser.add_argument("--rows", nargs="*", type=int, default=expert_layer.ROWS, help="with --layer")
    parser.add_argument("--level", help="with --layer: of the native kernels; the best by default")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    repeats = 3 if a.quick else 6
    roofs = {"matrix_gflops": matrix_rate() / 1e9, "read_gbytes": read_rate(64 if a.quick else 128) / 1e9}
    result: dict[str, Any] = {"threads": a.threads, "torch": torch.__version__, **roofs}
    result["levels"] = native.levels() if native.available() else native.missing()

    def say(line: str) -> None:
        if not a.json:
            print(line, flush=True)

    if a.layer:
        units = result["units"] = unit_rates(a.threads)
        shown = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in units.items())
        say(f"{a.threads} threads; read {roofs['read_gbytes']:.1f} GB/s; bare instructions, G operations/s: {shown}")
        read = roofs["read_gbytes"] * 1e9
        result["layer"] = expert_layer.table(a.formats, a.rows, a.level, a.threads, a.kt, read, units, say)
        if a.json:
            print(json.dumps(result))
        return
    say(f"{a.threads} threads, levels {result['levels']}; matrix rate {roofs['matrix_gflops']:.0f} GFLOP/s (float32), "
        f"read {roofs['read_gbytes']:.1f} GB/s\n\nMany tokens ({a.dtype}): share of the matrix rate")  # fmt: skip
    dtype = getattr(torch, a.dtype)
    result["many"] = [many(cell, dtype, repeats, roofs, say) for cell in (QUICK_MANY if a.quick else MANY)]
    say("\nFew tokens: share of the read bandwidth")
    sizes = (512, 64, 8, 512) if a.quick else (2048, 64, 8, 1024)
    result["few"] = few(sizes, (1, 8, 64), 4 * repeats, roofs, say)
    say("\nCost against E at fixed K = 4, F = 256, D = 384: time per token relative to 8 experts, forward + backward")
    result["against_E"] = against_experts(2048 if a.quick else 8192, repeats, say)
    if a.json:
        print(json.dumps(result))


def best(works: Works, repeats: int) -> dict[str, float]:
    """The shortest time of each; they take turns, after one round that is not counted."""
    times = {name: float("inf") for name in works}
    for i in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if i:
                times[name] = min(times[name], time.perf_counter() - started)
    return times


def matrix_rate() -> float:
    """FLOP/s of a float32 product."""
    x = torch.randn(1024, 1024)
    return 2 * 1024**3 / best({"mm": lambda: torch.mm(x, x)}, 20)["mm"]


def read_rate(megafloats: int) -> float:
    """Bytes per second of the fastest of three of PyTorch's ways to read memory."""
    x = torch.randn(megafloats << 20)
    rows, v = x.view(1 << 12, -1), torch.randn((megafloats << 20) >> 12)
    ways: Works = {"sum": x.sum, "integers": x.view(torch.int64).sum, "matrix": lambda: torch.mv(rows, v)}
    return x.numel() * 4 / min(best(ways, 6).values())


def uniform(T: int, E: int, K: int) -> Tensor:
    """[T, K]: K different experts for each token."""
    return torch.rand(T, E).topk(K).indices


def weights(D: int, E: int, F: int) -> ExpertWeights:
    """Random float32 experts."""
    return ExpertWeights(torch.randn(E, 2 * F, D) * 0.02, torch.randn(E, D, F) * 0.02, None, None, "swiglu")


def many(
    cell: tuple[int, ...], dtype: torch.dtype, repeats: int, roofs: dict[str, float], say: Callable[[str], None]
) -> dict[str, Any]:
    """One row: every backend that can, and the dense network."""
    T, D, E, K, F = cell
    experts = weights(D, E, F)
    ids, w, kept = uniform(T, E, K), torch.rand(T, K), torch.ones(T, K, dtype=torch.bool)
    x, dy = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    leaves = [x, w, experts.up, experts.down]
    dense = [torch.randn(2 * K * F, D) * 0.02, torch.randn(D, K * F) * 0.02]

    def ffn() -> Tensor:
        return nnf.linear(swiglu(nnf.linear(x, dense[0].to(dtype))), dense[1].to(dtype))

    def layer(name: str) -> Callable[[], Tensor]:
        return lambda: run_experts(name, x, ids, w, kept, experts)

    names = ["grouped_mm", *(["native"] if native.available() else []), *(["eager"] if T * E <= 1 << 16 else [])]
    forward: dict[str, Callable[[], Tensor]] = {name: layer(name) for name in names} | {"dense": ffn}
    square = torch.randn(1024, 1024)
    with torch.no_grad():  # the roof takes its turn with the rest
        once = best({**forward, "mm": lambda: torch.mm(square, square)}, repeats)
    for leaf in (*leaves, *dense):
        leaf.requires_grad_()

    def both(work: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.backward(work(), dy)
            for leaf in (*leaves, *dense):
                leaf.grad = None

        return run

    auto = choose(x, experts)
    twice = best({name: both(work) for name, work in forward.items()}, repeats)
    flops, roof = 6 * T * K * D * F, max(2 * 1024**3 / once.pop("mm"), roofs["matrix_gflops"] * 1e9)
    say(
        f"  T {T:5} D {D:4} E {E:3} K {K} F {F:4}   "
        + "  ".join(f"{n} {flops / once[n] / roof:4.0%} / {3 * flops / twice[n] / roof:4.0%}" for n in forward)
        + f"  auto: {auto}"
    )
    return {"cell": cell, "forward_s": once, "both_s": twice, "flops": flops, "auto": auto}


def few(
    sizes: tuple[int, ...], tokens: tuple[int, ...], repeats: int, roofs: dict[str, float], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Each format, and the float32 backends, at few tokens."""
    D, E, K, F = sizes
    experts = weights(D, E, F)
    packed = {format: repeat(experts, E, format) for format in FORMATS} if native.available() else {}
    rows = []
    for T in tokens:
        w, kept, x = torch.rand(T, K), torch.ones(T, K, dtype=torch.bool), torch.randn(T, D)
        choices = [uniform(T, E, K) for _ in range(32)]
        turn = cycle(choices)
        works: Works = {"grouped_mm": partial(plain_call, x, turn, w, kept, experts)}
        works |= {format: partial(packed_call, x, turn, w, kept, p) for format, p in packed.items()}
        with torch.no_grad():
            times = best(works, repeats)
        distinct = sum(len(set(c.flatten().tolist())) for c in choices) / len(choices)
        size = {"grouped_mm": 12 * D * F} | {f: p.layout.record_bytes for f, p in packed.items()}
        share = {name: distinct * size[name] / t / (roofs["read_gbytes"] * 1e9) for name, t in times.items()}
        say(
            f"  T {T:3} D {D} E {E} K {K} F {F}   "
            + "  ".join(f"{n} {t * 1e3:.2f} ms {share[n]:4.0%}" for n, t in times.items())
        )
        rows.append({"tokens": T, "seconds": times, "share_of_read": share})
    return rows


def plain_call(x: Tensor, turn: Iterator[Tensor], w: Tensor, kept: Tensor, experts: ExpertWeights) -> None:
    """The best of PyTorch alone, with the next choice of experts."""
    run_experts("grouped_mm", x, next(turn), w, kept, experts)


def packed_call(x: Tensor, turn: Iterator[Tensor], w: Tensor, kept: Tensor, packed: PackedExperts) -> None:
    """The same on records."""
    native.packed_experts(x, next(turn), w, kept, packed)


def repeat(experts: ExpertWeights, E: int, format: Any) -> PackedExperts:
    """E records; only two different ones are rounded, because that is slow and changes no time."""
    two = pack_experts(experts._replace(up=experts.up[:2], down=experts.down[:2]), format)
    return replace(two, records=two.records[torch.arange(E) % 2].contiguous())


def against_experts(T: int, repeats: int, say: Callable[[str], None]) -> dict[str, dict[int, float]]:
    """Seconds per token by backend and number of experts."""
    D, K, F = 384, 4, 256
    names = ["grouped_mm", *(["native"] if native.available() else [])]
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for E in (8, 32, 128, 512):  # 16 rows per expert or more
        experts, ids = weights(D, E, F), uniform(T, E, K)
        x, w, kept = torch.randn(T, D), torch.rand(T, K), torch.ones(T, K, dtype=torch.bool)
        leaves = [x.requires_grad_(), experts.up.requires_grad_(), experts.down.requires_grad_()]

        def both(name: str, args: tuple[Any, ...] = (x, ids, w, kept, experts), leaves: list[Tensor] = leaves) -> Any:
            def run() -> None:
                torch.autograd.backward(run_experts(name, *args).sum())
                for leaf in leaves:
                    leaf.grad = None

            return run

        for name, seconds in best({name: both(name) for name in names}, repeats).items():
            found[name][E] = seconds / T
    for name, times in found.items():
        say(f"  {name:10} " + "  ".join(f"E {E} {t / times[8]:.2f}" for E, t in times.items()))
    return found


if __name__ == "__main__":
    main()
