"""BigMoeOnEdge's `route_trace v1`: a CSV line for each expert of each token and layer, with sizes in front.

    # route_trace v1
    # model=gpt-oss-120b.gguf arch=gpt-oss n_layer=36 n_expert=128 n_expert_used=2
    # layer=0 expert_bytes=13219200 dense_bytes=23280128
    turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
    0,0,0,0,0,83,0.529533,0,13219200

A turn's prompt (phase 0) is there layer by layer and its `step` counts its tokens: they become one forward pass, as the
order of the lines says they were. A turn is a sequence; each decoded token (phase 1) is a pass.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.errors import DataError
from manyhands.trace.foreign.common import MOST_PAIRS, Block, Foreign, Hints, integer, lines
from manyhands.trace.part import Phase

_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"


def read(path: Path, hints: Hints) -> Foreign:
    """Raises `DataError`, naming the line."""
    about: dict[str, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    begun = False
    for number, line in lines(path):
        where = f"{path}, line {number}"
        if not line.startswith("#"):
            if line != _COLUMNS:
                raise DataError(f"{where}: expected the columns {_COLUMNS}")
            begun = True
            break
        values = dict(re.findall(r"(\w+)=(\S+)", line))
        if "layer" in values:
            layer = integer(values["layer"], where, "layer", (1 << 16) - 1)
            bytes_ = [integer(values.get(name, "0"), where, name, 1 << 40) for name in ("expert_bytes", "dense_bytes")]
            sizes[layer] = (bytes_[0], bytes_[1])
        about |= values
    if not begun:
        raise DataError(f"{path}: ends before the columns {_COLUMNS}")
    for name in ("n_expert", "n_expert_used"):
        if name not in about:
            raise DataError(f"{path}: no {name}= in its first lines")
    E = integer(about["n_expert"], str(path), "n_expert", (1 << 16) - 1)
    K = integer(about["n_expert_used"], str(path), "n_expert_used", (1 << 16) - 1)
    layers = tuple(sorted(layer for layer, (expert, _) in sizes.items() if expert))
    if not layers or not 0 < K <= E:
        raise DataError(f"{path}: {E} experts, {K} of them per token, {len(layers)} layers with expert_bytes")
    name = about.get("model", "").replace("\\", "/").rpartition("/")[2]
    fields: dict[str, Any] = {
        "layers": layers,
        "num_experts": E,
        "num_experts_per_tok": K,
        "record_bytes": tuple(sizes[layer][0] for layer in layers),
        "dense_bytes": sum(dense for _, dense in sizes.values()),
        "recorded": ("weights", "residency"),
        "source": f"imported from BigMoeOnEdge's route_trace v1 of {name or 'a model'}, {path.name}"[:1000],
    }
    return Foreign(fields, lambda: _blocks(path, layers, E, K))


_Row = tuple[int, int, int, int, int, int, float, int]
"""turn, phase, step, layer, slot, expert, weight, residency."""


def _rows(path: Path, layers: tuple[int, ...], E: int, K: int) -> Iterator[_Row]:
    places = {str(layer): at for at, layer in enumerate(layers)}
    for number, line in lines(path):
        if line.startswith("#") or line == _COLUMNS:
            continue
        cells = line.split(",")
        try:
            if len(cells) != 9:
                raise ValueError
            turn, phase, step, slot, expert, residency = (int(cells[i]) for i in (0, 1, 2, 4, 5, 7))
            weight, layer = float(cells[6]), places[cells[3]]
            if not (turn >= 0 and 0 <= phase <= 1 and step >= 0 and 0 <= slot < K and 0 <= expert < E):
                raise ValueError
            if not (turn < 1 << 31 and step < 1 << 31 and 0 <= residency < 256 and abs(weight) < 65504):
                raise ValueError
        except (ValueError, KeyError):
            raise DataError(f"{path}, line {number}: {line[:80]!r} does not fit {_COLUMNS}") from None
        yield turn, phase, step, layer, slot, expert, weight, residency


def _blocks(path: Path, layers: tuple[int, ...], E: int, K: int) -> Iterator[Block]:
    """A prompt, or one decoded token."""
    rows = _rows(path, layers, E, K)
    last, position = -1, 0
    passes = groupby(rows, key=lambda row: (row[0], row[1], row[2] if row[1] else 0))
    for number, ((turn, phase, step), group) in enumerate(passes):
        table = np.array(_gathered(group, path), dtype=np.float64)
        if turn != last:
            last, position = turn, 0
        tokens, at = np.unique(table[:, 2].astype(np.int64), return_inverse=True)
        T, layer, slot = len(tokens), table[:, 3].astype(int), table[:, 4].astype(int)
        ids = np.full((T, len(layers), K), -1, np.int64)
        weights, residency = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, np.uint8)
        ids[at, layer, slot] = table[:, 5].astype(np.int64)
        weights[at, layer, slot] = table[:, 6]
        residency[at, layer, slot] = table[:, 7].astype(np.uint8)
        if (ids >= 0).sum() != len(table):
            raise DataError(f"{path}: turn {turn}, phase {phase}, step {step}: a layer and slot stand there twice")
        yield {
            "expert_ids": ids,
            "weights": weights,
            "residency": residency,
            "sequence": turn,
            "position": position + np.arange(T),
            "phase": Phase.DECODE if phase else Phase.PREFILL,
            "step": number,
        }
        position += T


def _gathered(group: Iterator[_Row], path: Path) -> list[_Row]:
    found: list[_Row] = []
    for row in group:
        found.append(row)
        if len(found) > MOST_PAIRS // 8:
            raise DataError(f"{path}: more than {MOST_PAIRS // 8:,} lines of one prompt")
    return found
