"""Megatron-LM's router tracer: a directory of `router_trace_rankN.jsonl`, a record per step, layer and rank.

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 1, "rank": 0, "num_tokens": 2, "topk": 2,
     "top_indices": [[5, 1], [0, 7]]}

Several records of one step and layer (micro-batches) follow one another. Each rank is a sequence, whose tokens are
numbered as they come; nothing says which text a token is of, or what it was. Layers of multi-token prediction
(`block` mtp) are left out. With a map instead of indices Megatron orders a token's experts by number, not by score.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.errors import DataError
from manyhands.trace.foreign.common import MOST_PAIRS, Block, Foreign, Hints, integer, records
from manyhands.trace.part import Array, Phase

_FILE = re.compile(r"router_trace_rank(\d+)\.jsonl")
_MOST_RANKS = 4096
_MOST_EXPERT = (1 << 16) - 2


def read(path: Path, hints: Hints) -> Foreign:
    """The directory, or one rank's file. Raises `DataError`, naming file and line."""
    files = _files(path)
    layers, highest, widest = set[int](), -1, 0
    for file in files:
        for _, layer, ids in _decisions(file):
            layers.add(layer)
            widest = max(widest, ids.shape[1])
            highest = max(highest, int(ids.max(initial=-1)))
    if not layers:
        raise DataError(f"{path}: no record of a decoder's layer in it")
    E = hints.num_experts or max(highest + 1, widest, 1)
    if highest >= E:
        raise DataError(f"{path}: holds expert {highest}, and there are {E}")
    found = tuple(sorted(layers))
    fields = {
        "layers": found,
        "num_experts": E,
        "num_experts_per_tok": widest,
        "recorded": (),
        "source": f"imported from Megatron-LM's router trace of {len(files)} ranks, {path.name}",
    }
    return Foreign(fields, lambda: _blocks(files, found, widest))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = {int(match[1]): entry for entry in path.iterdir() if (match := _FILE.fullmatch(entry.name))}
    if not found:
        raise DataError(f"{path}: no router_trace_rankN.jsonl in it")
    if len(found) > _MOST_RANKS:
        raise DataError(f"{path}: {len(found):,} ranks; at most {_MOST_RANKS:,}")
    return [found[rank] for rank in sorted(found)]


def _blocks(files: list[Path], layers: tuple[int, ...], K: int) -> Iterator[Block]:
    """Step by step the tokens of each rank: they shared it."""
    each = [_steps(file, layers, K) for file in files]
    heads = [next(steps, None) for steps in each]
    positions = [0] * len(files)
    while left := [head[0] for head in heads if head is not None]:
        step = min(left)
        for rank, head in enumerate(heads):
            if head is None or head[0] != step:
                continue
            at = positions[rank] + np.arange(len(head[1]))
            block = {"sequence": rank, "position": at, "phase": Phase.TRAINING, "step": step}
            yield block | {"expert_ids": head[1]}
            positions[rank] += len(head[1])
            heads[rank] = after = next(each[rank], None)
            if after is not None and after[0] <= step:
                raise DataError(f"{files[rank]}: step {after[0]} after step {step}")


def _steps(file: Path, layers: tuple[int, ...], K: int) -> Iterator[tuple[int, Array]]:
    """Of one rank, [T, L, K] of each step."""
    for step, group in groupby(_decisions(file), key=lambda decision: decision[0]):
        found: dict[int, list[Array]] = {layer: [] for layer in layers}
        pairs = 0
        for _, layer, ids in group:
            found[layer].append(ids)
            pairs += ids.size
            if pairs > MOST_PAIRS:
                raise DataError(f"{file}: step {step} has more than {MOST_PAIRS:,} decisions")
        T = max(sum(map(len, each)) for each in found.values())
        ids_TLK = np.full((T, len(layers), K), -1, np.int64)
        for at, layer in enumerate(layers):
            if not found[layer]:
                continue
            first = 0
            for ids in found[layer]:
                ids_TLK[first : first + len(ids), at, : ids.shape[1]] = ids
                first += len(ids)
            if first != T:
                raise DataError(f"{file}: step {step} has {first} tokens of layer {layer} and {T} of another")
        yield step, ids_TLK


def _decisions(file: Path) -> Iterator[tuple[int, int, Array]]:
    """Step, layer and ids [T, K] of each record."""
    for where, record in records(file):
        if record.get("block", "decoder") != "decoder":
            continue
        step = integer(record.get("step"), where, "step")
        layer = integer(record.get("layer"), where, "layer", (1 << 16) - 1)
        yield step, layer, _indices(record.get("top_indices"), where)


def _indices(value: Any, where: str) -> Array:
    if value == []:
        return np.zeros((0, 0), np.int64)
    try:
        ids = np.array(value)
    except ValueError:  # rows of several lengths
        ids = np.zeros(0)
    if ids.ndim != 2 or ids.dtype.kind != "i" or int(ids.min()) < -1 or int(ids.max()) > _MOST_EXPERT:
        raise DataError(f"{where}: top_indices is not a list of a list of experts for each token")
    return ids
