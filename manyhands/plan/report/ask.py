"""What a person wants to know beyond the model: on which machine, at which context, for which price."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyhands.defaults import PLAN_CONTEXT, TOKENS_PER_DEVICE
from manyhands.plan.fit import Need, need
from manyhands.plan.storage import BF16, Storage
from manyhands.plan.traffic import Load

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from manyhands.plan.budget import Hits
    from manyhands.plan.estimate import Point
    from manyhands.plan.machine import Machine
    from manyhands.plan.network import Network
    from manyhands.plan.price import ApiPrice
    from manyhands.plan.routes import Recorded
    from manyhands.plan.subject import Subject

CONTEXTS = (1024, 4096, 32768, 131072)
"""That tables show."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to the planner. Contexts and prompts in tokens, prices in USD per device and hour."""

    context: int = PLAN_CONTEXT
    batch: int = 1
    prompt: int | None = None
    """Length of the prompt whose first token is waited for; None: the context."""
    storage: Storage = BF16
    """How the weights are held where one format is asked about."""
    kv_bits: float = 16
    machine: "Machine | None" = None
    load: Load | None = None
    memory: float | None = None
    """Bytes of a process that keeps its experts on disk."""
    disk: float | None = None
    """Bytes per second of reading experts, if the machine's are not meant."""
    hits: "Hits | None" = None
    """None: expected from the share of the experts that fits."""
    speculate: int | None = None
    """Drafts of a step; None: no speculation."""
    accepted: float = 1.0
    """Tokens that such a step gives."""
    price: float | None = None
    api_price: "ApiPrice | None" = None
    in_out: float = 3.0
    """Tokens in to one out."""
    cached: float = 0.0
    """Share of the input that is in a cache."""
    mixed: bool = False
    """Whether input and output are priced together."""
    tokens: float | None = None
    """To train on."""
    hours: float | None = None
    """Device hours that training took or may take."""
    train_memory: bool = False
    ep: int = 1
    """With it: devices that share out one set of experts."""
    utilisation: float = 0.4
    scale: bool = False
    devices: int | None = None
    """Expert-parallel devices; None: a few counts side by side."""
    tokens_per_device: int = TOKENS_PER_DEVICE
    imbalance: float = 1.0
    """Busiest over mean load."""
    network: "Network | None" = None
    """What joins any device with any other; None: the machine's links and network."""
    recorded: "Mapping[int, Recorded] | None" = None
    """What a trace says of a number of devices that share experts; None: uniform routing, and `imbalance`."""
    recorded_source: str = ""
    recorded_here: "Sequence[Point]" = ()
    """Speeds of this machine, where it is the one that is asked about."""
    flops: float | None = None
    """A training budget for the scaling law."""

    @property
    def disk_rate(self) -> float | None:
        """Bytes per second of reading experts: as given, or the machine's, at random where that was measured."""
        if self.disk is not None or self.machine is None:
            return self.disk
        return self.machine.disk_random or self.machine.disk

    @property
    def disk_source(self) -> str:
        """Where that is from."""
        if self.disk is not None or self.machine is None:
            return "as given"
        if self.machine.disk_assumed:
            return "assumed, one NVMe drive"
        return "measured, at random" if self.machine.disk_random else "measured or listed"

    @property
    def batches(self) -> list[int]:
        """The batch sizes that are shown."""
        return sorted({1, 8, 64, self.batch})

    def need(self, subject: "Subject", storage: Storage | None = None, batch: int | None = None) -> Need:
        """What must be in memory at once, by default in the format and for the batch that are asked about."""
        return need(
            subject.counts,
            subject.config,
            subject.sizes,
            storage or self.storage,
            batch=batch or self.batch,
            context=self.context,
            prompt=self.prompt_length,
            kv_bits=self.kv_bits,
        )

    def passes(self, subject: "Subject", prompts: int) -> Need:
        """What must be in memory while `prompts` prompts are read together."""
        return need(
            subject.counts,
            subject.config,
            subject.sizes,
            self.storage,
            batch=prompts,
            context=self.prompt_length,
            prompt=prompts * self.prompt_length,
            kv_bits=self.kv_bits,
        )

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self.prompt or self.context


def contexts(positions: int | None, chosen: int) -> list[int]:
    """The contexts that are shown: 1k, 4k, 32k, 128k as far as the model goes, and the chosen one."""
    usual = [c for c in CONTEXTS if positions is None or c <= positions]
    return sorted({*usual, chosen})


def short(context: int) -> str:
    """4096 is 4k, 131072 is 128k, 1048576 is 1M: k is 1024, as in `length`."""
    if context >= 1 << 20 and context % (1 << 20) == 0:
        return f"{context >> 20}M"
    return f"{context // 1024}k" if context % 1024 == 0 else f"{context:,}"
