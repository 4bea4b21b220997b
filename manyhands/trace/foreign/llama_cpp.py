"""llama.cpp's `moe-trace` (pull request 28544): CSV lines `layer,expert` in the order in which they were computed.

    MOE_TRACE_OUT=trace.csv llama-moe-trace -m model.gguf -f prompt.txt -n 128

Neither tokens nor passes are named. Successive lines of one layer are the tokens of one batch, K lines each; a layer
that does not follow begins the next pass. K is the shortest such stretch, which a decoded token is; a file of nothing
but a prompt needs `num_experts_per_tok`. The example's first version read prompts wrong after each batch's first token:
take decoded tokens from those files, or record them again.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from manyhands.errors import DataError, UserError
from manyhands.trace.foreign.common import MOST_PAIRS, Block, Foreign, Hints, integer, lines
from manyhands.trace.part import Phase

_COLUMNS = "layer,expert"


def read(path: Path, hints: Hints) -> Foreign:
    """Raises `DataError`, naming the line."""
    layers, highest, shortest, count = set[int](), -1, MOST_PAIRS, 0
    for layer, experts in _stretches(path):
        layers.add(layer)
        highest, shortest, count = max(highest, *experts), min(shortest, len(experts)), count + 1
    if not layers:
        raise DataError(f"{path}: no lines {_COLUMNS} in it")
    K = hints.num_experts_per_tok or shortest
    if hints.num_experts_per_tok is None and count <= len(layers):
        raise UserError(f"{path}: holds one pass only, so that nothing says K: give --num-experts-per-tok")
    found = tuple(sorted(layers))
    if hints.layers is not None and not layers <= set(hints.layers):
        raise UserError(f"{path}: holds layer {min(layers - set(hints.layers))}, which was not named")
    E = hints.num_experts or max(highest + 1, K)
    if highest >= E:
        raise DataError(f"{path}: holds expert {highest}, and there are {E}")
    fields = {
        "layers": hints.layers or found,
        "num_experts": E,
        "num_experts_per_tok": K,
        "recorded": (),
        "source": f"imported from llama.cpp's moe-trace, {path.name}",
    }
    return Foreign(fields, lambda: _blocks(path, hints.layers or found, K))


def _blocks(path: Path, layers: tuple[int, ...], K: int) -> Iterator[Block]:
    position = step = 0
    waiting: dict[int, list[int]] = {}

    def made() -> Block:
        sizes = {len(experts) for experts in waiting.values()}
        if any(size % K for size in sizes):
            raise DataError(f"{path}: a pass with {sorted(sizes)[:4]} lines of a layer, which K = {K} does not divide")
        T = max(sizes) // K
        ids = np.full((T, len(layers), K), -1, np.int64)
        for layer, experts in waiting.items():
            rows = np.array(experts).reshape(-1, K)  # in the last layer only of tokens that are read: the last ones
            ids[T - len(rows) :, layers.index(layer)] = rows
        phase = Phase.DECODE if T == 1 and position else Phase.PREFILL
        at = position + np.arange(T)
        return {"expert_ids": ids, "sequence": 0, "position": at, "phase": phase, "step": step}

    for layer, experts in _stretches(path):
        if waiting and layer <= max(waiting):
            block = made()
            yield block
            position, step, waiting = position + len(block["expert_ids"]), step + 1, {}
        waiting[layer] = experts
    if waiting:
        yield made()


def _stretches(path: Path) -> Iterator[tuple[int, list[int]]]:
    """Successive lines of one layer."""

    def rows() -> Iterator[tuple[int, int]]:
        for number, line in lines(path):
            if line == _COLUMNS:
                continue
            where, cells = f"{path}, line {number}", line.split(",")
            if len(cells) != 2:
                raise DataError(f"{where}: {line[:80]!r} is not {_COLUMNS}")
            yield integer(cells[0], where, "layer", 1 << 12), integer(cells[1], where, "expert", (1 << 16) - 2)

    for layer, group in groupby(rows(), key=lambda row: row[0]):
        experts = []
        for _, expert in group:
            experts.append(expert)
            if len(experts) > MOST_PAIRS // 8:
                raise DataError(f"{path}: more than {MOST_PAIRS // 8:,} lines of layer {layer} in a row")
        yield layer, experts
