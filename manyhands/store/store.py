"""Experts on disk: which records are in memory now, and who brings the others while a step runs.

    store = Store(layers, partial(policy, "lfu"), num_slots=512, num_staged=64)
    with store.step():          # a forward pass: the layers' native calls ask `begin` and `wait`
        ...
    store.close()

One arena of slots is shared by all layers. A policy says which records stay; the first `num_staged` slots take those
that do not, until their layer has computed. A layer computes the experts that are there while the others are read.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.errors import DiskError, ManyhandsError
from manyhands.quant import FetchedExperts, Layout
from manyhands.store.arena import Arena
from manyhands.store.disk import RecordFile
from manyhands.store.policies import Key, Policy
from manyhands.store.readers import NUM_READERS, Read, Readers


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """Where the experts of one layer are: `num_experts` records, one behind the other."""

    layer: int
    """Its number in the model."""
    path: Path
    offset: int
    """Of the first record in the file, on a page."""
    num_experts: int
    layout: Layout


@dataclass(slots=True)
class Reads:
    """What some passes found in memory and what they read, since somebody last took it."""

    hits: int = 0
    """Experts that were in memory when a layer wanted them."""
    missed: dict[int, dict[int, int]] = field(default_factory=dict)
    """Layer -> expert -> how often it was read."""
    num_bytes: int = 0
    """Of those reads."""
    stalled: float = 0.0
    """Seconds in which the engine's thread waited for them."""

    @property
    def misses(self) -> int:
        """Experts that were not."""
        return sum(sum(experts.values()) for experts in self.missed.values())


