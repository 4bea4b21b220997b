"""`--machine`: a name, a file, or this machine, with figures changed by hand."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.cli.size import size
from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from manyhands.plan.estimate import Point
    from manyhands.plan.machine import Machine

_MOST_BYTES = 1 << 16
_SIZES = ("memory", "reserve")
_SPEEDS = ("bandwidth", "link", "network", "disk", "disk_random")


@dataclass(frozen=True, slots=True)
class Changes:
    """What a person says of a machine in place of the table's figures."""

    memory: str | None = None
    """Of one device: 64GiB."""
    bandwidth: str | None = None
    """Of one device: 400GB/s."""
    count: int | None = None
    """Devices."""

    def of(self, machine: "Machine | None") -> "Machine | None":
        """`machine` with the changes, and its title saying so. Raises `UserError`."""
        given = {"--memory-size": self.memory, "--bandwidth": self.bandwidth, "--count": self.count}
        said = [flag for flag, value in given.items() if value is not None]
        if machine is None or not said:
            if said:
                raise ConfigError(f"{said[0]} goes with --machine")
            return machine
        if self.count is not None and machine.devices > 1:
            raise ConfigError(f"--count {self.count}: {machine.name} is {machine.devices} devices already: say it once")
        update: dict[str, Any] = {}
        if (memory := size("--memory-size", self.memory)) is not None:
            update["memory"] = float(memory)
        if self.bandwidth is not None:
            update["bandwidth"] = _speed("--bandwidth", self.bandwidth)
        title = machine.title
        if update:
            title += ", " + " and ".join(text for text in (self.memory, self.bandwidth) if text) + " as given"
        if self.count is not None and self.count > 1:
            update |= {"devices": self.count, "name": f"{machine.name}x{self.count}"}
            title = f"{self.count} x {title}"
        return machine.model_copy(update={**update, "title": title})


def machine_asked(name: str | None, changes: Changes, *, needed: bool, quiet: bool) -> "Machine | None":
    """The machine asked for; this one if it was measured before and none was asked for. Raises `UserError`."""
    if name is not None and name.endswith(".toml"):
        return changes.of(read_machine(Path(name)))
    if name is not None and name != "here":
        from manyhands.plan.machine import machine_named

        return changes.of(machine_named(name))
    from manyhands.plan.host import cache_file

    if name is None and not needed and not cache_file().exists():
        return changes.of(None)
    from manyhands.plan.remember import measured, remembered

    if name == "here":
        return changes.of(measured(quiet=quiet).machine)
    known = remembered()
    if known is None and needed:
        raise ConfigError("this needs a machine: give --machine here, or a name such as h100x8")
    return changes.of(known.machine if known is not None else None)


def recorded_here(machine: "Machine | None") -> "list[Point]":
    """Speeds that this machine reached, if `machine` is its processor as it was measured, with nothing changed."""
    if machine is None or machine.name != "here" or machine.kind != "cpu":
        return []
    from manyhands.plan.recorded import recorded_points
    from manyhands.plan.remember import remembered

    known = remembered()
    return recorded_points(known) if known is not None and known.processor == machine else []


def read_machine(path: Path) -> "Machine":
    """A machine in a file with the fields of the table; `memory` and `bandwidth` are enough.

    Sizes are bytes or text (`64GiB`), speeds bytes per second or text (`400GB/s`). Raises `ConfigError`.
    """
    from manyhands.config import parse
    from manyhands.plan.machine import RATES, Machine, assumed_disk

    values = _read(path)
    for field in ("memory", "bandwidth"):
        if field not in values:
            raise ConfigError(f'{path}: {field} is missing: memory = "64GiB" and bandwidth = "400GB/s" are enough')
    for field in (*_SIZES, *_SPEEDS):
        if isinstance(text := values.get(field), str):
            values[field] = size(f"{path}: {field}", text) if field in _SIZES else _speed(f"{path}: {field}", text)
    named = {"name": path.stem, "title": path.stem, "kind": "cpu", "rates": {}, "source": f"as given in {path.name}"}
    values = named | values
    for field in ("name", "title", "source"):
        if not (isinstance(text := values[field], str) and text.isprintable() and 0 < len(text) <= 200):
            raise ConfigError(f"{path}: {field} must be one line of up to 200 characters")
    if isinstance(rates := values["rates"], dict) and (wrong := [name for name in rates if name not in RATES]):
        raise ConfigError(f"{path}: rates.{wrong[0]}: expected one of {', '.join(RATES)}")
    if "disk" not in values:
        values |= assumed_disk()
    if "node" not in values:
        values["node"] = values.get("devices", 1)
    machine = parse(Machine, values, str(path))
    return (
        machine
        if machine.devices == 1
        else machine.model_copy(update={"title": f"{machine.devices} x {machine.title}"})
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"{path}: more than {_MOST_BYTES >> 10} KiB is too long for a machine")
        return tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {str(error)[:200]}") from None


def _speed(what: str, text: str) -> float:
    found = size(what, text.removesuffix("/s"))
    assert found is not None
    return float(found)
