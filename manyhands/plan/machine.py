"""A machine as five figures: memory, what it reads per second, what it multiplies per second, its links, its disk."""

import re
import tomllib
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field

from manyhands.config import Strict, parse, suggest
from manyhands.errors import ConfigError

Positive = Annotated[float, Field(gt=0.0, le=1e24)]
_COUNTED = re.compile(r"(?P<name>.+?)x(?P<devices>[1-9]\d{0,4})")
_RATES = {"fp8": ("fp8", "bf16", "fp32"), "int8": ("int8", "bf16", "fp32"), "bf16": ("bf16", "fp32"), "fp32": ("fp32",)}
"""For weights of a format, the matrix rates that can be used: its own and every wider one."""


class Machine(Strict):
    """One or several equal devices. All figures are per device, bytes and FLOP per second; links per direction."""

    name: str
    title: str
    kind: Literal["cpu", "gpu", "unified"]
    devices: Annotated[int, Field(strict=True, ge=1, le=99_999)] = 1
    memory: Positive
    bandwidth: Positive
    rates: dict[str, Positive]
    """Dense FLOP/s by number format: bf16, fp8, int8, fp32. Empty: unknown."""
    link: Positive | None = None
    network: Positive | None = None
    node: Annotated[int, Field(strict=True, ge=1)] = 1
    """Devices that share the link; beyond it the network is used."""
    disk: Positive | None = None
    """Read in order."""
    disk_random: Positive | None = None
    """Records of a MiB at random places, 4 at a time."""
    disk_assumed: bool = False
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


def machine_named(name: str) -> Machine:
    """A machine of the table; `h100x8` is eight of them. Raises `ConfigError` with the nearest name."""
    table, devices, base = _table(), 1, name
    if name not in table and (counted := _COUNTED.fullmatch(name)):
        base, devices = counted["name"], int(counted["devices"])
    if base not in table or base == "assumed":
        near = suggest(base, machine_names())
        known = "" if near.startswith("allowed") else f" Known: {', '.join(machine_names())}"
        raise ConfigError(
            f"unknown machine {name!r}; {near}{known}, each also as NAMExN, or 'here' to measure this one"
        )
    values = {"name": name, "devices": devices, **table[base]}
    if "disk" not in values:
        values |= {"disk": table["assumed"]["disk"], "disk_assumed": True}
    if devices > 1:
        values["title"] = f"{devices} x {values['title']}"
    return parse(Machine, values, f"machine {name}")


def _table() -> dict[str, Any]:
    return tomllib.loads((resources.files("manyhands.plan") / "machines.toml").read_text(encoding="utf-8"))
