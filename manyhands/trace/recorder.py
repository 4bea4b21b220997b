"""Recording a trace: rows are gathered in memory and become a part when there are enough.

with Recorder("trace", layers=[1, 2], num_experts=64, num_experts_per_tok=8) as recorder:
    recorder.add(out.routings, token_ids, sequence=0, position=range(T), phase=Phase.PREFILL, step=0)

T tokens   L sparse layers   K experts per token   E experts
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import safetensors.numpy

from manyhands.checkpoint.manifest import MANIFEST, Entry
from manyhands.checkpoint.manifest import Manifest as Files
from manyhands.checkpoint.target import claim
from manyhands.errors import UserError
from manyhands.files import cannot_write, write_atomic
from manyhands.trace.part import (
    DESCRIPTION,
    MOST_PART_BYTES,
    Array,
    Manifest,
    Phase,
    check_part,
    part_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from manyhands.moe import Routing

Numbers = int | Sequence[int] | Array
"""One number of each of T tokens, or one for all of them."""
_LEAST_PARTS = 4
PART_BYTES = 16 << 20
"""Of a part that is written: what a recorder holds in memory, and what a killed one loses, at most."""
PART_SECONDS = 300.0
"""After which a part is written, full or not, when the next rows come: a server may have few."""


class Recorder:
    """Writes one trace; as a context manager it is closed in any case. Not for several threads."""

    def __init__(
        self,
        path: str | Path,
        *,
        layers: Sequence[int],
        num_experts: int,
        num_experts_per_tok: int,
        limit: int | None = None,
        part_bytes: int = PART_BYTES,
        **fields: Any,
    ) -> None:
        """A new trace in the directory `path`, which must not exist, or be empty.

        `fields` are further fields of the `Manifest`; `recorded` says which optional arrays there are (default: the
        weights). `limit` bounds the bytes of all parts: the oldest are deleted when it is passed, the newest stay.

        Raises `UserError` for a directory that cannot be used, `ConfigError` for fields that make no sense and for a
        limit below two parts of one token, `StorageError` if the disk refuses.
        """
        fields = {"recorded": ("weights",)} | fields
        self.manifest = Manifest(
            layers=tuple(layers), num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, **fields
        )
        token_bytes = self.manifest.token_bytes()
        most = min(part_bytes, MOST_PART_BYTES, MOST_PART_BYTES if limit is None else limit // _LEAST_PARTS)
        if most < token_bytes:
            raise UserError(
                f"a limit of {limit:,} bytes is too little for a trace: a token takes {token_bytes:,}, and "
                f"there are up to {_LEAST_PARTS} parts: give {_LEAST_PARTS * token_bytes:,} or, better, megabytes"
            )
        self._most, self._limit = most // token_bytes, limit
        self.path = new_directory(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from None
        self.num_tokens = self.dropped_tokens = 0
        """So far: added, and deleted again because of the limit."""
        self.closed = False
        self._written: deque[tuple[str, int, Entry]] = deque()
        self._number = self._held = self._last_step = 0
        self._began = 0.0
        self._rows = {name: np.empty(shape, dtype) for name, (dtype, shape) in self.manifest.shapes(self._most).items()}
        """Of the next part; `_held` of them are there."""
        self._description = self.manifest.model_dump_json(indent=1, exclude_none=True).encode()
        write_atomic(self.path / DESCRIPTION, self._description)

    def add(
        self,
        routings: "Mapping[int, Routing]",
        token_ids: "Numbers | Tensor",
        *,
        sequence: Numbers,
        position: Numbers,
        phase: Numbers = Phase.SCORING,
        step: int,
    ) -> None:
        """The tokens of one forward pass, or some of them: their routing by layer, and whose they are.

        Tokens that a `token_mask` leaves out are not recorded. Each step may be given in several calls, but no step
        after a later one. Raises `DataError` for what is not as the manifest says, `StorageError` if the disk refuses.
        """
        given = [routings[layer] for layer in self.manifest.layers]
        mask = given[0].token_mask.numpy(force=True)
        wanted: dict[str, Any] = {"expert_ids": [routing.expert_ids for routing in given]}
        each = {
            "weights": [r.weights for r in given],
            "kept": [r.kept for r in given],
            "logits": [r.logits for r in given],
        }
        wanted |= {name: each[name] for name in self.manifest.recorded if name in each}
        arrays = {name: _stacked([t.numpy(force=True) for t in tensors]) for name, tensors in wanted.items()}
        self.add_arrays(
            **arrays, token_ids=token_ids, sequence=sequence, position=position, phase=phase, step=step, mask=mask
        )

    def add_arrays(
        self,
        expert_ids: Array,
        *,
        token_ids: "Numbers | Tensor" = -1,
        sequence: Numbers,
        position: Numbers,
        phase: Numbers,
        step: Numbers,
        mask: Array | None = None,
        **optional: Array,
    ) -> None:
        """The same from arrays: `expert_ids` [T, L, K] of any integers, -1 for no expert; `optional` as recorded."""
        ids, K = np.asarray(expert_ids), self.manifest.num_experts_per_tok
        E, none = self.manifest.num_experts, self.manifest.none
        highest = int(ids.max()) if ids.size else -1
        assert highest < E or (ids.dtype.kind == "u" and highest == none), "no such expert"
        values: dict[str, Any] = {"expert_ids": _widened(ids, K, none)}  # -1 becomes `none` when it is written
        for name in self.manifest.recorded:
            values[name] = optional[name] if name == "logits" else _widened(optional[name], K, 0)
        numbers = {"token_ids": token_ids, "sequence": sequence, "position": position, "phase": phase, "step": step}
        values |= {
            name: value if isinstance(value, int) else _array(value, len(ids)) for name, value in numbers.items()
        }
        if mask is not None and not mask.all():
            values = {name: value if isinstance(value, int) else value[mask] for name, value in values.items()}
        self._push(values, len(values["expert_ids"]))

    def flush(self) -> None:
        """Write what is in memory as a part."""
        if self._held:
            self._write()

    def close(self) -> None:
        """Write what is left, and the manifest that says that the recording has ended. Again: nothing."""
        if self.closed:
            return
        self.closed = True
        self.flush()
        about = Entry(size=len(self._description), sha256=hashlib.sha256(self._description).hexdigest())
        files = {name: entry for name, _, entry in self._written}
        write_atomic(self.path / MANIFEST, Files(files={DESCRIPTION: about, **files}).model_dump_json(indent=1))

    def discard(self) -> None:
        """Delete what was written, and the directory if nothing else is in it."""
        self.closed = True
        for name in (MANIFEST, *(name for name, _, _ in self._written), DESCRIPTION):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _push(self, values: dict[str, Any], T: int) -> None:
        """Arrays of T rows, or numbers for all of them."""
        assert not self.closed, "the recording has ended"
        if not T:
            return
        step = values["step"]
        first, last = (step, step) if isinstance(step, int) else (int(step[0]), int(step[-1]))
        assert first >= self._last_step, "a step after a later one"
        self._last_step = last
        done = 0
        while done < T:
            if not self._held:
                self._began = time.monotonic()
            at, count = self._held, min(T - done, self._most - self._held)
            for name, rows in self._rows.items():
                value = values[name]
                rows[at : at + count] = value if isinstance(value, int) else value[done : done + count]
            self._held += count
            done += count
            if self._held == self._most or time.monotonic() - self._began > PART_SECONDS:
                self._write()
        self.num_tokens += T

    def _write(self) -> None:
        """What is in memory becomes a part."""
        name, T = part_name(self._number), self._held
        arrays = {kind: rows[:T] for kind, rows in self._rows.items()}
        check_part(arrays, self.manifest, str(self.path / name))
        data = safetensors.numpy.save(arrays)
        write_atomic(self.path / name, data)
        self._written.append((name, T, Entry(size=len(data), sha256=hashlib.sha256(data).hexdigest())))
        self._number += 1
        self._held = 0
        self._rotate()

    def _rotate(self) -> None:
        while self._limit is not None and sum(entry.size for _, _, entry in self._written) > self._limit:
            name, T, _ = self._written.popleft()
            (self.path / name).unlink(missing_ok=True)
            self.dropped_tokens += T


def _stacked(each: list[Array]) -> Array:
    """[T, L, K] of L arrays [T, ≤ K]."""
    widest = max(array.shape[1] for array in each)
    return np.stack([_widened(array, widest, -1 if array.dtype.kind == "i" else 0) for array in each], 1)


def _array(numbers: Any, T: int) -> Array | int:
    if isinstance(numbers, int):
        return int(numbers)
    array = numbers.numpy(force=True).reshape(-1) if hasattr(numbers, "numpy") else np.asarray(numbers)
    return array if len(array) == T else np.broadcast_to(array, (T,))


def _widened(array: Array, K: int, fill: int) -> Array:
    """The last dimension filled up to K."""
    if array.shape[-1] == K:
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, K - array.shape[-1])], constant_values=fill)


def new_directory(path: str | Path) -> Path:
    """The real path of a directory that a trace may be recorded in; makes nothing. Raises `UserError` if it is used."""
    if os.path.isdir(path) and os.listdir(path):
        raise UserError(f"{path}: exists and is not empty; a trace is recorded into a new directory")
    return claim(path)
