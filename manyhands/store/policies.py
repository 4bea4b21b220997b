"""Which experts stay in memory under a byte budget. The engine and the simulator call exactly these classes.

A policy is told what each layer wants, in the order in which a forward pass asks, and answers which of it is there
(hits), which must be read (misses), and what gives way. It holds no weights, reads no clock and draws no random
number: equal wants give equal decisions, so hits counted in a simulation are the hits of the engine.

    policy = Lfu(budget_bytes=3_000_000_000, record_bytes=[4_336_640] * 30)
    decision = policy.want(layer=0, experts=[3, 17, 90])    # once for each layer of a forward pass
    policy.end_step()                                       # after the last layer

One budget is shared by all layers: a cap for each layer takes from a busy layer what a quiet one does not need.
"""

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from manyhands.errors import ConfigError

Key = tuple[int, int]
"""(index of the layer among those with experts, expert)."""

Name = Literal["lfu", "lru", "pinned"]

HALVING_STEPS = 32
"""`Lfu` halves its counts after this many forward passes."""


class Miss(NamedTuple):
    """An expert to read. Not `kept`: read into a staging place and gone after this layer (a bypass)."""

    expert: int
    evicted: tuple[Key, ...]  # these leave memory before it is read
    kept: bool


class Decision(NamedTuple):
    """What a layer finds in memory, and what is to be read for it; both in ascending order of the expert."""

    hits: tuple[int, ...]
    misses: tuple[Miss, ...]


class Policy(ABC):
    """Counts bytes and keeps the budget; a subclass says who gives way.

    budget_bytes   what the records in memory may take together (staging places are the caller's, and not in it).
    record_bytes   [L] bytes of one expert's record in each layer that has experts.

    `resident` maps each key in memory to the bytes it takes. What a layer wants now never gives way for another of
    its own experts: the one that finds no room is bypassed.
    """

    def __init__(self, budget_bytes: int, record_bytes: Sequence[int]) -> None:
        if budget_bytes < 0 or any(size <= 0 for size in record_bytes):
            raise ConfigError(
                f"a cache policy needs a budget of 0 bytes or more and records of 1 or more, not {budget_bytes}"
                f" and {min(record_bytes, default=0)}"
            )
        self.budget_bytes = budget_bytes
        self.record_bytes = tuple(record_bytes)
        self.used_bytes = 0
        self.steps = 0
        self.resident: OrderedDict[Key, int] = OrderedDict()

    def want(self, layer: int, experts: Sequence[int]) -> Decision:
        """What `layer` (an index into `record_bytes`) needs for one forward pass: distinct ids, ascending."""
        keys = [(layer, expert) for expert in experts]
        resident = self.resident
        missing = [key for key in keys if key not in resident]
        self._use(keys)
        if not missing:
            return Decision(tuple(experts), ())
        size = self.record_bytes[layer]
        wanted = set(keys)
        hits = tuple(expert for expert in experts if (layer, expert) in resident)
        return Decision(hits, tuple(self._read(key, size, wanted) for key in missing))

    def end_step(self) -> None:
        """A forward pass has gone through all layers."""
        self.steps += 1

    def _read(self, key: Key, size: int, wanted: set[Key]) -> Miss:
        short = self.used_bytes + size - self.budget_bytes
        leaving = self._leaving(key, short, wanted)
        if leaving is None:
            return Miss(key[1], (), kept=False)
        for other in leaving:
            self.used_bytes -= self.resident.pop(other)
        self.resident[key] = size
        self.used_bytes += size
        return Miss(key[1], tuple(leaving), kept=True)

    @abstractmethod
    def _use(self, keys: Sequence[Key]) -> None:
        """All that a layer wants, whether it is in memory or not, before anything gives way."""

    @abstractmethod
    def _leaving(self, key: Key, short: int, wanted: set[Key]) -> list[Key] | None:
        """Who gives way so that `short` bytes (none if <= 0) become free for `key`; None: `key` is bypassed."""


