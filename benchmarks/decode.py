"""Decoding and prefill of one model in every format, beside its peers, in one run: `python benchmarks/decode.py`.

The work is `olmoe-4L`: OLMoE-1B-7B's layer (d 2048, 16 heads of 128, norms of queries and keys over the full width, 64
experts, top-8, F 1024), 4 layers, vocabulary 16,384, random weights: 1.745 B parameters, 302 M active per token.

Every system runs in a process of its own, so that its memory is its own; the processes take turns, round after round,
so that a change of the machine's speed meets all of them. The read bandwidth is measured in each round too: a decoded
token reads every active weight once, so bandwidth over bytes is the roof, and the share of it is what is reported. Of
prefill the share is of the fastest instruction that the level has for the format, bare (`rates.cpp`).

Peers, where they are installed (`benchmarks/install_peers.sh`): transformers on the same bfloat16 weights, llama.cpp on
the same weights as BF16, Q8_0 and Q4_0. Ratios are taken round by round.
"""

import argparse
import importlib.metadata
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

import llama_cpp_peer
import torch
from decode_work import FULL, QUICK, bytes_per_token, held, model_config, operations_per_token
from machine import at, read_bandwidth, unit, unit_rates
from torch import Tensor

from manyhands.checkpoint.model import load_model
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.runner import Runner
from manyhands.kernels.native import available, missing
from manyhands.kernels.native.library import default_level
from manyhands.quant import FORMATS

