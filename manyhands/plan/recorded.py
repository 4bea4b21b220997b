"""Speeds that this machine reached, as `bench` and `doctor --speeds` found them: estimates here are fitted on them.

Kept beside the machine's measurement. A speed is remembered as what its step read and computed, so that its bound
follows from the machine's figures as they are now.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from manyhands.config import Strict, parse
from manyhands.errors import ConfigError
from manyhands.files import write_atomic
from manyhands.plan.estimate import DECODE, Kind, Point
from manyhands.plan.here import Here, machine_key
from manyhands.plan.host import cache_file
from manyhands.plan.machine import Machine
from manyhands.plan.roof import ATTENTION_RATE, Bound
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import Storage
from manyhands.strict_json import read_object
from manyhands.version import __version__

MOST = 500
"""Speeds that are kept: the newest."""
BUSY = 0.75
"""Load average per core above which a speed says more of other programs than of the machine."""
_LIMIT = 1 << 20
_VERSION = 1

Count = Annotated[int, Field(strict=True, ge=1, le=1 << 40)]
Amount = Annotated[float, Field(ge=0.0, le=1e30)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class RecordedSpeed(Strict):
    """One kind of step of one model."""

    model: Name
    format: Name
    """As `format_kind` has it."""
    work: Literal["decode", "prefill"]
    batch: Count
    """Sequences."""
    context: Count
    """Positions that a decoded token sees on average, or tokens of the prompt."""
    layers: Count
    bytes: Amount
    """That the step reads."""
    flops: Amount
    attention: Amount
    """FLOP of them that are scores and values."""
    rate: Literal["fp32", "bf16", "int8"]
    """The matrix rate of the machine that multiplies such weights."""
    seconds: Annotated[float, Field(gt=0.0, le=1e6)]
    """That the step took."""
    threads: Count
    program: Name
    """The version that was measured."""
    when: Name

    @property
    def case(self) -> tuple[object, ...]:
        """A newer speed of the same case takes the place of an older one."""
        return self.model, self.format, self.work, self.batch, self.context, self.threads, self.program

    def point(self, machine: Machine) -> Point:
        """Beside the bound on this machine."""
        rate, scores = machine.rate(self.rate), machine.rate(ATTENTION_RATE)
        compute = (self.flops - self.attention) / rate[1] + self.attention / scores[1] if rate and scores else 0.0
        bound = max(self.bytes / machine.all_bandwidth, compute)
        kind = Kind(self.work, many=self.batch > 1 and self.work == DECODE, host=True, format=self.format)
        return Point(self.model, kind, bound / self.layers, self.seconds / self.layers)


class _Speeds(Strict):
    """The file."""

    version: Literal[1]
    key: str
    """Of the machine, as its measurement has it."""
    speeds: Annotated[tuple[RecordedSpeed, ...], Field(max_length=MOST)]


def format_kind(storage: Storage, *, sparse: bool) -> str:
    """Formats whose kernels lose alike: of most weights; those of 16 and 32 bits are run packed or as plain tensors."""
    width = _width(storage.routed if sparse else storage.linear)
    packed = storage.name == "packed" or storage.name.startswith("manyhands-")
    return f"{width} bits, packed" if packed and width >= 16 else f"{width} bits"


def _width(bits: float) -> int:
    """Of the kernels that run weights of so many bits, scales and padding counted."""
    return 4 if bits <= 7 else 8 if bits <= 12 else 16 if bits <= 24 else 32


def speed_of(
    bound: Bound,
    seconds: float,
    *,
    model: str,
    sizes: Sizes,
    storage: Storage,
    work: Literal["decode", "prefill"],
    batch: int,
    context: float,
    threads: int,
) -> RecordedSpeed:
    """What is remembered of a step that took `seconds`."""
    sparse, layers = bool(sizes.num_experts), len(sizes.windows)
    width = _width(max(storage.linear, storage.routed if sparse else 0.0))
    return RecordedSpeed(
        model="".join(letter for letter in model if letter.isprintable())[:200] or "a model",
        format=format_kind(storage, sparse=sparse),
        work=work,
        batch=batch,
        context=max(1, round(context)),
        layers=layers,
        bytes=bound.step.total,
        flops=bound.flops,
        attention=bound.attention,
        rate="fp32" if width == 32 else "bf16" if width == 16 else "int8",
        seconds=seconds,
        threads=threads,
        program=__version__,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def speeds_file() -> Path:
    """Where they are kept."""
    return cache_file().with_name("speeds.json")


def recorded_speeds() -> tuple[RecordedSpeed, ...]:
    """Those of this machine, the oldest first; none for a file that cannot be read or is another machine's."""
    try:
        found = parse(_Speeds, read_object(speeds_file(), _LIMIT, ConfigError))
    except ConfigError:
        return ()
    return found.speeds if found.key == machine_key() else ()


def record(speeds: Iterable[RecordedSpeed]) -> None:
    """Remember them in place of older ones of the same cases. Raises `StorageError` if the disk refuses."""
    known = {speed.case: speed for speed in recorded_speeds()}
    for speed in speeds:
        known.pop(speed.case, None)
        known[speed.case] = speed
    kept = [speed.model_dump(mode="json") for speed in list(known.values())[-MOST:]]
    text = json.dumps({"version": _VERSION, "key": machine_key(), "speeds": kept}, indent=1)
    write_atomic(speeds_file(), text + "\n")


def recorded_points(here: Here, speeds: Sequence[RecordedSpeed] | None = None) -> list[Point]:
    """What this version did on this machine's processor, with as many threads as it was measured with."""
    speeds = recorded_speeds() if speeds is None else speeds
    usable = [speed for speed in speeds if speed.threads == here.threads and speed.program == __version__]
    return [speed.point(here.processor) for speed in usable]


def why_not(here: Here, threads: int, load: float | None) -> str | None:
    """Why a speed measured now would mislead; None: it is worth remembering."""
    if threads != here.threads:
        return f"{threads} threads here, {here.threads} when the machine was measured: manyhands doctor --again"
    if load is not None and load > BUSY * here.cores:
        return f"the machine is busy: load average {load:.1f} on {here.cores} cores"
    return None
