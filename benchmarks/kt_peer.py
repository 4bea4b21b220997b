"""kt-kernel's expert layer, for `experts.py --kt PYTHON`, which runs this file with that interpreter.

    python -m venv kt && kt/bin/pip install torch==2.9.1 numpy safetensors gguf typer rich pyyaml httpx packaging
    kt/bin/pip install --no-deps kt-kernel

`kt_peer.py FORMAT THREADS D E K F`; then a line with a number of rows on stdin is answered by a line of JSON on stdout:
the best and the median seconds of a call, and the error of a few rows against float32 sums of unrounded weights.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch
from kt_kernel import kt_kernel_ext as kt

LAYERS, TURNS = 3, 8  # so that weights come from memory
CLASSES = {"bf16": ("AMXBF16_MOE", "AMX_BF16_MOE"), "int8": ("AMXInt8_MOE",), "int4": ("AMXInt4_MOE",)}


def main() -> None:
    """Build the layers, then answer."""
    format, (threads, D, E, K, F) = sys.argv[1], map(int, sys.argv[2:])
    pool = kt.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    cpu = kt.CPUInfer(pool)
    name = next(name for name in CLASSES[format] if hasattr(kt.moe, name))
    torch.manual_seed(0)
    gate, up = ((torch.randn(E, F, D) * D**-0.5).bfloat16() for _ in range(2))
    down = (torch.randn(E, D, F) * F**-0.5).bfloat16()
    ids, layers = torch.arange(E), []
    for _ in range(LAYERS):  # the same weights in memory of their own: it keeps a copy in its own layout
        config = kt.moe.MOEConfig(E, K, D, F, 0)
        config.max_len, config.pool = 4096, cpu.backend_
        config.gate_proj, config.up_proj, config.down_proj = gate.data_ptr(), up.data_ptr(), down.data_ptr()
        layer = getattr(kt.moe, name)(config)
        cpu.submit(layer.load_weights_task(ids.data_ptr()))
        cpu.sync()
        layers.append((layer, config))
    print(json.dumps({"class": name}), flush=True)
    for line in sys.stdin:
        T = int(line)
        chosen = torch.rand(TURNS, T, E).argsort(-1)[..., :K].contiguous()
        weights, rows = torch.rand(TURNS, T, K), torch.tensor([T])
        x = torch.randn(TURNS, T, D, dtype=torch.bfloat16)
        y = torch.empty_like(x)

        def call(i: int, a: tuple[Any, ...] = (chosen, weights, x, y), rows: torch.Tensor = rows, K: int = K) -> None:
            places = (t[i % TURNS].data_ptr() for t in a)
            cpu.submit(layers[i % LAYERS][0].forward_task(rows.data_ptr(), K, *places, False))
            cpu.sync()

        times, end = [], time.perf_counter() + (1.0 if T < 512 else 1.6)
        for i in range(100_000):
            started = time.perf_counter()
            call(i)
            times.append(time.perf_counter() - started)
            if i >= 8 and started > end:
                break
        call(0)
        errors = []
        for t in range(min(T, 4)):
            expected, row = torch.zeros(D), x[0, t].float()
            for e, w in zip(chosen[0, t].tolist(), weights[0, t].tolist(), strict=True):
                hidden = torch.nn.functional.silu(gate[e].float() @ row) * (up[e].float() @ row)
                expected += w * (down[e].float() @ hidden)
            errors.append(float((y[0, t].float() - expected).norm() / expected.norm()))
        found = {"best": min(times[3:]), "median": statistics.median(times[3:]), "error": statistics.mean(errors)}
        print(json.dumps(found), flush=True)


main()
