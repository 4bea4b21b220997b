"""GGUF files spoilt at random: each gives a model that runs, or one line; soon, in little memory.

python scripts/gguf_mutations.py 10000
"""

import copy
import random
import resource
import struct
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from manyhands.checkpoint.model import load
from manyhands.errors import ManyhandsError

from .gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U8, U32, U64, File, Key, Raw, byte_level, file_of, sentencepiece
from .hostile import make

SMALL = {"vocab_size": 288, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
GQA = {"attention": {"num_attention_heads": 2, "head_dim": 16}}
MLA = {
    "attention": {
        "kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "latent_norm_eps": 1e-6, "q_lora_rank": 16,
    },
    "rope": {"interleave": True},
}  # fmt: skip
MOE = {"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 32}
V3 = {**MOE, "router": {**MOE["router"], "score": "sigmoid", "bias": True}, "first_k_dense_replace": 1}
NUMBERS = [0, 1, 2, 3, 7, 31, 32, 64, 255, 256, 4096, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
TEXTS = ["", "x", "llama", "deepseek2", "qwen3moe", "gpt2", "yarn", "linear", "<0x-1>", "▁", "\0", "é" * 80, "{" * 3000]


def bases(folder: Path) -> list[File]:
    """Three good files: F32 and Q8_0, both kinds of tokenizer, with and without latent attention."""
    mixtral = make(folder / "mixtral", **SMALL, **GQA, moe=MOE)
    v3 = make(folder / "v3", family="deepseek_v3", **SMALL, **MLA, moe=V3)
    dense = make(folder / "llama", family="llama", **SMALL, **GQA, moe=None)
    return [
        file_of(mixtral, "F32", byte_level()),
        file_of(v3, "Q8_0", sentencepiece()),
        file_of(dense, "Q4_0", byte_level("llama-bpe")),
    ]


def edited(file: File, rng: random.Random) -> bytes:
    """One to three entries of the header replaced, moved, doubled or left out, the rest in order around them."""
    file = copy.deepcopy(file)
    for _ in range(rng.randint(1, 3)):
        rng.choice((_key, _key, _tensor, _whole))(file, rng)
    try:
        return file.bytes()
    except (struct.error, OverflowError, ValueError, TypeError):
        return b"GGUF"


def _key(file: File, rng: random.Random) -> None:
    if not file.keys or rng.random() < 0.1:
        arch = rng.choice(("llama", "deepseek2", "general", "tokenizer.ggml", "split"))
        names = ("rope.scaling.type", "rope.scaling.factor", "alignment", "count", "no", "merges", "surprise", "pre")
        file.keys.append(Key(f"{arch}.{rng.choice(names)}", *_value(rng)))
        return
    key = rng.choice(file.keys)
    what = rng.random()
    if what < 0.15:
        file.keys.remove(key)
    elif what < 0.2:
        file.keys.append(key)
    elif what < 0.25:
        key.name = rng.choice(TEXTS)
    elif what < 0.5 and isinstance(key.value, list) and key.value:
        place = rng.randrange(len(key.value))
        kind = rng.random()
        if kind < 0.3:
            del key.value[place:]
        elif kind < 0.5:
            key.value[place] = key.value[rng.randrange(len(key.value))]
        else:
            key.value[place] = rng.choice(TEXTS) if key.kind == (ARRAY, STRING) else rng.choice((-1, 0, 7, 2**30))
    elif what < 0.7 and key.kind == U32:
        key.value = max(0, min(key.value + rng.choice((-1, 1, 2, 31, -16)), 2**32 - 1))
    else:
        key.kind, key.value = _value(rng)


def _value(rng: random.Random) -> tuple[Any, Any]:
    number = rng.choice(NUMBERS)
    return rng.choice(
        (
            (U32, number & (2**32 - 1)),
            (U64, number),
            (I32, -1),
            (F32, rng.choice((0.0, -1.0, 1e-40, 1e38, float("nan"), float("inf"), 0.5))),
            (BOOL, rng.choice((0, 1, 2))),
            (STRING, rng.choice(TEXTS)),
            ((ARRAY, U32), [number & 255] * rng.randrange(5)),
            ((ARRAY, STRING), [rng.choice(TEXTS) for _ in range(rng.randrange(5))]),
            (0, Raw(struct.pack("<IIQ", ARRAY, rng.choice((U8, STRING, ARRAY, F32, 99)), number))),
            (0, Raw(struct.pack("<I", rng.choice((13, 99, 2**32 - 1))))),
            (0, Raw(struct.pack("<IQ", STRING, number))),
        )
    )


def _tensor(file: File, rng: random.Random) -> None:
    if not file.tensors:
        return
    tensor = rng.choice(file.tensors)
    what = rng.random()
    if what < 0.1:
        file.tensors.remove(tensor)
    elif what < 0.2:
        file.tensors.insert(rng.randrange(len(file.tensors) + 1), copy.copy(tensor))
    elif what < 0.3:
        tensor.name = rng.choice((*TEXTS, rng.choice(file.tensors).name, "blk.99999999999.attn_q.weight"))
    elif what < 0.5:
        tensor.type = rng.choice((*range(45), 2**32 - 1))
    elif what < 0.7:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif what < 0.8:
        rng.choice((tensor.dims.reverse, lambda: tensor.dims.append(1), tensor.dims.pop))()
    elif what < 0.9:
        tensor.offset = rng.choice(NUMBERS)
    else:
        tensor.data = rng.choice((tensor.data[:-4], tensor.data + bytes(32), rng.randbytes(len(tensor.data))))


def _whole(file: File, rng: random.Random) -> None:
    what = rng.random()
    if what < 0.2:
        file.version = rng.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
    elif what < 0.5:
        file.counts = (rng.choice((*NUMBERS, len(file.tensors))), rng.choice((*NUMBERS, len(file.keys))))
    elif what < 0.6:
        file.alignment = rng.choice((1, 8, 64))
    elif what < 0.8:
        rng.shuffle(file.tensors)
    else:
        rng.shuffle(file.keys)


def scrambled(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut out, doubled, moved or added; mostly in the header."""
    raw = bytearray(data)
    end = min(len(raw), 12_000) if rng.random() < 0.8 else len(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(end, len(raw))))
        what = rng.random()
        if what < 0.4:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif what < 0.6:
            size = rng.choice((4, 8))
            raw[at : at + size] = (rng.choice(NUMBERS) & (2 ** (8 * size) - 1)).to_bytes(size, "little")
        elif what < 0.7:
            del raw[at : at + rng.randint(1, 64)]
        elif what < 0.8:
            raw[at:at] = raw[at : at + rng.randint(1, 64)]
        elif what < 0.9:
            raw[at:at] = rng.randbytes(rng.randint(1, 64))
        else:
            del raw[at:]
        if not raw:
            break
    return bytes(raw)


def fuzz(rounds: int, seed: int = 0, seconds: float = 2.0, memory: int = 200 << 10) -> Counter[str]:
    """What became of `rounds` spoilt files. Anything but a model or one line is an `AssertionError` that says which.

    `seconds` of processor time each may take, and how much the process may grow in all (KiB).
    """
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        files = bases(Path(folder))
        path = Path(folder) / "model.gguf"
        for file in files:
            path.write_bytes(file.bytes())
            load(path)  # the good ones are good, and what a first call costs is paid
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(rounds):
            rng = random.Random(f"{seed} {number}")
            file = rng.choice(files)
            data = edited(file, rng) if rng.random() < 0.6 else scrambled(file.bytes(), rng)
            path.unlink()  # a model that still maps the last one keeps it
            path.write_bytes(data)
            try:
                outcomes[_outcome(path, seconds)] += 1
            except Exception as error:
                wrong.append(f"seed {seed}, round {number}: {type(error).__name__}: {str(error)[:200]}")
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < memory, (seed, number, grown)
    assert not wrong, (len(wrong), wrong[:10])
    return outcomes


def _outcome(path: Path, seconds: float) -> str:
    start = time.process_time()
    try:
        model, tokenizer = load(path)
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long))
        tokenizer.decode(tokenizer.encode("hello <s> 12"))
        outcome = "a model"
    except ManyhandsError as error:
        said, outcome = str(error), type(error).__name__
        assert len(said) < 1000 and said.isprintable() and "model.gguf" in said, said
    assert time.process_time() - start < seconds, time.process_time() - start
    return outcome
