"""Speeds that others measured and published, each beside our bound: `published_speeds.toml`.

They keep the bound honest (it may never lie below a measured speed), and their shares of it are what an estimate starts
from on a machine where nothing was measured.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from manyhands.config import Strict, parse
from manyhands.plan.machine import Machine, Positive, machine_named
from manyhands.plan.roof import Bound, decode_bound, prefill_bound
from manyhands.plan.storage import CLASSES, Storage, storage_named, weight_bytes

if TYPE_CHECKING:
    from manyhands.plan.subject import Subject

Work = Literal["decode", "prefill"]
Count = Annotated[int, Field(strict=True, ge=1)]


class PublishedSpeed(Strict):
    """One measurement, as its source tells it."""

    model: str
    """Id in the catalogue."""
    machine: str
    host: str | None = None
    """The machine whose memory holds the routed experts, where that is not the first one's."""
    in_turns: bool = False
    """Of several devices one works at a time: each holds some of the layers."""
    work: Work = "decode"
    batch: Count = 1
    """Sequences that decode together; prompts in a pass."""
    context: Count
    """Positions that a decoded token sees, on average; tokens of a prompt."""
    format: str
    bits: dict[str, Annotated[float, Field(ge=0.5, le=64)]] = Field(default_factory=dict)
    """Bits per weight that differ from the format's, by class of tensor or by component."""
    kv_bits: Annotated[float, Field(ge=1, le=32)] = 16
    gib: Positive | None = None
    """Size of the file."""
    tokens_per_second: Positive
    """Of all sequences, or of all prompts, together."""
    engine: str
    date: Annotated[str, Field(pattern=r"^\d{4}(-\d{2}){0,2}$")] | None = None
    """When, as far as the source says."""
    url: Annotated[str, Field(pattern=r"^https://\S+$")]
    note: str


@dataclass(frozen=True, slots=True)
class Compared:
    """A published speed beside the bound."""

    speed: PublishedSpeed
    model: str
    """The catalogue's name."""
    machine: Machine
    bound: Bound
    layers: int
    file_bytes: float
    """What the planner computes for the weights."""

    @property
    def alone(self) -> Bound:
        """The bound of the devices that work at a time."""
        times = self.machine.devices if self.speed.in_turns else 1
        compute = self.bound.compute_seconds
        return replace(
            self.bound,
            read_seconds=self.bound.read_seconds * times,
            compute_seconds=None if compute is None else compute * times,
        )

    @property
    def share(self) -> float:
        """Measured over what no routing could exceed: at most 1."""
        return self.speed.tokens_per_second / self.bound.most_per_second

    @property
    def of_uniform(self) -> float:
        """Measured over the roof of uniform routing, which a batch whose tokens resemble each other can exceed."""
        return self.speed.tokens_per_second / self.bound.tokens_per_second


@cache
def published_speeds() -> tuple[PublishedSpeed, ...]:
    """All of them, in the order of the file."""
    text = (resources.files("manyhands.plan") / "published_speeds.toml").read_text(encoding="utf-8")
    found = []
    for source in tomllib.loads(text)["source"]:
        shared = {name: value for name, value in source.items() if name != "speeds"}
        where = f"published speeds of {source['url']}"
        found += [parse(PublishedSpeed, shared | speed, where) for speed in source["speeds"]]
    return tuple(found)


def compared(speed: PublishedSpeed) -> Compared:
    """Beside the bound of the same model, machine, format, batch and context."""
    subject, machine = _subject(speed.model), machine_named(speed.machine)
    sizes, counts = subject.sizes, subject.counts
    assert sizes is not None, speed.model
    storage = _storage(speed.format, speed.bits, subject.native)
    if speed.work == "decode":
        bound = decode_bound(
            machine, sizes, counts, storage, batch=speed.batch, context=speed.context, kv_bits=speed.kv_bits
        )
    else:
        bound = prefill_bound(machine, sizes, counts, storage, speed.context, prompts=speed.batch)
    if speed.host is not None:
        bound = experts_in_host(bound, machine, machine_named(speed.host))
    return Compared(speed, subject.name, machine, bound, len(sizes.windows), weight_bytes(counts, storage))


@cache
def all_compared() -> tuple[Compared, ...]:
    """Every published speed beside its bound."""
    return tuple(compared(speed) for speed in published_speeds())


@cache
def _subject(model: str) -> "Subject":
    from manyhands.catalog import load
    from manyhands.plan.subject import of_catalogue

    return of_catalogue(load(model))


def experts_in_host(bound: Bound, machine: Machine, host: Machine) -> Bound:
    """The bound where the host's memory holds every routed expert and the device all else: both read at once."""
    step = bound.step
    seconds = max(step.experts / host.all_bandwidth, (step.total - step.experts) / machine.all_bandwidth)
    return replace(bound, read_seconds=seconds)


def _storage(name: str, bits: Mapping[str, float], native: Storage | None) -> Storage:
    storage = storage_named(name, native)
    classes: dict[str, Any] = {part: value for part, value in bits.items() if part in CLASSES}
    parts = tuple((part, value) for part, value in bits.items() if part not in CLASSES)
    return replace(storage, **classes, parts=(*parts, *storage.parts)) if bits else storage
