"""The best speed on a machine: the longer of reading the bytes and doing the arithmetic (a roofline).

Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009. Perfect overlap, no launch times, no communication between
devices: a bound, which measured speed is a share of.
"""

from dataclasses import dataclass

from manyhands.plan.compute import forward_flops, prefill_flops
from manyhands.plan.count import Counts
from manyhands.plan.machine import Machine
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import Storage
from manyhands.plan.traffic import Load, StepBytes, decode_bytes, prefill_bytes

READ, MATRIX = "read bandwidth", "matrix rate"


@dataclass(frozen=True, slots=True)
class Bound:
    """One step on one machine: decoding one token of each sequence, or a pass over a prompt."""

    step: StepBytes
    flops: float
    read_seconds: float
    compute_seconds: float | None
    """None where the machine's matrix rate is not known."""
    rate: tuple[str, float] | None

    @property
    def seconds(self) -> float:
        """Of the step: max(bytes / bandwidth, FLOP / rate)."""
        return max(self.read_seconds, self.compute_seconds or 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.step.tokens / self.seconds

    @property
    def limit(self) -> str:
        """What the time goes to."""
        if self.compute_seconds is None:
            return f"{READ} ({MATRIX} unknown)"
        return READ if self.read_seconds >= self.compute_seconds else f"{MATRIX} ({(self.rate or ('',))[0]})"


def decode_bound(
    machine: Machine,
    sizes: Sizes,
    counts: Counts,
    storage: Storage,
    *,
    batch: int = 1,
    context: float = 0,
    kv_bits: float = 16,
    load: Load | None = None,
) -> Bound:
    """One decoding step of `batch` sequences that see `context` positions each."""
    step = decode_bytes(sizes, counts, storage, batch=batch, context=context, kv_bits=kv_bits, load=load)
    return _bound(machine, storage, step, batch * forward_flops(sizes, counts, context, latent=True))


def prefill_bound(
    machine: Machine, sizes: Sizes, counts: Counts, storage: Storage, length: int, load: Load | None = None
) -> Bound:
    """A pass over a prompt of `length` tokens: its seconds are the time to the first token."""
    step = prefill_bytes(sizes, counts, storage, length, load)
    return _bound(machine, storage, step, prefill_flops(sizes, counts, length))


def _bound(machine: Machine, storage: Storage, step: StepBytes, flops: float) -> Bound:
    rate = machine.rate(storage.rate)
    return Bound(step, flops, step.total / machine.all_bandwidth, flops / rate[1] if rate else None, rate)
