"""Files spoilt at random, and files as large as they may be: a model that runs, or one line; soon, in little memory.

More rounds by hand: python -c "from tests.checkpoint.test_hostile_fuzz import fuzz; fuzz(50_000)"
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from manyhands.checkpoint.model import load_model
from manyhands.errors import ManyhandsError

from .hostile import FITTING, GATE, INDEX, NORM, SINGLE, MiB, copy, join, make, nested

ROUNDS = 500
VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 5, 16, 4096, 2**24, 2**31, 2**63, 10**30, -(2**64)),
    *(0.0, 0.5, -0.5, 1e-300, 5e-324, 1.0000000001, 1e6, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "4", "\ud800", "\0", "../x.safetensors", "default", "linear", "yarn", "llama3", "dynamic"),
    *("sliding_attention", "full_attention", "F64", "BF16", "F8_E4M3", "I8", NORM, GATE, *FITTING, "grok-1"),
    *([], {}, [[]], [{}], [0], [1, 0], [16, 16], [0, 0], [0, 64], nested(700), {"rope_type": "yarn", "factor": 4.0}),
    *({"quant_method": "fp8"}, {"quant_method": "mxfp4"}, {"rope_type": "linear", "factor": 1e9}),
]
NAMES = [
    *("sliding_window", "layer_types", "mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "n_group"),
    *("topk_group", "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "factor"),
    *("max_position_embeddings", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "truncate"),
    *("quantization_config", "num_nextn_predict_layers", "attention_bias", "qkv_bias", "norm_topk_prob", "type"),
    *("dtype", "shape", "data_offsets", "weight_map", "model_type", "text_config", "__metadata__", "surprise"),
]


def any_value(rng):
    return json.loads(json.dumps(rng.choice(VALUES)))  # a copy: what is put in may be edited in turn


def places(value):
    """Every object and list inside a JSON value."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from places(inner)


def edited(text, rng):
    """The JSON in `text` with one to three values replaced, added, moved or left out, or a name twice."""
    try:
        root = json.loads(text)
    except ValueError:
        return text
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(list(places(root)) or [{}])
        names = list(place) if isinstance(place, dict) else list(range(len(place)))
        kind = rng.random()
        if isinstance(place, dict) and (kind < 0.25 or not names):
            place[rng.choice(NAMES)] = any_value(rng)
        elif not names:
            place.append(any_value(rng))
        elif kind < 0.4:
            del place[rng.choice(names)]
        elif kind < 0.6:
            a, b = rng.choice(names), rng.choice(names)
            place[a], place[b] = place[b], place[a]
        elif kind < 0.7 and isinstance(place, dict):
            place[rng.choice(names) + "x"] = place.pop(rng.choice(names))
        else:
            name = rng.choice(names)
            old = place[name]
            number = type(old) is int and rng.random() < 0.5
            place[name] = old + rng.choice((-1, 1, 4, 64, -64)) if number else any_value(rng)
    return json.dumps(root).encode()


def scrambled(data, rng):
    """Bits flipped, bytes cut out, doubled or overwritten."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 8, 64, 500))
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def spoilt(path, rng):
    """One file's content, spoilt: all of its header or description, or its length."""
    raw = path.read_bytes()
    if path.suffix == ".json":
        return edited(raw, rng) if rng.random() < 0.7 else scrambled(raw, rng)
    end = 8 + int.from_bytes(raw[:8], "little")
    header, data = raw[8:end], raw[end:]
    kind = rng.random()
    if kind < 0.6:
        header = edited(header, rng)
        return len(header).to_bytes(8, "little") + header + data
    if kind < 0.8:
        header = scrambled(header, rng)
        return len(header).to_bytes(8, "little") + header + data
    if kind < 0.9:
        return scrambled(raw[:end], rng) + data
    return raw[: rng.randrange(len(raw))] if rng.random() < 0.5 else raw + rng.randbytes(rng.choice((1, 8, 100)))


def fuzz(rounds, seed=0):
    """Spoil one or two files at a time; count how each round ends."""
    rng, ends = random.Random(seed), Counter()
    ids = torch.arange(3)[None]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        directories = [make(folder / "mixtral"), make(folder / "shards", shard_size=16_000)]
        directories += [make(folder / family, family=family, **fields) for family, fields in FITTING.items()]
        files = {d: [p for p in d.iterdir() if p.name == "config.json" or "model" in p.name] for d in directories}
        kept = {path: path.read_bytes() for paths in files.values() for path in paths}
        for number in range(rounds):
            directory = rng.choice(directories)
            chosen = rng.sample(files[directory], rng.choice((1, 1, 1, 2)))
            for path in chosen:
                path.write_bytes(spoilt(path, rng))
            start = time.process_time()
            try:
                load_model(directory)(ids)
                ends["runs"] += 1
            except ManyhandsError as error:
                assert str(error).isprintable() and len(str(error)) < 1000, error
                ends[type(error).__name__] += 1
            except BaseException as error:
                error.add_note(f"round {number}: {[(p.name, p.read_bytes()[:3000]) for p in chosen]}")
                raise
            assert time.process_time() - start < 5, number
            for path in chosen:
                path.write_bytes(kept[path])
    return ends


