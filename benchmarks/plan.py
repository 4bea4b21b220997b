"""Prediction against measurement: `python benchmarks/plan.py`.

Six shapes of small MoE models with random weights. For each, the planner says from the configuration what decoding,
prefill and memory can be at best on this machine, as measured before and after; the model is built and run in a process
of its own (so that its peak memory is its own), one sequence, greedily, through the generation engine. Speeds are
printed as the share of the roof that was reached; memory as the error of the prediction.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from manyhands.config import ModelConfig
from manyhands.plan import count_model
from manyhands.plan.cache import sequence_bytes
from manyhands.plan.machine import Machine
from manyhands.plan.measure import measure
from manyhands.plan.roof import decode_bound, prefill_bound
from manyhands.plan.sizes import sizes_of
from manyhands.plan.storage import BF16, FP32, Storage, weight_bytes
from manyhands.plan.working import working_bytes

MLA = {"kind": "mla", "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "8 wide experts, top-2": {"D": 512, "E": 8, "K": 2, "F": 1024, "L": 6},
    "64 narrow, top-8": {"D": 512, "E": 64, "K": 8, "F": 256, "L": 6},
    "128 experts, top-2": {"D": 512, "E": 128, "K": 2, "F": 256, "L": 6},
    "MLA, a shared expert": {"D": 512, "E": 32, "K": 4, "F": 512, "L": 6, "attention": MLA | {"v_head_dim": 64}},
    "GQA, a window of 128": {"D": 768, "E": 16, "K": 2, "F": 768, "L": 6, "attention": {"sliding_window": 128}},
    "wide, top-4 of 16": {"D": 1024, "E": 16, "K": 4, "F": 1024, "L": 3},
}
PROMPT, NEW, TRIALS = 512, 64, 3


def shape(name: str, small: bool) -> ModelConfig:
    """The model of one row; `small` halves every width."""
    s, by = SHAPES[name], 2 if small else 1
    heads = s["D"] // by // 64
    attention: dict[str, Any] = {"num_attention_heads": heads, "head_dim": 64} | s.get("attention", {})
    if attention.get("kind") == "mla":
        attention.pop("head_dim")
    elif "window" in name:
        attention["num_key_value_heads"] = heads // 2
    moe: dict[str, Any] = {
        "router": {"num_experts": s["E"], "num_experts_per_tok": s["K"]},
        "moe_intermediate_size": s["F"] // by,
        "n_shared_experts": int("shared" in name),
    }
    return ModelConfig.model_validate(
        {
            "vocab_size": 16384 // by,
            "hidden_size": s["D"] // by,
            "num_hidden_layers": s["L"],
            "max_position_embeddings": PROMPT + NEW + 1,
            "attention": attention,
            "moe": moe,
        }
    )


def child(name: str | None, small: bool, dtype_name: str) -> None:
    """One process: build and run one model, or (no name) nothing but the imports; prints one JSON line."""
    import torch

    from manyhands.config import SamplingConfig
    from manyhands.generate.steps import generate
    from manyhands.models import Decoder, init_weights

    torch.mm(torch.ones(256, 256), torch.ones(256, 256))
    found: dict[str, float] = {}
    if name is not None:
        config = shape(name, small)
        torch.set_default_dtype(getattr(torch, dtype_name))
        model = Decoder(config).eval()
        init_weights(model, seed=0)
        prompt = torch.randint(config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        sampling = SamplingConfig(max_new_tokens=NEW, temperature=0.0)
        prefill, decode = [], []
        for _ in range(TRIALS):
            steps, last = generate(model, prompt, sampling), time.perf_counter()
            for number, _step in enumerate(steps):
                now = time.perf_counter()
                (decode if number else prefill).append(now - last)
                last = now
        found = {"prefill": PROMPT / min(prefill), "decode": 1 / statistics.median(decode)}
    print(json.dumps({**found, "peak": peak_memory(), "threads": torch.get_num_threads()}))


def peak_memory() -> float:
    """Bytes of this process at its fullest. Linux: getrusage's figure would be the parent's until we pass it."""
    status = Path("/proc/self/status")
    if status.exists():
        return float(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def measure_here() -> Machine:
    """This machine, now; nothing is remembered."""
    with tempfile.TemporaryDirectory() as directory:
        return measure(Path(directory)).processor


def better(a: Machine, b: Machine) -> Machine:
    """The better of two measurements, figure by figure: other work on the machine can only lower them."""
    rates = {name: max(a.rates.get(name, 0.0), b.rates.get(name, 0.0)) for name in a.rates | b.rates}
    return a.model_copy(update={"bandwidth": max(a.bandwidth, b.bandwidth), "rates": rates})


def run_child(name: str | None, arguments: argparse.Namespace) -> dict[str, float]:
    """`child` in a process of its own."""
    command = [sys.executable, __file__, "--child", name or "", "--dtype", arguments.dtype]
    done = subprocess.run(command + ["--small"] * arguments.small, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'failed'}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def predict(config: ModelConfig, machine: Machine, storage: Storage, empty: float) -> dict[str, float]:
    """Tokens per second at best, and bytes of memory, from the configuration."""
    sizes, counts, bits = sizes_of(config), count_model(config), storage.linear
    context = PROMPT + NEW / 2
    decode = decode_bound(machine, sizes, counts, storage, context=context, kv_bits=bits)
    prefill = prefill_bound(machine, sizes, counts, storage, PROMPT)
    room = 2 * sequence_bytes(sizes, PROMPT, bits)  # the cache doubles its room when it grows
    peak = empty + weight_bytes(counts, storage) + room + working_bytes(config, PROMPT, bits)
    return {"decode": decode.tokens_per_second, "prefill": prefill.tokens_per_second, "peak": peak}


def main() -> None:
    """Parse, predict, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--small", action="store_true", help="every width halved")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child or None, arguments.small, arguments.dtype)
        return
    before = measure_here()
    storage = FP32 if arguments.dtype == "float32" else BF16
    empty = run_child(None, arguments)
    rows = []
    for name in SHAPES:
        config = shape(name, arguments.small)
        row = {"name": name, "total": count_model(config).total, "active": count_model(config).active}
        rows.append(row | {"measured": run_child(name, arguments)})
    machine = better(before, measure_here())
    for row in rows:
        row["predicted"] = predict(shape(row["name"], arguments.small), machine, storage, empty["peak"])
    if arguments.json:
        print(json.dumps({"machine": machine.model_dump(), "load": os.getloadavg()[0], "rows": rows}))
        return
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine.rates.items())
    print(
        f"{machine.title}: {machine.bandwidth / 1e9:.1f} GB/s, {rates}; {empty['threads']} threads, {arguments.dtype}"
    )
    print(f"load average {os.getloadavg()[0]:.1f}; prompt {PROMPT}, {NEW} new tokens, one sequence\n")
    speeds = " | ".join(f"{verb + ' tok/s':>17} {'roof':>5}" for verb in ("decode", "prefill"))
    print(f"{'shape':22} {'total':>7} {'active':>7} | {speeds} | peak MB")
    for row in rows:
        said, found = row["predicted"], row["measured"]
        line = f"{row['name']:22} {row['total'] / 1e6:6.1f}M {row['active'] / 1e6:6.1f}M"
        for key in ("decode", "prefill"):
            line += f" | {found[key]:7.0f} of {said[key]:6.0f} {found[key] / said[key]:5.0%}"
        error = said["peak"] / found["peak"] - 1
        print(f"{line} | {found['peak'] / 1e6:5.0f}, predicted {said['peak'] / 1e6:5.0f} ({error:+.0%})")


if __name__ == "__main__":
    main()
