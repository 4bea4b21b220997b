"""Experts on disk in a process of so many bytes: what is left for experts, how often one is there, how fast that is.

h hit rate: of the experts that a step wants, the share that is in memory.
"""

import itertools
from dataclasses import dataclass

from manyhands.plan.count import Counts
from manyhands.plan.fit import Need
from manyhands.plan.offload import offload_seconds, routed_bytes
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import Storage
from manyhands.plan.traffic import StepBytes, expert_bytes

BASELINE = 225 * (1 << 20)
"""Bytes that a process takes before it has a model: Python, torch, libraries (measured, anonymous memory)."""

HITS = (
    (0.0, 0.0),
    (0.01, 0.140),
    (0.02, 0.225),
    (0.03, 0.290),
    (0.05, 0.388),
    (0.07, 0.463),
    (0.1, 0.554),
    (0.15, 0.666),
    (0.2, 0.748),
    (0.3, 0.859),
    (0.5, 0.939),
    (1.0, 1.0),
)
"""(share of the experts that fits, hit rate): the mean of three recorded models under the policy `lfu`, one sequence.

gpt-oss-120b (top-2), Gemma-4-26B-A4B and Qwen3-30B-A3B (top-6), 128 experts a layer, 64 to 128 decoded tokens each:
traces of BigMoeOnEdge (github.com/Helldez/BigMoeOnEdge, commit 2d4f2b1, docs/bench-data), replayed through
`store/policies.py`. The three differ by 0.05 at most up to a share of a third, by 0.08 above.
"""
HITS_SOURCE = "what three recorded models had where as much fits (policy lfu, 128 experts), ±5 points"


@dataclass(frozen=True, slots=True)
class Hits:
    """What a recorded trace would have hit."""

    rate: float
    step: float
    """Bytes of the experts that a step wants, on average."""
    source: str


def expected_hits(share: float) -> float:
    """`HITS` between its points, in straight lines."""
    for (low, at_low), (high, at_high) in itertools.pairwise(HITS):
        if share <= high:
            return at_low + (at_high - at_low) * (share - low) / (high - low)
    return 1.0


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of a process that keeps its experts on disk."""

    memory: float
    """All it may take."""
    rest: float
    """What is not experts: the process itself, other weights, caches, working memory."""
    routed: float
    """All experts."""
    step: float
    """The experts of one step."""
    layer: float
    """The experts of one step in one layer, which must be in memory together."""

    @property
    def slots(self) -> float:
        """Left for experts."""
        return max(0.0, self.memory - self.rest)

    @property
    def share(self) -> float:
        """Of the experts, what fits."""
        return min(1.0, self.slots / self.routed)

    @property
    def smallest(self) -> float:
        """The least memory that works."""
        return self.rest + self.layer

    @property
    def works(self) -> bool:
        """Whether a step can be computed at all."""
        return self.memory >= self.smallest


def budget_of(memory: float, counts: Counts, sizes: Sizes, storage: Storage, need: Need, step: StepBytes) -> Budget:
    """Of a model with experts, for steps such as `step`."""
    routed = routed_bytes(counts, storage)
    one = expert_bytes(sizes, counts, storage)
    return Budget(memory, BASELINE + need.total - routed, routed, step.experts, step.distinct * one)


def token_rate(step: StepBytes, hits: float, disk: float, bandwidth: float | None) -> float:
    """Tokens per second at best: reading misses from the disk and everything from memory overlap; the slower counts."""
    return step.tokens / offload_seconds(step, hits, bandwidth or float("inf"), disk, overlap=True)