@pytest.mark.filterwarnings("default")
def test_random_damage_is_a_model_or_one_line():
    ends = fuzz(ROUNDS)
    assert ends["runs"] > 5 and ends["CheckpointError"] > ROUNDS / 2, ends
    assert set(ends) <= {"runs", "CheckpointError", "ConfigError"}, ends


def forest(size):
    """As many lists as fit."""
    tree = b"[" * 400 + b"]" * 400
    return b'{"a": [' + b",".join([tree] * (size // (len(tree) + 1) - 1)) + b"]}"


def entries(count, size):
    """A header of `count` tensors, which take no room, and the longest names that `size` allows."""
    entry = '"%s%06d":{"dtype":"U8","shape":[0,1],"data_offsets":[0,0]}'
    name = "n" * min(500, size // count - len(entry) - 5)
    return ("{" + ",".join(entry % (name, number) for number in range(count)) + "}").encode()


def shard_map(count, size):
    name = "n" * (size // count - 40)
    return (
        '{"weight_map": {'
        + ",".join(f'"{name}{number:06d}": "{number:06d}.safetensors"' for number in range(count))
        + "}}"
    ).encode()


HEADER, DESCRIPTION = 16 * MiB, 32 * MiB
LARGE = {
    "header of lists": (SINGLE, lambda: forest(HEADER)),
    "header of few lists": (SINGLE, lambda: forest(MiB // 3)),
    "header of objects": (SINGLE, lambda: b'{"a": [' + b",".join([b'{"a":1}'] * 190_000) + b"]}"),
    "header of tensors": (SINGLE, lambda: entries(30_000, HEADER)),
    "header of one name": (SINGLE, lambda: b"{" + b",".join([b'"a":0'] * 390_000) + b"}"),
    "last name twice": (SINGLE, lambda: b"{" + b",".join(b'"%06d":0' % (n % 389_999) for n in range(390_000)) + b"}"),
    "name of 50 MB": (SINGLE, lambda: b'{"' + b"a" * 50_000_000 + b'": 1}'),
    "name of 16 MiB": (SINGLE, lambda: b'{"' + b"a" * (HEADER - 20) + b'": 1}'),
    "value of 16 MiB": (SINGLE, lambda: b'{"a": "' + b"a" * (HEADER - 20) + b'"}'),
    "wide name": (SINGLE, lambda: b'{"' + b"a" * (HEADER - 40) + "\N{GRINNING FACE}".encode() + b'": 1}'),
    "number of 16 MiB": (SINGLE, lambda: b'{"a": ' + b"1" * (HEADER - 20) + b"}"),
    "brackets only": (SINGLE, lambda: b"[" * HEADER),
    "index of lists": (INDEX, lambda: forest(DESCRIPTION)),
    "index of shards": (INDEX, lambda: shard_map(250_000, DESCRIPTION - MiB)),
    "index of one string": (INDEX, lambda: b'{"weight_map": "' + b"a" * (DESCRIPTION - 40) + b'"}'),
    "index of a wide string": (INDEX, lambda: b'{"a": "' + b"a" * (DESCRIPTION - 40) + b'\\ud83d\\ude00"}'),
    "index too large": (INDEX, lambda: b'{"weight_map": {}}' + b" " * DESCRIPTION),
    "manifest of objects": ("manifest.json", lambda: b'{"files": [' + b",".join([b"{}"] * (4 * MiB // 3 - 9)) + b"]}"),
}

MEASURE = """
import json, sys, time
from pathlib import Path
from manyhands.checkpoint.model import load_model
from manyhands.errors import CheckpointError

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024

try: load_model("/nowhere")
except CheckpointError: pass
for line in sys.stdin:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before, start = memory("VmRSS"), time.process_time()
    try: outcome = repr(load_model(line.strip()))
    except CheckpointError as error: outcome = f"{error}"
    print(json.dumps([outcome, time.process_time() - start, memory("VmHWM") - before]), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")
def test_the_largest_files_cost_little(tmp_path):
    """In a process of its own, each peak against the memory before it."""
    good = make(tmp_path / "good")
    command = [sys.executable, "-c", MEASURE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        found = {}
        for case, (file, make_content) in LARGE.items():
            directory = copy(good, tmp_path / case.replace(" ", "-"))
            if file == SINGLE:
                join(directory / SINGLE, make_content(), b"")
            else:
                (directory / file).write_bytes(make_content())
                if file == INDEX:  # beside it the single file would be refused first
                    (directory / SINGLE).unlink()
            process.stdin.write(f"{directory}\n")
            found[case] = json.loads(process.stdout.readline())
            (directory / file).unlink()
        process.stdin.close()
    for case, (outcome, seconds, megabytes) in found.items():
        assert (
            re.search(r"/[\w.-]+\.(safetensors|json): ", outcome) and outcome.isprintable() and len(outcome) < 1000
        ), (case, outcome)
        assert seconds < 20 and megabytes < 200, (case, seconds, megabytes)