PEERS = ("transformers eager", "transformers grouped_mm")
LOGITS = "logits of llama.cpp"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--formats", nargs="*", default=["bf16", "int8", "int4", "float32"], choices=FORMATS)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORDS", help="only systems with one of these in their names"
    )
    parser.add_argument("--level", help="of the native kernels; the best by default")
    parser.add_argument("--keep", type=Path, help="a directory for the files, which are used again")
    parser.add_argument("--slow", action="store_true", help="also what unpacks its experts on every call")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("SYSTEM", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = QUICK if arguments.quick else FULL
    if arguments.worker:
        system, path = arguments.worker
        with at(arguments.level):
            apart = llama_cpp_peer.logits_difference(path) if system == LOGITS else measure(system, path, size)
        print(json.dumps(apart))
        return
    with tempfile.TemporaryDirectory() as directory:
        result = compare(arguments, size, arguments.keep or Path(directory))
    print(json.dumps(result) if arguments.json else table(result))


def compare(arguments: argparse.Namespace, size: dict[str, int], directory: Path) -> dict[str, Any]:
    """All systems, in turn."""
    config = model_config(size)
    peers, systems = peers_here(arguments), {}
    for format in arguments.formats:
        for implementation in [*(["native"] if available() else []), *(["eager"] if arguments.slow else [])]:
            systems[f"manyhands {format} {implementation}"] = format
    systems |= {f"manyhands bfloat16 {way}, not packed": "plain" for way in ("auto", "grouped_mm")}
    if peers["transformers"].startswith("measured"):
        systems |= dict.fromkeys(PEERS, "plain")
    if peers["llama_cpp"].startswith("measured"):
        theirs = [llama_cpp_peer.FORMATS[format] for format in arguments.formats if format in llama_cpp_peer.FORMATS]
        systems |= {f"llama.cpp {format}": format for format in theirs}
    systems = {n: f for n, f in systems.items() if not arguments.only or any(word in n for word in arguments.only)}
    if not systems:
        sys.exit(f"--only {' '.join(arguments.only)}: no system has such a name")
    paths = {name: held(config, format, directory) for name, format in systems.items()}
    difference = None
    if "llama.cpp BF16" in paths and not arguments.only:
        held(config, "plain", directory)
        difference = run_apart(LOGITS, directory, arguments)
    units = unit_rates(arguments.threads)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    bandwidths = []
    for number in range(arguments.rounds):
        order = list(systems) if number % 2 == 0 else list(systems)[::-1]
        bandwidths.append(read_bandwidth(64 << 20 if arguments.quick else 1 << 30))
        for name in order:
            rounds[name].append(run_apart(name, paths[name], arguments))
            if not arguments.json:
                last = rounds[name][-1]
                print(
                    f"round {number + 1}  {name:42} decode {last['decode']:7.2f}  prefill {last['prefill']:8.1f} tok/s"
                )
    bandwidth = statistics.median(bandwidths)
    found: dict[str, dict[str, Any]] = {}
    level = arguments.level or default_level() if available() else "portable"
    for name, runs in rounds.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        read = bytes_per_token(config, name)
        found[name] = middle | {
            "decode_range": [min(run["decode"] for run in runs), max(run["decode"] for run in runs)],
            "bytes_per_token": read,
            "roof": bandwidth / read,
            "share_of_roof": middle["decode"] * read / bandwidth,
        }
        if name.startswith("manyhands") and (
            rate := units.get(unit(name.split()[1].replace("bfloat", "bf"), level) or "")
        ):
            found[name]["share_of_unit"] = middle["prefill"] * operations_per_token(config) / rate
    return {
        "sizes": size,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "native": missing() or level,
        "units": units,
        "read_bandwidth": bandwidth,
        "bandwidth_range": [min(bandwidths), max(bandwidths)],
        "peers": peers,
        "llama_cpp_logits": difference,
        "systems": found,
        "ratios": ratios(rounds),
    }


def peers_here(arguments: argparse.Namespace) -> dict[str, str]:
    """What is measured, with its version, or why it is not."""
    found = {}
    for name, package, installed in (
        ("llama_cpp", "llama-cpp-python", llama_cpp_peer.installed()),
        ("transformers", "transformers", importlib.util.find_spec("transformers") is not None),
    ):
        if not installed:
            found[name] = "not installed"
        else:
            word = "not measured" if arguments.without_peers else "measured"
            found[name] = f"{word}, {importlib.metadata.version(package)}"
    return found


def ratios(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Our native kernels over the nearest format of llama.cpp and over transformers' better half of the same round.

    Of decoding and of prefill: the median, the least and the largest over the rounds.
    """
    found = {}
    for format, theirs in llama_cpp_peer.FORMATS.items():
        ours = f"manyhands {format} native"
        for label, peers in ((f"llama.cpp {theirs}", [f"llama.cpp {theirs}"]), ("transformers' best", PEERS)):
            if ours not in rounds or not all(peer in rounds for peer in peers):
                continue
            pair = {}
            for key in ("decode", "prefill"):
                each = [run[key] / max(rounds[peer][i][key] for peer in peers) for i, run in enumerate(rounds[ours])]
                pair[key] = [statistics.median(each), min(each), max(each)]
            found[f"{ours} / {label}"] = pair
    return found


def run_apart(name: str, directory: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """One system in a process of its own."""
    command = [sys.executable, __file__, "--worker", name, str(directory), "--threads", str(arguments.threads)]
    command += ["--quick"] * arguments.quick + (["--level", arguments.level] if arguments.level else [])
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    )
    if done.returncode:
        sys.exit(f"{name}: exit status {done.returncode}: {(done.stderr.strip() or 'nothing said').splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@torch.inference_mode()
def measure(system: str, path: str, size: dict[str, int]) -> dict[str, float]:
    """Tokens per second of prefill and of decoding at batch 1, and the process's peak memory in bytes."""
    if system.startswith("llama.cpp"):
        model = llama_cpp_peer.LlamaCpp(Path(path), size["prefill"] + size["decode"] + 2)
        prefill, step = model.prefill, model.step
    else:
        prefill, step = transformers_model(system, path) if system in PEERS else our_model(system, path)
    ids = torch.randint(0, size["V"], (1, size["prefill"]), generator=torch.Generator().manual_seed(0))
    prefill(ids)  # the whole prompt: files are mapped, and every expert is to be in memory before the clock starts
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
    implementation = system.split()[2].rstrip(",")
    model = load_model(directory, experts_implementation="auto" if implementation == "native" else implementation)
    runner, memory = Runner(model), Caches(len(model.layers))
    cache = [memory.new()]

    def step(ids: Tensor) -> Tensor:
        batch = Batch([Row(ids[0].tolist(), cache[0])])
        return runner.run(batch).logits.argmax(-1, keepdim=True)

    def prefill(ids: Tensor) -> Tensor:
        cache[0].truncate(0)
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


def peak_memory() -> float:
    """Bytes that were resident at once."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def share(found: dict[str, Any]) -> str:
    """Of the unit, where that is known."""
    return f"{found['share_of_unit']:.0%}" if "share_of_unit" in found else "–"


def table(result: dict[str, Any]) -> str:
    """For people."""
    bandwidth, low, high = (b / 1e9 for b in (result["read_bandwidth"], *result["bandwidth_range"]))
    lines = [
        f"{result['threads']} threads, native: {result['native']}, torch {result['torch']}, medians of "
        f"{result['rounds']} rounds; read bandwidth {bandwidth:.1f} GB/s ({low:.1f}–{high:.1f})",
        f"llama-cpp-python: {result['peers']['llama_cpp']}; transformers: {result['peers']['transformers']}",
    ]
    if result["units"]:
        shown = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in result["units"].items())
        lines.append(f"bare instructions, G operations per second: {shown}")
    if difference := result["llama_cpp_logits"]:
        lines.append(
            f"llama.cpp BF16's logits differ from ours in float32 by {difference['relative']:.2%} relative; "
            f"{difference['same_argmax']:.0%} of greedy tokens are the same"
        )
    lines.append(
        f"{'':42} {'decode':>8} {'(range)':>15} {'MB/token':>9} {'of roof':>8} "
        f"{'prefill':>9} {'of unit':>8} {'peak GB':>8}"
    )
    for name, found in result["systems"].items():
        a, b = found["decode_range"]
        lines.append(
            f"{name:42} {found['decode']:8.2f} {f'({a:.1f}–{b:.1f})':>15} {found['bytes_per_token'] / 1e6:9.1f} "
            f"{found['share_of_roof']:8.1%} {found['prefill']:9.1f} {share(found):>8} {found['peak_memory'] / 1e9:8.2f}"
        )
    for name, pair in result["ratios"].items():
        shown = (f"{key} {middle:5.2f} ({low:.2f}–{high:.2f})" for key, (middle, low, high) in pair.items())
        lines.append(f"{name:42} {'   '.join(shown)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
