"""Decoding and prefill of one model in every format, beside its peers, in one run: `python benchmarks/decode.py`.

The work is `olmoe-4L`: OLMoE-1B-7B's layer (d 2048, 16 heads of 128, norms of queries and keys over the full width, 64
experts, top-8, F 1024), 4 layers, vocabulary 16,384, random weights: 1.745 B parameters, 302 M active per token.

Every system runs in a process of its own, so that its memory is its own; the processes take turns, round after round,
so that a change of the machine's speed meets all of them. The read bandwidth is measured in each round too: a decoded
token reads every active weight once, so bandwidth over bytes is the roof, and the share of it is what is reported.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.files import building
from manyhands.checkpoint.model import load_model, save
from manyhands.checkpoint.packed import packed_headers, records_of, write_packed
from manyhands.checkpoint.tensor_files import DTYPES
from manyhands.config import ModelConfig, PackedConfig, Packing
from manyhands.config.shapes import tensor_shapes
from manyhands.kernels.native import available, levels, missing
from manyhands.nn import Decoder
from manyhands.quant import FORMATS
from manyhands.quant.record import PAGE

FULL = {"D": 2048, "H": 16, "E": 64, "F": 1024, "L": 4, "V": 16_384, "prefill": 512, "decode": 24}
QUICK = {"D": 256, "H": 4, "E": 16, "F": 128, "L": 2, "V": 2048, "prefill": 64, "decode": 8}
PEERS = ("transformers eager", "transformers grouped_mm")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--formats", nargs="*", default=["bf16", "int8", "int4", "float32"], choices=FORMATS)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--slow", action="store_true", help="also what unpacks its experts on every call")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("SYSTEM", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = QUICK if arguments.quick else FULL
    if arguments.worker:
        print(json.dumps(measure(*arguments.worker, size)))
        return
    with tempfile.TemporaryDirectory() as directory:
        result = compare(arguments, size, Path(directory))
    print(json.dumps(result) if arguments.json else table(result))


def compare(arguments: argparse.Namespace, size: dict[str, int], directory: Path) -> dict[str, Any]:
    """All systems, in turn."""
    config = model_config(size)
    systems = {}
    for format in arguments.formats:
        write_random(config, format, directory / format)
        for implementation in [*(["native"] if available() else []), *(["eager"] if arguments.slow else [])]:
            systems[f"manyhands {format} {implementation}"] = directory / format
    write_plain(config, directory / "plain")
    systems["manyhands bfloat16 grouped_mm, not packed"] = directory / "plain"
    with_peers = not arguments.without_peers and importlib.util.find_spec("transformers") is not None
    systems |= dict.fromkeys(PEERS if with_peers else (), directory / "plain")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    bandwidths = []
    for number in range(arguments.rounds):
        order = list(systems) if number % 2 == 0 else list(systems)[::-1]
        bandwidths.append(read_bandwidth(64 << 20 if arguments.quick else 1 << 30))
        for name in order:
            rounds[name].append(run_apart(name, systems[name], arguments))
            if not arguments.json:
                last = rounds[name][-1]
                print(
                    f"round {number + 1}  {name:42} decode {last['decode']:7.2f}  prefill {last['prefill']:8.1f} tok/s"
                )
    bandwidth = statistics.median(bandwidths)
    found = {}
    for name, runs in rounds.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        format = name.split()[1] if name.startswith("manyhands") and "not packed" not in name else "bf16"
        read = bytes_per_token(config, format)
        found[name] = middle | {
            "decode_range": [min(run["decode"] for run in runs), max(run["decode"] for run in runs)],
            "bytes_per_token": read,
            "roof": bandwidth / read,
            "share_of_roof": middle["decode"] * read / bandwidth,
        }
    return {
        "sizes": size,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "native": missing() or levels()[-1],
        "read_bandwidth": bandwidth,
        "bandwidth_range": [min(bandwidths), max(bandwidths)],
        "llama_cpp": "installed, not run here" if importlib.util.find_spec("llama_cpp") else "not installed",
        "transformers": "measured" if with_peers else "not measured",
        "systems": found,
    }


def run_apart(name: str, directory: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """One system in a process of its own."""
    command = [sys.executable, __file__, "--worker", name, str(directory), "--threads", str(arguments.threads)]
    command += ["--quick"] if arguments.quick else []
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@torch.inference_mode()
def measure(system: str, directory: str, size: dict[str, int]) -> dict[str, float]:
    """Tokens per second of prefill and of decoding at batch 1, and the process's peak memory in bytes."""
    prefill, step = transformers_model(system, directory) if system in PEERS else our_model(system, directory)
    ids = torch.randint(0, size["V"], (1, size["prefill"]), generator=torch.Generator().manual_seed(0))
    prefill(ids[:, :16])
    started = time.perf_counter()
    token = prefill(ids)
    prefill_time = time.perf_counter() - started
    times = []
    for _ in range(size["decode"] + 2):
        started = time.perf_counter()
        token = step(token)
        times.append(time.perf_counter() - started)
    return {
        "prefill": size["prefill"] / prefill_time,
        "decode": 1 / statistics.median(times[2:]),
        "peak_memory": peak_memory(),
    }


Run = Callable[[Tensor], Tensor]


def our_model(system: str, directory: str) -> tuple[Run, Run]:
    """Prefill, which starts anew, and one step; each takes ids and gives the next token."""
    implementation = "grouped_mm" if "not packed" in system else system.split()[2]
    model = load_model(directory, experts_implementation="auto" if implementation == "native" else implementation)
    cache = [model.new_cache()]

    def step(ids: Tensor) -> Tensor:
        return model.head(model.hidden(ids, cache=cache[0]).states[:, -1:]).argmax(-1)

    def prefill(ids: Tensor) -> Tensor:
        cache[0] = model.new_cache()
        return step(ids)

    return prefill, step


