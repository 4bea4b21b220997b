"""Whether a machine holds a model at work: weights, caches and working memory, against its memory less a reserve."""

from dataclasses import dataclass

from manyhands.config import ModelConfig
from manyhands.plan.cache import sequence_bytes
from manyhands.plan.count import Counts
from manyhands.plan.machine import Machine
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import Storage, weight_bytes
from manyhands.plan.working import working_bytes

RESERVE = 0.05
"""Share of the memory that driver, runtime and fragmentation take: an assumption."""
SYSTEM = 2 << 30
"""Bytes that a computer's own programs take at least, beside a model in its main memory: an assumption."""
UNIFIED = ((128 << 30, 0.16), (0, 0.26))
"""(from so many bytes on, share) that a machine with unified memory keeps from its GPU unless it is told otherwise.

macOS lets Metal have 11.84 of 16 GiB (github.com/AlexsJones/llmfit/pull/754), 17.76 of 24
(github.com/sgl-project/sglang/pull/29949) and 107.52 of 128 (github.com/antirez/ds4/pull/893); a setting raises that.
Between, and for other makers, the smaller machine's share is assumed.
"""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes, on all devices together."""

    weights: float
    cache: float
    working: float
    """0 where only a shape is known."""

    @property
    def total(self) -> float:
        """All that must be in memory at once."""
        return self.weights + self.cache + self.working

    def share(self, machine: Machine) -> float:
        """Of the memory that can be used; it fits up to 1."""
        return self.total / usable(machine)

    def fits(self, machine: Machine) -> bool:
        """Split evenly over the devices."""
        return self.share(machine) <= 1


def reserve(machine: Machine) -> float:
    """Bytes of one device that a model cannot have: as the machine says, else by its kind; half at most."""
    if machine.reserve is not None:
        return min(machine.reserve, machine.memory)
    if machine.kind == "unified":
        return machine.memory * next(share for least, share in UNIFIED if machine.memory >= least)
    kept = machine.memory * RESERVE
    return kept if machine.kind == "gpu" else min(max(kept, SYSTEM), machine.memory / 2)


def usable(machine: Machine) -> float:
    """Bytes of all devices without the reserve."""
    return machine.all_memory - reserve(machine) * machine.devices


def need(
    counts: Counts,
    config: ModelConfig | None,
    sizes: Sizes | None,
    storage: Storage,
    *,
    batch: int,
    context: float,
    prompt: int,
    kv_bits: float,
) -> Need:
    """`batch` sequences of `context` positions, while one prompt of `prompt` tokens is read."""
    cache = batch * sequence_bytes(sizes, context, kv_bits) if sizes is not None else 0.0
    working = working_bytes(config, prompt, activation_bits(storage)) if config is not None else 0.0
    return Need(weight_bytes(counts, storage), cache, working)


def activation_bits(storage: Storage) -> float:
    """Of the activations: the width of the weights, between 16 and 32."""
    return min(32.0, max(16.0, storage.linear))


def shown_share(share: float) -> str:
    """`1.57x`; never `1x` for what is too much."""
    return f"{share:.3g}x" if share >= 1.005 else f"{share:.5g}x" if share >= 1.00001 else "just over"
