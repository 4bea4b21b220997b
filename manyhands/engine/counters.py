"""What an engine has done since it was started: numbers for metrics and for the picture of its experts.

The engine's thread alone writes; anybody may read at any time. E experts of a layer.
"""

import time
from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from manyhands.moe import Routing

Counts = npt.NDArray[np.int64]
WINDOW = 5.0
"""Seconds: `recent` tells of the last one to two of these."""


class Load:
    """Tokens that went to each expert, and tokens that were made, in some time."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.tokens = 0
        """That went through the model."""
        self.made = 0
        self.experts: dict[int, Counts] = {}
        """Per sparse layer, [E]."""

    def count(self, counts: Mapping[int, Counts], tokens: int, made: int) -> None:
        """A step more."""
        self.tokens += tokens
        self.made += made
        for layer, counts_E in counts.items():
            before = self.experts.get(layer)
            self.experts[layer] = counts_E if before is None else before + counts_E

    @property
    def rate(self) -> float:
        """Tokens made per second since `since`."""
        return self.made / max(time.monotonic() - self.since, 0.1)

    def plus(self, other: "Load") -> "Load":
        """Both, as of the earlier one's begin."""
        both = Load()
        both.since = min(self.since, other.since)
        for load in (self, other):
            both.count(dict(load.experts), load.tokens, load.made)
        return both


class Counters:
    """Since the start, and of late."""

    def __init__(self) -> None:
        self.steps = 0
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
        self.total = Load()
        self._before, self._now = Load(), Load()

    def step(self, routings: Mapping[int, Routing], tokens: int, made: int) -> None:
        """A forward pass of so many tokens, after which so many were drawn."""
        counts = {layer: _counts(routing) for layer, routing in routings.items()}
        self.steps += 1
        self.distinct[sum(int(np.count_nonzero(counts_E)) for counts_E in counts.values())] += 1
        self._turn()
        self.total.count(counts, tokens, made)
        self._now.count(counts, tokens, made)

    @property
    def recent(self) -> Load:
        """The last five to ten seconds; empty after as long a rest."""
        before, now = self._before, self._now
        if time.monotonic() - now.since > 2 * WINDOW:
            return Load()
        return before.plus(now)

    def _turn(self) -> None:
        age = time.monotonic() - self._now.since
        if age > WINDOW:
            self._before, self._now = (self._now if age < 2 * WINDOW else Load()), Load()


def _counts(routing: Routing) -> Counts:
    """[E]: how many of the tokens chose each."""
    ids = routing.expert_ids.numpy().ravel()
    return np.bincount(ids[ids >= 0], minlength=routing.num_experts).astype(np.int64)
