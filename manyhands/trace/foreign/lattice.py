"""Lattice's JSON Lines: a record per layer and token.

    {"layer_idx": 0, "token_idx": 0, "selected_ids": [3, 17], "gate_weights": [0.61, 0.39]}

A token's number stands for its place in one text; where it starts again at a lower one, the next text begins. Whether
records go token by token or layer by layer does not matter. Nothing says which tokens shared a pass: with
`prompt_tokens` the first so many of each text did, else all of a text count as one pass.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.errors import DataError
from manyhands.trace.foreign.common import MOST_PAIRS, Block, Foreign, Hints, integer, records, text_blocks

_Record = tuple[int, int, list[int], list[float]]


def read(path: Path, hints: Hints) -> Foreign:
    """Raises `DataError`, naming the line."""
    layers, highest, widest = set[int](), -1, 0
    for layer, _, ids, _ in _records(path):
        layers.add(layer)
        highest, widest = max(highest, max(ids, default=-1)), max(widest, len(ids))
    if not layers or not widest:
        raise DataError(f"{path}: there is no token in it")
    E = hints.num_experts or max(highest + 1, widest)
    if highest >= E:
        raise DataError(f"{path}: holds expert {highest}, and there are {E}")
    found = tuple(sorted(layers))
    fields = {
        "layers": found,
        "num_experts": E,
        "num_experts_per_tok": widest,
        "recorded": ("weights",),
        "source": f"imported from lattice's records, {path.name}",
    }
    return Foreign(fields, lambda: _blocks(path, found, widest, hints.prompt_tokens))


def _blocks(path: Path, layers: tuple[int, ...], K: int, prompt: int | None) -> Iterator[Block]:
    places = {layer: at for at, layer in enumerate(layers)}
    step = 0
    for sequence, text in enumerate(_texts(path)):
        T = 1 + max(token for token, _ in text)
        if T * len(layers) * K > MOST_PAIRS:
            raise DataError(f"{path}: a text of {T:,} tokens is too long")
        ids = np.full((T, len(layers), K), -1, np.int64)
        weights = np.zeros(ids.shape, np.float32)
        for (token, layer), (chosen, gates) in text.items():
            ids[token, places[layer], : len(chosen)] = chosen
            weights[token, places[layer], : len(chosen)] = gates
        seen = np.unique([token for token, _ in text])
        for block in text_blocks([(str(path), ids[seen])], [prompt]):
            block |= {"sequence": sequence, "position": seen, "step": step + block["step"], "weights": weights[seen]}
            yield block
            step = int(np.max(block["step"])) + 1


def _texts(path: Path) -> Iterator[dict[tuple[int, int], tuple[list[int], list[float]]]]:
    """By token and layer. The next text begins where a pair comes again."""
    text: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    for layer, token, ids, weights in _records(path):
        if (token, layer) in text:
            yield text
            text = {}
        text[token, layer] = ids, weights
        if len(text) > MOST_PAIRS // 64:
            raise DataError(f"{path}: more than {MOST_PAIRS // 64:,} records of one text")
    if text:
        yield text


def _records(path: Path) -> Iterator[_Record]:
    for where, record in records(path):
        layer = integer(record.get("layer_idx"), where, "layer_idx", (1 << 16) - 1)
        token = integer(record.get("token_idx"), where, "token_idx", MOST_PAIRS)
        ids = [integer(one, where, "selected_ids", (1 << 16) - 2) for one in _list(record, "selected_ids", where)]
        weights = _list(record, "gate_weights", where) if "gate_weights" in record else [0.0] * len(ids)
        if len(weights) != len(ids) or not all(type(w) in (int, float) and abs(w) < 65504 for w in weights):
            raise DataError(f"{where}: gate_weights are not a number for each of {len(ids)} selected_ids")
        yield layer, token, ids, weights


def _list(record: dict[str, Any], name: str, where: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list) or len(value) > 1 << 12:
        raise DataError(f"{where}: {name} is not a list of at most 4,096")
    return value
