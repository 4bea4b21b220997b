"""Where a model's experts lie, and what a step then waits for: in a device's memory, in its host's, on disk.

E experts of a layer; s share of all experts that lie in a tier or a faster one; h hit rate: of the bytes of experts
that a step wants, the share that is found there. Everything but the experts lies in the device's memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from manyhands.plan.budget import expected_hits
from manyhands.plan.fit import Need, usable
from manyhands.plan.machine import Machine
from manyhands.plan.traffic import StepBytes

Layout = Literal["memory", "host", "disk"]
LAYOUTS: tuple[Layout, ...] = ("memory", "host", "disk")
"""All in the device's memory; experts also in its host's; experts also on disk. Faster ones first."""
MOST_BESIDE_A_HOST = 8
"""Devices that share one host's memory or disk."""
DEVICE, HOST, DISK = "memory bandwidth", "host memory", "disk"
Hits = Callable[[float], float]
"""The hit rate of a share of the experts."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """Bytes of routed experts by where they lie."""

    layout: Layout
    device: float
    host: float = 0.0
    disk: float = 0.0

    @property
    def routed(self) -> float:
        """All experts."""
        return self.device + self.host + self.disk


def lay_out(machine: Machine, host: Machine | None, need: Need, routed: float, layer: float) -> Tiers | None:
    """The fastest layout that holds a model; None if there is none.

    `need`: all that must be held, experts included; `routed`: its experts; `layer`: those that a step wants in one
    layer, which must be in memory together when others lie on disk. `host`: the computer that the devices are in, if
    it is not the machine itself.
    """
    room = usable(machine) - (need.total - routed)
    if room >= routed:
        return Tiers("memory", routed)
    if room < 0 or not routed or machine.devices > MOST_BESIDE_A_HOST:
        return None
    beside = usable(host) if host is not None else 0.0
    if routed - room <= beside:
        return Tiers("host", room, routed - room)
    if disk_rate(machine) is None or room + beside < layer:
        return None
    return Tiers("disk", room, beside, routed - room - beside)


def disk_rate(machine: Machine) -> float | None:
    """Bytes per second of reading experts: at random places, where that is known."""
    return machine.disk_random or machine.disk


def found(share: float, step: StepBytes, num_experts: int, hits: Hits = expected_hits) -> float:
    """h of a share s: as recorded, but no more than s·E of the experts that a step touches can be there."""
    if share >= 1 or not step.distinct:
        return 1.0
    return min(hits(share), share * num_experts / step.distinct)


def read_seconds(
    tiers: Tiers,
    machine: Machine,
    host: Machine | None,
    step: StepBytes,
    num_experts: int,
    hits: Hits = expected_hits,
) -> dict[str, float]:
    """By tier, the seconds of reading what a step reads there; all tiers read at the same time: the longest counts.

    What a host holds, the host multiplies where it lies or sends to the device: its memory is read either way. What
    comes from disk passes through the memory that it is computed from.
    """
    if tiers.layout == "memory":
        return {DEVICE: step.total / machine.all_bandwidth}
    on_device = found(tiers.device / tiers.routed, step, num_experts, hits)
    in_memory = found((tiers.device + tiers.host) / tiers.routed, step, num_experts, hits)
    beside = (1 - on_device) * step.experts if host is not None else 0.0
    seconds = {DEVICE: (step.total - beside) / machine.all_bandwidth}
    if host is not None:
        seconds[HOST] = beside / host.all_bandwidth
    disk = disk_rate(machine)
    if tiers.layout == "disk" and disk is not None:
        seconds[DISK] = (1 - in_memory) * step.experts / disk
    return seconds
