"""Training on many devices, on paper: what a step takes, and what of it is not arithmetic.

N devices, R of which share one set of experts (N/R sets); T tokens per device and step. Everything else is sharded over
all N, the experts of a device over the N/R that hold the same (FSDP), in bfloat16 with float32 masters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2

from manyhands.plan.compute import training_flops
from manyhands.plan.count import Counts
from manyhands.plan.network import Network
from manyhands.plan.parallel import COMBINE_BYTES, DISPATCH_BYTES
from manyhands.plan.routes import Fabric, Recorded, routes
from manyhands.plan.sizes import Sizes

STATE_BYTES = 16
"""Per parameter: a float32 master, its gradient, two moments of AdamW."""
GATHERED_BYTES = 2 + 2 + 4
"""Per parameter and step: bfloat16 weights for forward and backward, float32 gradients back."""
RESERVE = 0.1
"""Of a device's memory, for everything but state and gathered weights; activations are not counted."""
NOTHING = "arithmetic"
WAITING, EXCHANGE, GATHER, MEMORY = "the busiest device", "the exchange", "gathering weights", "memory"


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained, and on what."""

    sizes: Sizes
    counts: Counts
    fabric: Fabric
    rate: float
    """FLOP/s that a device reaches in training."""
    memory: float
    tokens: int
    """T."""
    length: float
    """Of a sequence."""
    imbalance: float = 1.0
    recorded: Mapping[int, Recorded] | None = None
    """By R."""

    @property
    def experts(self) -> float:
        """Parameters of the routed experts."""
        return self.counts.by_component["routed experts"]

    @property
    def others(self) -> float:
        """All other parameters."""
        return self.counts.total - self.experts


@dataclass(frozen=True, slots=True)
class Step:
    """Of N devices, in seconds of one device."""

    devices: int
    ep: int
    """R."""
    arithmetic: float
    """Of the mean device."""
    waiting: float
    """What the busiest device computes beyond that."""
    exchange: float
    """Of tokens with experts: there and back, forward and backward, of all layers."""
    hidden: float
    """Of the exchange, behind the arithmetic of shared experts."""
    gather: float
    """Of weights and gradients."""
    held: float
    """Bytes on a device: its state, and two blocks' gathered weights."""
    fits: bool

    @property
    def exposed(self) -> dict[str, float]:
        """What the step takes beyond its arithmetic.

        Weights are gathered while the device computes and no tokens travel: both share the wires.
        """
        return {
            WAITING: self.waiting,
            EXCHANGE: self.exchange - self.hidden,
            GATHER: max(0.0, self.gather + self.hidden - self.arithmetic - self.waiting),
        }

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.arithmetic + sum(self.exposed.values())

    @property
    def efficiency(self) -> float:
        """Of the mean device's arithmetic in the step."""
        return self.arithmetic / self.seconds

    @property
    def limit(self) -> str:
        """What to mend next: memory where it does not fit, else what is exposed most."""
        if not self.fits:
            return MEMORY
        name, most = max(self.exposed.items(), key=lambda item: item[1])
        return name if most > 0.01 * self.seconds else NOTHING


def step_on(job: Job, devices: int, ep: int) -> Step:
    """One step of N = `devices` with R = `ep`, which divides N and E."""
    s, parts, recorded = job.sizes, job.counts.by_component, (job.recorded or {}).get(ep)
    arithmetic = job.tokens * training_flops(s, job.counts, job.length) / job.rate
    each = job.experts / s.num_experts * s.experts_per_token
    load = 1.0 if ep == 1 else recorded.load if recorded is not None else job.imbalance
    waiting = job.tokens * 6 * each / job.rate * (load - 1)
    ways = routes(s, job.fabric, ep, job.imbalance, recorded)
    directions = (DISPATCH_BYTES, COMBINE_BYTES)
    once = max((sum(way.seconds(job.tokens, s.hidden_size, b) for b in directions) for way in ways), default=0.0)
    exchange = 2 * s.sparse_layers * once
    shared = job.tokens * 6 * parts.get("shared experts", 0) / job.rate
    held = STATE_BYTES * job.counts.total / devices + 2 * _block(job, ep)
    return Step(
        devices,
        ep,
        arithmetic,
        waiting,
        exchange,
        min(exchange, shared),
        _gathering(job, devices, ep),
        held,
        held <= job.memory * (1 - RESERVE),
    )


def best_step(job: Job, devices: int, shares: list[int]) -> Step:
    """The fastest R of `shares` that fits; where none does, the one that needs least memory."""
    steps = [step_on(job, devices, ep) for ep in shares]
    fitting = [step for step in steps if step.fits]
    return min(fitting, key=lambda step: step.seconds) if fitting else min(steps, key=lambda step: step.held)


def _block(job: Job, ep: int) -> float:
    """Bytes of the gathered weights of one sparse block, in bfloat16."""
    parts = job.counts.by_component
    layers = len(job.sizes.windows)
    others = (job.others - parts.get("embedding", 0) - parts.get("head", 0)) / layers
    return 2 * (others + job.experts / job.sizes.sparse_layers / ep)


def _gathering(job: Job, devices: int, ep: int) -> float:
    """Both kinds of weights, one after the other: they share the wires."""
    layers = len(job.sizes.windows)
    others = _gathered(job.fabric, job.others, devices, 1, layers)
    return others + _gathered(job.fabric, job.experts / ep, devices // ep, ep, job.sizes.sparse_layers)


def _gathered(fabric: Fabric, parameters: float, members: int, apart: int, layers: int) -> float:
    """`parameters` spread over `members` devices, every `apart`-th: all-gathers forward and backward, reduce-scatter.

    In a ring each device gets (members - 1)/members of the bytes, once. Of a node's m members each brings a network
    port. Latency: log2(members) steps for each of three collectives a layer.
    """
    if members == 1:
        return 0.0
    volume = parameters * GATHERED_BYTES * (members - 1) / members
    if members * apart <= fabric.node or fabric.network is None:
        over: Network = fabric.link
        return over.seconds(volume, 3 * layers * log2(members))
    ports = max(1, fabric.node // apart)
    rate = min(fabric.link.bandwidth, fabric.network.bandwidth * ports) if ports > 1 else fabric.network.bandwidth
    return 3 * layers * log2(members) * fabric.network.latency + volume / rate