class Store:
    """A `quant.Source` for all layers of one model. One thread at a time runs a step.

    Raises `DiskError` for a file that cannot be opened.
    """

    def __init__(
        self,
        layers: Sequence[StoredLayer],
        make_policy: Callable[[int, Sequence[int]], Policy],
        num_slots: int,
        num_staged: int,
        *,
        num_tokens: int = 1 << 30,
        num_readers: int = NUM_READERS,
        direct: bool = True,
    ) -> None:
        """`make_policy` gets the bytes that may stay and what a record of each layer takes.


        Of `num_slots`, `num_staged` are for records that do not stay: a step must not want more experts of one layer
        than that. `num_tokens`: a pass has no more, whatever they want. `direct` False: without O_DIRECT.
        """
        assert layers and 0 < num_staged <= num_slots
        self.layers, self.num_slots, self.num_staged = tuple(layers), num_slots, num_staged
        self.num_tokens = num_tokens
        self.slot_bytes = max(layer.layout.record_bytes for layer in layers)
        self.policy = make_policy((num_slots - num_staged) * self.slot_bytes, [self.slot_bytes] * len(layers))
        self._arena = Arena(num_slots, self.slot_bytes)
        self._index = {layer.layer: i for i, layer in enumerate(layers)}
        self._fetched = [
            FetchedExperts(torch.zeros(layer.num_experts, dtype=torch.int64), layer.layout, self, layer.layer)
            for layer in layers
        ]
        self._tables = [fetched.table.numpy() for fetched in self._fetched]  # the same memory, quicker to write
        self._slots: dict[Key, int] = {}
        self._free = list(range(num_slots - 1, num_staged - 1, -1))
        self._coming: dict[int, tuple[Read, int]] = {}  # expert of the layer that began last -> its read and its slot
        self._since = Reads()
        self._lock = threading.RLock()
        paths = list(dict.fromkeys(layer.path for layer in layers))
        self._number = {path: i for i, path in enumerate(paths)}
        self._files = [RecordFile(path, direct) for path in paths]
        self._readers = Readers(num_readers)
        self._finalizer = weakref.finalize(self, _end, self._readers, self._files)

    def fetched(self, layer: int) -> FetchedExperts:
        """A layer's table, for native programs; the same object with every call."""
        return self._fetched[self._index[layer]]

    @contextmanager
    def step(self) -> Iterator[None]:
        """One forward pass, a step of the policy. Another thread's waits until this one has ended."""
        with self._lock:
            try:
                yield
            finally:
                self._settle()
                self.policy.end_step()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else's step comes between: for a layer that is called outside of a step."""
        with self._lock:
            yield

    def most_rows(self, layer: int, per_token: int) -> int:
        """Tokens of a pass whose experts of a layer have room, whichever they choose."""
        if self.num_staged >= self.layers[self._index[layer]].num_experts:
            return self.num_tokens
        return max(1, min(self.num_tokens, self.num_staged // per_token))

    def begin(self, layer: int, experts: Sequence[int]) -> None:
        """See `Source`. Raises `DiskError` if nothing can be read any more, `ManyhandsError` for too many experts."""
        self._settle()
        at = self._index[layer]
        if len(experts) > self.num_staged:
            raise ManyhandsError(
                f"a step wants {len(experts)} experts of layer {layer}, and {self.num_staged} fit: run fewer tokens"
            )
        decision = self.policy.want(at, experts)
        table = self._tables[at]
        reads: list[Read] = []
        for miss in decision.misses:
            for key in miss.evicted:
                self._tables[key[0]][key[1]] = 0
                self._free.append(self._slots.pop(key))
        staged = iter(range(self.num_staged))
        for miss in decision.misses:
            if miss.kept:
                self._slots[at, miss.expert] = slot = self._free.pop()
            else:
                slot = next(staged)
            reads.append(self._read(at, miss.expert, slot))
        for expert in decision.hits:
            if not table[expert]:  # it was to be read before, and that failed
                reads.append(self._read(at, expert, self._slots[at, expert]))
        self._since.hits += len(decision.hits)
        try:
            self._readers.start(reads)
        except DiskError:
            self._coming = {}  # nobody reads them
            raise

    def wait(self, layer: int, expert: int) -> int:
        """See `Source`. Raises `DiskError` if it could not be read."""
        read, slot = self._coming[expert]
        if not read.done:
            before = time.perf_counter()
            try:
                self._readers.wait(read)
            finally:
                self._since.stalled += time.perf_counter() - before
        if read.error is not None:
            raise read.error
        del self._coming[expert]
        address = self._arena.address(slot)
        if slot >= self.num_staged:
            self._tables[self._index[layer]][expert] = address
        return address

    def record(self, layer: int, expert: int) -> Tensor:
        """[record_bytes] uint8, a copy that stays. The policy does not hear of it. Raises `DiskError`."""
        at = self._index[layer]
        size = self.layers[at].layout.record_bytes
        with self._lock:
            if self._tables[at][expert]:
                return self._arena.tensor(self._slots[at, expert], size).clone()
            room = Arena(1, size)
            read = self._request(at, expert, room.view(0, size))
            self._readers.start([read])
            self._readers.wait(read)
            return room.tensor(0, size)

    def take(self) -> Reads:
        """What was read since the last call."""
        found, self._since = self._since, Reads()
        return found

    @property
    def num_bytes(self) -> int:
        """That the kernel has given, since the beginning."""
        return self._readers.num_bytes

    @property
    def direct(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(file.direct for file in self._files)

    def close(self) -> None:
        """End the threads and close the files; a step that wants a record then raises `DiskError`.

        It also happens when nobody holds the store any more.
        """
        with self._lock:
            self._finalizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Store":
        """Itself: copies of a model share it."""
        return self

    def __reduce__(self) -> str:
        """Nobody else has its threads."""
        raise TypeError("a model whose experts are on disk cannot be pickled: load it where it is needed")

    def _read(self, at: int, expert: int, slot: int) -> Read:
        """A read for the step that begins."""
        size = self.layers[at].layout.record_bytes
        read = self._request(at, expert, self._arena.view(slot, size))
        self._coming[expert] = read, slot
        missed = self._since.missed.setdefault(self.layers[at].layer, {})
        missed[expert] = missed.get(expert, 0) + 1
        self._since.num_bytes += size
        return read

    def _request(self, at: int, expert: int, view: memoryview) -> Read:
        layer = self.layers[at]
        number = self._number[layer.path]
        return Read(self._files[number], number, layer.offset + expert * layer.layout.record_bytes, view)

    def _settle(self) -> None:
        """A step that ended before it waited for all left reads behind: their slots are written to until they end."""
        for read, _ in self._coming.values():
            self._readers.settle(read)
        self._coming = {}


def _end(readers: Readers, files: list[RecordFile]) -> None:
    if readers.close():  # else nobody else holds the files, and each closes when its last read has ended
        for file in files:
            file.close()
