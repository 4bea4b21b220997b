"""What an engine has done since it was started: numbers for metrics and for the picture of its experts.

The engine's thread alone writes; anybody may read at any time. L sparse layers, E experts of each.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from manyhands.config import ModelConfig
from manyhands.engine.runner import Routed
from manyhands.store.store import Reads

Counts = npt.NDArray[np.int64]
WINDOW = 5.0
"""Seconds: `recent` tells of the last one to two of these."""


class Load:
    """Tokens that went to each expert, and tokens that were made, in some time."""

    def __init__(self, layers: Sequence[int] = (), num_experts: int = 0) -> None:
        self.since = time.monotonic()
        self.tokens = 0
        """That went through the model."""
        self.made = 0
        self.layers = layers
        self.counts_LE: Counts = np.zeros((len(layers), num_experts), np.int64)

    @property
    def experts(self) -> dict[int, Counts]:
        """Per sparse layer, [E]; {} before the first step."""
        return dict(zip(self.layers, self.counts_LE, strict=True)) if self.tokens else {}

    def count(self, counts_LE: Counts, tokens: int, made: int) -> None:
        """A step more. Readers on other threads see an array that stays as it is."""
        self.tokens += tokens
        self.made += made
        self.counts_LE = self.counts_LE + counts_LE

    @property
    def rate(self) -> float:
        """Tokens made per second since `since`."""
        return self.made / max(time.monotonic() - self.since, 0.1)

    def plus(self, other: "Load") -> "Load":
        """Both, as of the earlier one's begin."""
        both = Load(self.layers, self.counts_LE.shape[1])
        both.since = min(self.since, other.since)
        for load in (self, other):
            both.count(load.counts_LE, load.tokens, load.made)
        return both


class Counters:
    """Since the start, and of late."""

    def __init__(self, config: ModelConfig, sizes: Mapping[int, int]) -> None:
        """Of an engine with such a model. `sizes`: by sparse layer, the bytes of an expert."""
        self.sizes = dict(sizes)
        self._layers = config.sparse_layers
        self._num_experts = config.moe.router.num_experts if config.moe else 0
        self.steps = 0
        self.lookups = 0
        """Experts that steps asked for."""
        self.misses = 0
        """Of these, that were not in memory."""
        self.bytes_disk = 0
        """Of experts' weights that were read from disk."""
        self.stalled = 0.0
        """Seconds that steps waited for them."""
        self.bytes_ram = 0
        """Of experts' weights that steps read from memory, each expert once a step."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        """Of the prompts, those that an earlier request had computed."""
        self.preemptions = 0
        self.ended: Counter[str] = Counter()
        """Requests by the reason of their end."""
        self.refused: Counter[str] = Counter()
        """Requests that were not taken, and why: full, stopping."""
        self.distinct: Counter[int] = Counter()
        """Steps by the number of experts they ran, over all sparse layers."""
        self.total = self._load()
        self._before, self._now = self._load(), self._load()

    def step(self, routed: Routed, made: int, reads: Reads | None = None) -> None:
        """A forward pass, after which so many tokens were drawn; and what it read from disk."""
        counts_LE = self._count(routed)
        run_L: list[int] = np.count_nonzero(counts_LE, axis=1).tolist()
        self.steps += 1
        self.lookups += sum(run_L) if reads is None else reads.hits + reads.misses
        if reads is not None:
            self.misses += reads.misses
            self.bytes_disk += reads.num_bytes
            self.stalled += reads.stalled
        self.bytes_ram += sum(self.sizes[layer] * run for layer, run in zip(self._layers, run_L, strict=True))
        self.distinct[sum(run_L)] += 1
        self._turn()
        self.total.count(counts_LE, routed.num_tokens, made)
        self._now.count(counts_LE, routed.num_tokens, made)

    @property
    def recent(self) -> Load:
        """The last five to ten seconds; empty after as long a rest."""
        before, now = self._before, self._now
        if time.monotonic() - now.since > 2 * WINDOW:
            return self._load()
        return before.plus(now)

    def _turn(self) -> None:
        age = time.monotonic() - self._now.since
        if age > WINDOW:
            self._before, self._now = (self._now if age < 2 * WINDOW else self._load()), self._load()

    def _load(self) -> Load:
        return Load(self._layers, self._num_experts)

    def _count(self, routed: Routed) -> Counts:
        """[L, E]: how many of the tokens chose each; all layers at once, since this is done in every step."""
        L, E = len(self._layers), self._num_experts
        if not L:
            return np.zeros((0, 0), np.int64)
        ids_LX = routed.experts()[0].cpu().numpy().reshape(L, -1)
        own = np.where(ids_LX >= 0, ids_LX + np.arange(L)[:, None] * E, L * E)  # the last: no expert
        return np.bincount(own.ravel(), minlength=L * E + 1)[:-1].reshape(L, E).astype(np.int64)