def transformers_model(system: str, directory: str) -> tuple[Run, Run]:
    """The same of transformers' model, on the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, experts_implementation=system.split()[1]
    ).eval()
    cache: list[Any] = [None]

    def step(ids: Tensor) -> Tensor:
        out = model(input_ids=ids, past_key_values=cache[0], use_cache=True, logits_to_keep=1)
        cache[0] = out.past_key_values
        return out.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]

    def prefill(ids: Tensor) -> Tensor:
        cache[0] = None
        return step(ids)

    return prefill, step


def model_config(size: dict[str, int]) -> ModelConfig:
    """OLMoE's layer at these sizes."""
    return ModelConfig(
        vocab_size=size["V"],
        hidden_size=size["D"],
        num_hidden_layers=size["L"],
        intermediate_size=size["F"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        attention={"num_attention_heads": size["H"], "head_dim": size["D"] // size["H"], "qk_norm": "full"},
        moe={
            "router": {"num_experts": size["E"], "num_experts_per_tok": 8, "norm_topk_prob": False},
            "moe_intermediate_size": size["F"],
        },
    )


def bytes_per_token(config: ModelConfig, format: str) -> int:
    """What a decoded token reads: every linear layer, the chosen experts, the routers."""
    assert config.moe is not None
    router = config.moe.router
    packed = PackedConfig(experts=packing(format), linear=packing(format))
    total = 0
    for record in records_of(config, packed):
        size = sum(size for _, size in record.layout.sections.values())  # without what fills the last page
        total += size if record.num_experts is None else size * router.num_experts_per_tok
    return total + 4 * len(config.sparse_layers) * router.num_experts * config.hidden_size


def packing(format: str) -> Packing:
    """int4 in groups of 32."""
    return Packing(format=format, group_size=32 if format == "int4" else 0)  # type: ignore[arg-type]


def write_plain(config: ModelConfig, directory: Path) -> None:
    """Random bfloat16 weights, as transformers reads them too."""
    with torch.device("meta"):
        model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in tensor_shapes(config).items():
        dtype = torch.float32 if ".router." in name else torch.bfloat16
        state[name] = torch.empty(shape, dtype=dtype).normal_(0.0, 0.02, generator=generator)
        if "norm" in name:
            state[name].fill_(1.0)
    model.load_state_dict(state, assign=True)
    save(model, directory, family="olmoe")


def write_random(config: ModelConfig, format: str, directory: Path) -> None:
    """Random records: any bytes are int8 or int4 weights; scales and floats are drawn."""
    packed = PackedConfig(experts=packing(format), linear=packing(format))
    records = {record.name: record for record in records_of(config, packed)}
    generator = torch.Generator().manual_seed(0)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if ".router." in name else torch.bfloat16

    headers = packed_headers(config, packed, dtype_of)

    def value(name: str) -> Tensor:
        header = headers[name]
        if name not in records:
            out = torch.empty(header.shape, dtype=DTYPES[header.dtype])
            return out.fill_(1.0) if "norm" in name else out.normal_(0.0, 0.02, generator=generator)
        layout = records[name].layout
        assert layout.record_bytes % PAGE == 0
        out = torch.randint(-127, 128, header.shape, dtype=torch.int8, generator=generator).view(torch.uint8)
        stacked = out.view(-1, layout.record_bytes)
        for section, (start, length) in layout.sections.items():
            dtype = {"bf16": torch.bfloat16, "float32": torch.float32}.get(layout.format)
            if "scales" in section:
                dtype, scale = (torch.bfloat16, 0.004) if layout.format == "int4" else (torch.float32, 0.0003)
            else:
                scale = 0.02
            if dtype is not None:
                draw = torch.empty(length // dtype.itemsize, dtype=dtype).normal_(0.0, scale, generator=generator)
                stacked[:, start : start + length] = draw.view(torch.uint8)  # every expert alike: time is the same
        return out

    with building(directory) as partial:
        write_packed(partial, config, packed, dtype_of, value)


def read_bandwidth(size: int) -> float:
    """Bytes per second at which this process reads memory, all its threads together: the best of a few sums."""
    block = torch.ones(size // 8, dtype=torch.int64)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        best = max(best, size / (time.perf_counter() - started))
    return best


def peak_memory() -> float:
    """Bytes that were resident at once."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def table(result: dict[str, Any]) -> str:
    """For people."""
    bandwidth, low, high = (b / 1e9 for b in (result["read_bandwidth"], *result["bandwidth_range"]))
    lines = [
        f"{result['threads']} threads, native: {result['native']}, torch {result['torch']}, medians of "
        f"{result['rounds']} rounds; read bandwidth {bandwidth:.1f} GB/s ({low:.1f}–{high:.1f})",
        f"llama-cpp-python: {result['llama_cpp']}; transformers: {result['transformers']}",
        f"{'':42} {'decode':>8} {'(range)':>15} {'MB/token':>9} {'of roof':>8} {'prefill':>9} {'peak GB':>8}",
    ]
    for name, found in result["systems"].items():
        a, b = found["decode_range"]
        lines.append(
            f"{name:42} {found['decode']:8.2f} {f'({a:.1f}–{b:.1f})':>15} {found['bytes_per_token'] / 1e6:9.1f} "
            f"{found['share_of_roof']:8.1%} {found['prefill']:9.1f} {found['peak_memory'] / 1e9:8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
