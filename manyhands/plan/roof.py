"""The best speed on a machine: the longer of reading the bytes and doing the arithmetic (a roofline).

Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009. Perfect overlap, no launch times; of communication
between devices its latency only: a bound, which measured speed is a share of. What a batch reads depends on its
routing: `seconds` takes the expected number of experts, `least_seconds` the fewest that any routing could touch.
"""

from dataclasses import dataclass

from manyhands.plan.compute import attention_flops, forward_flops, mean_attention_flops, prefill_flops
from manyhands.plan.count import Counts
from manyhands.plan.machine import Machine
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import Storage
from manyhands.plan.traffic import Load, StepBytes, decode_bytes, prefill_bytes

READ, MATRIX = "read bandwidth", "matrix rate"
WAIT = "latency between devices"
LINK_LATENCY, NETWORK_LATENCY = 5e-6, 10e-6
"""Seconds of the shortest collective among the devices of a node, and among nodes: assumed."""
ATTENTION_RATE = "bf16"


@dataclass(frozen=True, slots=True)
class Bound:
    """One step on one machine: decoding one token of each sequence, or a pass over a prompt."""

    step: StepBytes
    flops: float
    attention: float
    """FLOP of `flops` that are scores and values."""
    read_seconds: float
    compute_seconds: float | None
    """None where the machine's matrix rate is not known."""
    rate: tuple[str, float] | None
    """(format, FLOP/s) of what multiplies weights."""
    scores: tuple[str, float] | None
    """The same of attention."""
    wait_seconds: float = 0.0
    """What several devices wait for each other at least: two collectives per layer."""

    @property
    def seconds(self) -> float:
        """Of the step: max(bytes / bandwidth, FLOP / rate, collectives · latency)."""
        return max(self.read_seconds, self.compute_seconds or 0.0, self.wait_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.step.tokens / self.seconds

    @property
    def least_seconds(self) -> float:
        """Of the step, were all its tokens sent to the same experts: no step is shorter, whatever its routing."""
        read = self.read_seconds * self.step.least / self.step.total
        return max(read, self.compute_seconds or 0.0, self.wait_seconds)

    @property
    def most_per_second(self) -> float:
        """Tokens per second, were all sequences sent to the same experts."""
        return self.step.tokens / self.least_seconds

    @property
    def limit(self) -> str:
        """What the time goes to."""
        if self.wait_seconds > max(self.read_seconds, self.compute_seconds or 0.0):
            return WAIT
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
    attention = batch * attention_flops(sizes, context, latent=True)
    return bound_of(
        machine, sizes, storage, step, batch * forward_flops(sizes, counts, context, latent=True), attention
    )


def prefill_bound(
    machine: Machine,
    sizes: Sizes,
    counts: Counts,
    storage: Storage,
    length: int,
    load: Load | None = None,
    prompts: int = 1,
) -> Bound:
    """A pass over `prompts` prompts of `length` tokens each: its seconds are the time to their first tokens."""
    step = prefill_bytes(sizes, counts, storage, length * prompts, load)
    attention = prompts * length * mean_attention_flops(sizes, length)
    return bound_of(machine, sizes, storage, step, prompts * prefill_flops(sizes, counts, length), attention)


def wait_seconds(machine: Machine, sizes: Sizes) -> float:
    """Two collectives per layer, one after the other: no token passes a layer before its devices have talked twice."""
    if machine.devices == 1:
        return 0.0
    latency = LINK_LATENCY if machine.devices <= machine.node else NETWORK_LATENCY
    return 2 * len(sizes.windows) * latency


def bound_of(
    machine: Machine, sizes: Sizes, storage: Storage, step: StepBytes, flops: float, attention: float
) -> Bound:
    """Of a step that reads so much and computes so many FLOP, of which so many are scores and values.

    Attention multiplies activations with activations, in 16 bits, whatever the weights are held in.
    """
    rate, scores = machine.rate(storage.rate), machine.rate(ATTENTION_RATE)
    seconds = (flops - attention) / rate[1] + attention / scores[1] if rate and scores else None
    return Bound(
        step, flops, attention, step.total / machine.all_bandwidth, seconds, rate, scores, wait_seconds(machine, sizes)
    )
