"""A machine as five figures: memory, what it reads per second, what it multiplies per second, its links, its disk."""

import re
import tomllib
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field

from manyhands.config import Strict, parse, suggest
from manyhands.errors import ConfigError

Positive = Annotated[float, Field(gt=0.0, le=1e24)]
_COUNTED = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<devices>[1-9]\d{0,4})\s*[x*×]\s*(?P<name>.+)",
        r"(?P<name>.+?)\s*[x*×]\s*(?P<devices>[1-9]\d{0,4})",
    )
)
"""Several of one: 8xh100, h100x8."""
_MAKERS = re.compile(r"\b(nvidia|geforce|amd|radeon|instinct|intel|apple|google)\b")
_MEMORY = re.compile(r"(?<![a-z\d])(\d{1,4})\s*gi?b\b")
_LONGEST_NAME = 100
_RATES = {
    "fp4": ("fp4", "fp8", "bf16", "fp32"),
    "fp8": ("fp8", "bf16", "fp32"),
    "int8": ("int8", "bf16", "fp32"),
    "bf16": ("bf16", "fp32"),
    "fp32": ("fp32",),
}
"""For weights of a format, the matrix rates that can be used: its own and every wider one."""
RATES = tuple(_RATES)
"""Number formats that a machine may have a rate for."""


class Machine(Strict):
    """One or several equal devices. All figures are per device, bytes and FLOP per second; links per direction."""

    name: str
    title: str
    kind: Literal["cpu", "gpu", "unified"]
    devices: Annotated[int, Field(strict=True, ge=1, le=99_999)] = 1
    memory: Positive
    bandwidth: Positive
    rates: dict[str, Positive]
    """Dense FLOP/s by number format: bf16, fp4, fp8, int8, fp32. Empty: unknown."""
    link: Positive | None = None
    network: Positive | None = None
    node: Annotated[int, Field(strict=True, ge=1)] = 1
    """Devices that share the link; beyond it the network is used."""
    reserve: Annotated[float, Field(ge=0, le=1e24)] | None = None
    """Bytes that no model can have; None: by the kind of machine (`fit.py`)."""
    disk: Positive | None = None
    """Read in order."""
    disk_random: Positive | None = None
    """Records of a MiB at random places, 4 at a time."""
    disk_assumed: bool = False
    power: Positive | None = None
    """Watts that a device may draw at most; None: not known."""
    power_source: str = "as given"
    source: str

    def rate(self, wanted: str) -> tuple[str, float] | None:
        """(format, FLOP/s of all devices) of the fastest rate that can compute with such weights; None if unknown."""
        usable = [(self.rates[name], name) for name in _RATES[wanted] if name in self.rates]
        if not usable:
            return None
        best, name = max(usable)
        return name, best * self.devices

    @property
    def all_memory(self) -> float:
        """Bytes of all devices."""
        return self.memory * self.devices

    @property
    def all_bandwidth(self) -> float:
        """Bytes per second of all devices, each reading its own share."""
        return self.bandwidth * self.devices


def machine_names() -> list[str]:
    """The names of the table."""
    return sorted(name for name in _table() if name != "assumed")


def machine_named(text: str) -> Machine:
    """A machine of the table; `h100x8` and `8xH100` are eight of them.

    Spaces, hyphens, capitals and makers' names do not matter, and a card may be named with its memory (`H100 80GB`).
    Raises `ConfigError` with the nearest name.
    """
    table, found = _table(), _found(text)
    if found is None:
        near = suggest(text.casefold()[:_LONGEST_NAME], machine_names())
        raise ConfigError(
            f"unknown machine {text!r}; {near}, each also as NAMExN, FILE.toml, or 'here' to measure this one"
        )
    base, devices = found
    values = {"name": base if devices == 1 else f"{base}x{devices}", "devices": devices, **table[base]}
    values.pop("also", None)
    if "disk" not in values:
        values |= assumed_disk()
    if devices > 1:
        values["title"] = f"{devices} x {values['title']}"
    return parse(Machine, values, f"machine {base}")


def assumed_disk() -> dict[str, Any]:
    """Fields of a machine whose disk nobody named."""
    return {"disk": _table()["assumed"]["disk"], "disk_assumed": True}


def _found(text: str) -> tuple[str, int] | None:
    """(name in the table, how many) that a person means."""
    text = " ".join(text.casefold().split())
    if len(text) > _LONGEST_NAME:
        return None
    if (name := _one(text)) is not None:
        return name, 1
    for pattern in _COUNTED:
        if (several := pattern.fullmatch(text)) and (name := _one(several["name"])) is not None:
            return name, int(several["devices"])
    return None


def _one(text: str) -> str | None:
    """The table's name of one device. Raises `ConfigError` if it is named with memory that it does not have."""
    names = _spellings()
    if (name := names.get(_plain(text))) is not None or (size := _MEMORY.search(text)) is None:
        return name
    name = names.get(_plain(_MEMORY.sub("", text)))
    if name is not None and not re.search(rf"\b{size[1]} GB", title := _table()[name]["title"]):
        raise ConfigError(f"machine {text!r}: the table has {title}; say --machine {name} --memory-size {size[1]}GiB")
    return name


def _spellings() -> dict[str, str]:
    """The table's name by every name of a machine, as `_plain` writes it."""
    table = _table()
    return {_plain(text): name for name in machine_names() for text in (name, *table[name].get("also", ()))}


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _MAKERS.sub("", text))


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((resources.files("manyhands.plan") / "machines.toml").read_text(encoding="utf-8"))
