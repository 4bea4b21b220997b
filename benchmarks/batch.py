"""Many sequences at once: are their numbers their own, and what do they gain? `python benchmarks/batch.py`.

*Invariance*: prompts of 12 to 40 tokens through a packed model alone, and 2 to 64 at a time, in chunks of 1, 7, 32 and
512 tokens, in a rectangle padded left and right, at each level of this CPU: how many rows of logits equal those of the
prompt alone bit for bit, and the largest difference. By default a small random model of OLMoE's kind in int8 and int4.

*Decoding*: one token for each of 1 to 32 sequences a step, of `decode.py`'s model (`olmoe-4L`): tokens per second, over
those at batch 1, and the share of the read bandwidth, counting each expert that a step reads once. llama.cpp does the
same where it is installed.

B sequences, S tokens of one, V vocabulary.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp_peer
import torch
from decode_work import FULL, QUICK, bytes_per_token, held, model_config
from machine import at, read_bandwidth
from torch import Tensor

from manyhands.checkpoint.model import load_model
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.runner import Runner
from manyhands.kernels.native import levels
from manyhands.models import Decoder

BATCHES, CHUNKS = (1, 2, 4, 8, 16, 32, 64), (1, 7, 32, 512)
SMALL = QUICK | {"L": 2, "V": 512}


def main() -> None:
    """Parse, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["invariance", "decode"], help="invariance, decode (both)")
    parser.add_argument("--model", type=Path, help="a checkpoint for the invariance instead of the small models")
    parser.add_argument("--quick", action="store_true", help="decoding with a small model")
    parser.add_argument("--formats", nargs="*", default=["int4", "int8", "bf16"], choices=["int4", "int8", "bf16"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--level", choices=levels(), help="of decoding; the best by default")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, help="a directory for decode.py's files, which are used again")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"threads": arguments.threads, "torch": torch.__version__}
    if "invariance" in arguments.what:
        result["invariance"] = invariance(arguments)
    if "decode" in arguments.what:
        with tempfile.TemporaryDirectory() as directory:
            result["decode"] = decoding(arguments, arguments.keep or Path(directory))
    if arguments.json:
        print(json.dumps(result))


def invariance(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each model at each level."""
    found = []
    for name, model in models(arguments):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(12, 41, (max(BATCHES),), generator=generator).tolist()
        prompts = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
        with at(levels()[-1]):
            scored = [score(model, [prompt], left=False)[0] for prompt in prompts]
            whole = [logits for i in range(len(prompts)) for _, logits in in_chunks(model, prompts, [i], 512)]
        for level in levels():
            with at(level):
                for way, rows in ways(model, prompts):
                    alone = scored if "padded" in way else whole
                    pairs = [(logits.float(), alone[i].float()) for i, logits in rows]
                    equal = sum(int((a == b).all(-1).sum()) for a, b in pairs)
                    row = {"model": name, "level": level, "way": way, "equal": equal}
                    row |= {"rows": sum(len(a) for a, _ in pairs)}
                    row |= {"difference": max(float((a - b).abs().max()) for a, b in pairs)}
                    found.append(row)
            here = [row for row in found if row["model"] == name and row["level"] == level]
            rows, same = sum(row["rows"] for row in here), sum(row["equal"] for row in here)
            worst = max(here, key=lambda row: row["difference"])
            line = f"{name}, {level:12} {same} of {rows} rows equal those alone at {levels()[-1]}, bit for bit"
            if same < rows:
                line += f"; at worst {worst['way']}: {worst['difference']:.2g}"
            if not arguments.json:
                print(line, flush=True)
        apart = max(float((a[-1:].float() - b.float()).abs().max()) for a, b in zip(scored, whole, strict=True))
        found.append({"model": name, "way": "scoring against generating", "difference": apart})
        if not arguments.json:
            print(f"{name}: a prompt's last logits, scored, differ from those that generate by up to {apart:.2g}")
    return found


def models(arguments: argparse.Namespace) -> Iterator[tuple[str, Decoder]]:
    """The checkpoint, or small random models."""
    if arguments.model is not None:
        yield arguments.model.name, load_model(arguments.model)
        return
    for format in arguments.formats:
        if format == "bf16":
            continue  # many rows of bf16 weights are rounded, unless `exact` is asked for
        with tempfile.TemporaryDirectory() as directory:
            yield format, load_model(held(model_config(SMALL), format, Path(directory)))


def ways(model: Decoder, prompts: list[list[int]]) -> Iterator[tuple[str, list[tuple[int, Tensor]]]]:
    """What is done, and (prompt, logits [its last few positions, V])."""
    for B in BATCHES:
        groups = [list(range(i, i + B)) for i in range(0, len(prompts), B)]
        groups = groups[: max(1, 8 // B)]  # each way sees 8 prompts or more
        for chunk in CHUNKS:
            rows = [pair for group in groups for pair in in_chunks(model, prompts, group, chunk)]
            yield f"B {B}, chunks of {chunk}", rows
        for left in (False, True):
            rows = []
            for group in groups:
                rows += list(zip(group, score(model, [prompts[i] for i in group], left), strict=True))
            yield f"B {B}, padded {'left' if left else 'right'}", rows


def in_chunks(model: Decoder, prompts: list[list[int]], group: list[int], chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Prompts beside each other, so many tokens of each at a time; each leaves when it is done."""
    runner, memory, done = Runner(model), Caches(len(model.layers)), dict.fromkeys(group, 0)
    caches = {i: memory.new() for i in group}
    while left := [i for i in group if done[i] < len(prompts[i])]:
        out = runner.run(Batch([Row(prompts[i][done[i] : done[i] + chunk], caches[i]) for i in left])).logits
        for row, i in enumerate(left):
            done[i] += chunk
            if done[i] >= len(prompts[i]):
                yield i, out[row : row + 1].clone()


@torch.inference_mode()
def score(model: Decoder, prompts: list[list[int]], left: bool) -> list[Tensor]:
    """Logits [S, V] of each prompt, in one rectangle."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for r, prompt in enumerate(prompts):
        first = longest - len(prompt) if left else 0
        ids[r, first : first + len(prompt)], mask[r, first : first + len(prompt)] = torch.tensor(prompt), True
    logits = model.head(Runner(model).score(ids, mask).states)
    return [logits[r][mask[r]] for r in range(len(prompts))]


def decoding(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Each format, ours and llama.cpp's in turn."""
    size = QUICK if arguments.quick else FULL
    bandwidth = read_bandwidth(64 << 20 if arguments.quick else 1 << 30)
    found: dict[str, Any] = {"read_bandwidth": bandwidth}
    peers = not arguments.without_peers and llama_cpp_peer.installed()
    say = (lambda line: None) if arguments.json else (lambda line: print(line, flush=True))
    say(f"\ndecoding, {arguments.threads} threads; read bandwidth {bandwidth / 1e9:.1f} GB/s; "
        f"llama.cpp: {'measured' if peers else 'not measured'}")  # fmt: skip
    config = model_config(size)
    for format in arguments.formats:
        model = load_model(held(config, format, directory))
        theirs = llama_cpp_peer.FORMATS[format]
        first: dict[str, float] = {}
        for B in arguments.batches:
            prompts = torch.randint(size["V"], (B, 32), generator=torch.Generator().manual_seed(B)).tolist()
            with at(arguments.level) as level:
                seconds, experts = our_steps(model, prompts, arguments.steps)
            row = {"level": level, "tokens_per_s": B / seconds, "experts": experts}
            row["ratio"] = row["tokens_per_s"] / first.setdefault("ours", row["tokens_per_s"])
            row["share_of_roof"] = bytes_per_token(config, f"manyhands {format}", experts) / seconds / bandwidth
            line = f"{format:5} {level:12} B {B:3}  {B / seconds:7.1f} tok/s  {row['ratio']:5.2f} x   {experts:4.1f} "
            line += f"experts a layer, {row['share_of_roof']:4.0%} of the read roof"
            if peers:
                file = held(config, theirs, directory)
                row["llama_cpp"] = B / llama_cpp_peer.many_steps(file, prompts, arguments.steps)
                row["llama_cpp_ratio"] = row["llama_cpp"] / first.setdefault("theirs", row["llama_cpp"])
                line += f"; llama.cpp {theirs} {row['llama_cpp']:7.1f} tok/s, {row['llama_cpp_ratio']:4.2f} x"
            found[f"{format} {B}"] = row
            say(line)
        del model
    return found


def our_steps(model: Decoder, prompts: list[list[int]], steps: int) -> tuple[float, float]:
    """Seconds of the median step with a token for each prompt, and how many experts of a layer it reads."""
    runner, memory = Runner(model), Caches(len(model.layers))
    caches = [memory.new() for _ in prompts]
    out = runner.run(Batch([Row(prompt, cache) for prompt, cache in zip(prompts, caches, strict=True)]))
    times, distinct = [], []
    for _ in range(steps + 2):
        tokens = out.logits.argmax(-1).tolist()
        started = time.perf_counter()
        out = runner.run(Batch([Row([token], cache) for token, cache in zip(tokens, caches, strict=True)]))
        times.append(time.perf_counter() - started)
        distinct += [len(set(routing.expert_ids.flatten().tolist())) for routing in out.routed.layers.values()]
    return statistics.median(times[2:]), statistics.mean(distinct)


if __name__ == "__main__":
    main()