class Lru(Policy):
    """The least recently used expert gives way.

    The textbook's rule, and the worst for a model's cycle: with room for less than one token's experts each expert
    is evicted before the next token wants it, and nothing is ever hit.
    """

    def _use(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if key in self.resident:
                self.resident.move_to_end(key)

    def _leaving(self, key: Key, short: int, wanted: set[Key]) -> list[Key] | None:
        leaving: list[Key] = []
        if short > 0:
            for other, size in self.resident.items():  # oldest first
                if other in wanted:
                    continue
                leaving.append(other)
                short -= size
                if short <= 0:
                    return leaving
            return None
        return leaving


class Lfu(Policy):
    """The least often used expert gives way (of equals the least recently used); the newcomer may be that one.

    The newcomer passes by where it is used less than all others, or as much and these in the same forward pass: when
    every token wants the same experts and they do not all fit, those in memory stay, and are hit.
    Every want counts, also of experts that are not in memory, and all counts are halved every `HALVING_STEPS`
    forward passes, so that an old habit fades (ageing as in Arlitt et al., "Evaluating content management techniques
    for web proxy caches", 2000; letting the newcomer pass by: TinyLFU, Einziger et al. 2017, section 3).
    A prompt of many tokens is one forward pass and counts once for each expert.
    """

    def __init__(self, budget_bytes: int, record_bytes: Sequence[int]) -> None:
        super().__init__(budget_bytes, record_bytes)
        self._worth: dict[Key, tuple[float, int]] = {}  # (count, when last used)
        self._order: list[tuple[tuple[float, int], Key]] = []  # heap with one entry for each resident key
        self._clock = 0
        self._pass_began = 0  # the clock then

    def end_step(self) -> None:
        super().end_step()
        self._pass_began = self._clock
        if self.steps % HALVING_STEPS == 0:
            self._worth = {key: (count / 2, last) for key, (count, last) in self._worth.items()}
            self._order = [(self._worth[key], key) for key in self.resident]
            heapq.heapify(self._order)

    def _use(self, keys: Sequence[Key]) -> None:
        worth = self._worth
        clock = self._clock
        for key in keys:
            clock += 1
            before = worth.get(key)
            worth[key] = (before[0] + 1 if before else 1.0, clock)
        self._clock = clock

    def _leaving(self, key: Key, short: int, wanted: set[Key]) -> list[Key] | None:
        order, worth = self._order, self._worth
        most = (worth[key][0], self._pass_began)
        leaving: list[Key] = []
        spared: list[Key] = []
        while short > 0 and order and order[0][0] <= most:
            entry, other = order[0]
            if entry != worth[other]:  # stale; worth only grows between halvings, so an entry is never too high
                heapq.heapreplace(order, (worth[other], other))
                continue
            heapq.heappop(order)
            if other in wanted:
                spared.append(other)
                continue
            leaving.append(other)
            short -= self.resident[other]
        room = short <= 0
        for other in spared if room else spared + leaving:
            heapq.heappush(order, (worth[other], other))
        return leaving if room else None

    def _read(self, key: Key, size: int, wanted: set[Key]) -> Miss:
        miss = super()._read(key, size, wanted)
        if miss.kept:
            heapq.heappush(self._order, (self._worth[key], key))
        return miss


class Pinned(Policy):
    """The experts that a trace used most stay for good once they were read; all others are bypassed.

    counts   [L][E] how often each expert was used (`manyhands.trace.counts`).

    Chosen by uses per byte, of equals the lower layer and expert, until the budget is full.
    """

    def __init__(self, budget_bytes: int, record_bytes: Sequence[int], counts: Sequence[Sequence[int]]) -> None:
        super().__init__(budget_bytes, record_bytes)
        if len(counts) != len(self.record_bytes):
            raise ConfigError(
                f"pinned: the counts are of {len(counts)} layers with experts, the model has {len(self.record_bytes)}"
            )
        every = [(layer, expert) for layer, row in enumerate(counts) for expert in range(len(row))]
        every.sort(key=lambda key: (-counts[key[0]][key[1]] / self.record_bytes[key[0]], key))
        pins: set[Key] = set()
        free = budget_bytes
        for key in every:
            size = self.record_bytes[key[0]]
            if size <= free:
                pins.add(key)
                free -= size
        self.pins = frozenset(pins)

    def _use(self, keys: Sequence[Key]) -> None:
        pass

    def _leaving(self, key: Key, short: int, wanted: set[Key]) -> list[Key] | None:
        return [] if key in self.pins else None


def policy(
    name: Name | str,
    budget_bytes: int,
    record_bytes: Sequence[int],
    counts: Sequence[Sequence[int]] | None = None,
) -> Policy:
    """The policy of that name. Raises ConfigError for an unknown name, and for `pinned` without counts."""
    if name == "lfu":
        return Lfu(budget_bytes, record_bytes)
    if name == "lru":
        return Lru(budget_bytes, record_bytes)
    if name == "pinned":
        if counts is None:
            raise ConfigError("the cache policy pinned needs a trace to count experts in")
        return Pinned(budget_bytes, record_bytes, counts)
    raise ConfigError(f"no cache policy {name!r}: lfu, lru or pinned")
