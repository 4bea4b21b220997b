"""What a person wants of a model and a machine, and one model in one format held against it.

A `Case` keeps what does not depend on the machine: thousands of machines and numbers of devices are held against it.
"""

from dataclasses import dataclass, field, replace

from manyhands.plan.cache import sequence_bytes
from manyhands.plan.compute import attention_flops, forward_flops, mean_attention_flops, prefill_flops
from manyhands.plan.fit import Need, activation_bits
from manyhands.plan.machine import Machine
from manyhands.plan.offload import routed_bytes
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import BF16, Storage, weight_bytes
from manyhands.plan.subject import Subject
from manyhands.plan.tiers import LAYOUTS, Layout
from manyhands.plan.traffic import StepBytes, decode_bytes, expert_bytes, prefill_bytes
from manyhands.plan.working import working_bytes

PASS_TOKENS = 4096
"""Tokens of prompts that go through a model together; longer prompts are read in pieces."""
SLOWEST = 1.0
"""Tokens per second of a sequence below which nothing is offered unless it is asked for."""
Work = tuple[StepBytes, float, float]
"""(bytes read, FLOP, of which scores and values) of one step."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One question. Tokens, seconds, USD; None: not asked."""

    context: int
    """Positions of each sequence at its end."""
    prompt: int
    """Tokens that are read before the first one is written."""
    answer: int | None = None
    """Tokens that are written; None: their price is that of decoding alone."""
    users: int = 1
    """Sequences decoded together."""
    kv_bits: float = 16
    speed: float = SLOWEST
    """Tokens per second of each user, at least."""
    first: float | None = None
    """Seconds to the first token of one prompt, at most."""
    per_hour: float | None = None
    per_million: float | None = None
    """Of tokens written."""
    layouts: tuple[Layout, ...] = LAYOUTS
    devices: int | None = None
    """May be bought up to so many, of each machine; None: what is named is what there is."""


@dataclass(slots=True)
class Case:
    """One model in one format, for one wish."""

    id: str
    """What `--machine`'s neighbour MODEL would be called: a name of the catalogue or a file."""
    subject: Subject
    storage: Storage
    wish: Wish
    weights: float = 0.0
    routed: float = 0.0
    sequence: float = 0.0
    working: float = 0.0
    native_bits: float = 16.0
    only_at: str | None = None
    """A matrix rate without which a machine is not offered in this format."""
    _decoded: dict[int, Work] = field(default_factory=dict)
    _read: dict[int, Work] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Counts what all machines have in common."""
        counts, config, storage = self.subject.counts, self.subject.config, self.storage
        self.weights = weight_bytes(counts, storage)
        self.routed = routed_bytes(counts, storage)
        self.sequence = sequence_bytes(self.sizes, self.wish.context, self.wish.kv_bits)
        if config is not None:
            self.working = working_bytes(config, min(self.wish.prompt, PASS_TOKENS), activation_bits(storage))
        self.native_bits = weight_bytes(counts, self.subject.native or BF16) * 8 / counts.total

    @property
    def sizes(self) -> Sizes:
        """A model without them is no candidate."""
        assert self.subject.sizes is not None
        return self.subject.sizes

    @property
    def bits(self) -> float:
        """Bits per weight, on average."""
        return self.weights * 8 / self.subject.counts.total

    @property
    def kept(self) -> float:
        """Of the bits that were published, the share that is kept; 1 as published or wider."""
        return min(1.0, self.bits / self.native_bits)

    @property
    def native(self) -> bool:
        """Whether this is how the weights are published."""
        return self.subject.native is not None and self.storage == self.subject.native

    def reads(self, machine: Machine) -> bool:
        """Whether the format is one for that machine."""
        return self.only_at is None or self.only_at in machine.rates

    def need(self, users: int) -> Need:
        """Bytes in memory at once."""
        return Need(self.weights, users * self.sequence, self.working)

    def layer(self, users: int) -> float:
        """Bytes of the experts that a step wants in one layer."""
        one = expert_bytes(self.sizes, self.subject.counts, self.storage)
        return self.decoded(users)[0].distinct * one

    def decoded(self, users: int) -> Work:
        """One step of decoding."""
        if users not in self._decoded:
            sizes, counts, wish = self.sizes, self.subject.counts, self.wish
            step = decode_bytes(sizes, counts, self.storage, batch=users, context=wish.context, kv_bits=wish.kv_bits)
            flops = users * forward_flops(sizes, counts, wish.context, latent=True)
            self._decoded[users] = step, flops, users * attention_flops(sizes, wish.context, latent=True)
        return self._decoded[users]

    def read(self, prompts: int) -> Work:
        """One pass over so many prompts."""
        if prompts not in self._read:
            sizes, counts, length = self.sizes, self.subject.counts, self.wish.prompt
            step = prefill_bytes(sizes, counts, self.storage, prompts * length)
            attention = prompts * length * mean_attention_flops(sizes, length)
            self._read[prompts] = step, prompts * prefill_flops(sizes, counts, length), attention
        return self._read[prompts]

    def at(self, context: int) -> "Case":
        """The same for another context, and a prompt that leaves room for it."""
        wish = replace(self.wish, context=context, prompt=min(self.wish.prompt, context))
        return Case(self.id, self.subject, self.storage, wish, only_at=self.only_at)
