"""Experts on disk: what a decoding step costs when a share of the experts it needs is not in memory.

h hit rate, the share of needed expert bytes that is in memory already.
"""

from manyhands.plan.cache import sequence_bytes
from manyhands.plan.count import Counts
from manyhands.plan.machine import Machine
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import Storage, weight_bytes
from manyhands.plan.traffic import StepBytes

HIT_RATES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


def offload_seconds(step: StepBytes, hit: float, memory: float, disk: float, *, overlap: bool = False) -> float:
    """Of one step, from memory and disk in bytes per second.

    Without overlap: (fixed + cache + h·experts) / memory + (1-h)·experts / disk. With full overlap the longer of
    reading everything from memory and reading the misses from disk.
    """
    missed = (1 - hit) * step.experts
    if overlap:
        return max(step.total / memory, missed / disk)
    return (step.total - missed) / memory + missed / disk


def resident_share(
    machine: Machine, sizes: Sizes, counts: Counts, storage: Storage, batch: int, context: float, kv_bits: float
) -> float:
    """The share of the experts that fits beside everything else: under uniform routing, the hit rate."""
    routed = counts.by_component.get("routed experts", 0) * storage.routed / 8
    if not routed:
        return 1.0
    other = weight_bytes(counts, storage) - routed + batch * sequence_bytes(sizes, context, kv_bits)
    return min(1.0, max(0.0, (machine.all_memory - other) / routed))
