"""Experts on disk: what a decoding step costs when a share of the experts it needs is not in memory.

h hit rate, the share of needed expert bytes that is in memory already.
"""

from manyhands.plan.count import Counts
from manyhands.plan.fit import Need, usable
from manyhands.plan.machine import Machine
from manyhands.plan.storage import Storage
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


def routed_bytes(counts: Counts, storage: Storage) -> float:
    """All routed experts of all layers."""
    return counts.by_component.get("routed experts", 0) * storage.routed / 8


def resident_share(machine: Machine, counts: Counts, storage: Storage, need: Need) -> float:
    """The share of the experts that fits beside everything else: under uniform routing, the hit rate."""
    routed = routed_bytes(counts, storage)
    if not routed:
        return 1.0
    return min(1.0, max(0.0, (usable(machine) - (need.total - routed)) / routed))
