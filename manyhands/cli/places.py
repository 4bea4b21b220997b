"""`choose`'s machines: named, described, this one, or any; with their hosts and prices."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.cli.machines import Changes, machine_asked, read_machine, recorded_here
from manyhands.cli.size import size, sold_size
from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from manyhands.plan.machine import Machine
    from manyhands.plan.offer import Place

_PLAIN = "laptop-ddr5"
"""Whose bandwidth is assumed of a computer of which only the memory is said."""
_HOST = "desktop-ddr5"
"""Assumed around a GPU of the table."""
LEAST = 64 << 20
"""Bytes of a computer: `--memory 16` is a slip."""
_PRICE = re.compile(r"(?:(?P<name>[^=]+)=)?(?P<usd>\d{1,9}(?:\.\d{1,9})?)")


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says of machines."""

    machines: list[str]
    memory: str | None
    bandwidth: str | None
    disk: str | None
    host: str | None
    devices: int | None
    prices: list[str]
    quiet: bool

    @property
    def most_devices(self) -> int | None:
        """That may be had of one kind; None: what is named."""
        from manyhands.plan.candidates import ANY_DEVICES

        return self.devices or (ANY_DEVICES if "any" in self.machines else None)


def places_asked(given: Given) -> "list[Place]":
    """Each machine once. Raises `UserError`."""
    from manyhands.plan.offer import Place

    if given.bandwidth and not given.memory and not given.machines:
        raise ConfigError("--bandwidth goes with --memory or --machine")
    machines = _machines(given)
    own = (given.memory, given.bandwidth)
    if len(machines) > 1 and any(own):
        raise ConfigError(f"{'--memory' if given.memory else '--bandwidth'} is about one machine: name one")
    if given.host is not None and all(machine.kind != "gpu" for machine in machines):
        raise ConfigError(f"--host goes with a GPU: {machines[0].title} is a computer itself")
    prices = _prices(given.prices, machines)
    disk = _rate("--disk", given.disk)
    found = []
    for machine in machines:
        recorded = recorded_here(machine)
        if given.devices is not None and machine.devices > given.devices:
            raise ConfigError(f"--devices {given.devices}: {machine.name} is {machine.devices} already")
        if disk is not None:
            machine = machine.model_copy(update={"disk": disk, "disk_random": None, "disk_assumed": False})
        found.append(
            Place(machine, _host(machine, given.host), prices.get(machine.name, prices.get("")), recorded=recorded)
        )
    return found


def _machines(given: Given) -> "list[Machine]":
    from manyhands.plan.candidates import every_machine

    if not given.machines and given.memory is not None:
        return [_computer(given.memory, given.bandwidth)]
    names = given.machines or ["here"]
    if "any" in names:
        if len(names) > 1:
            raise ConfigError("--machine any is all of them: leave the others out")
        return every_machine()
    update: dict[str, Any] = {}
    if (memory := sold_size("--memory", given.memory)) is not None:
        update["memory"] = float(memory)
    if (rate := _rate("--bandwidth", given.bandwidth)) is not None:
        update["bandwidth"] = rate
    found: dict[str, Machine] = {}
    for name in names:
        machine = machine_asked(name, Changes(), needed=True, quiet=given.quiet)
        assert machine is not None
        if update:
            said = " and ".join(text for text in (given.memory, given.bandwidth) if text)
            machine = machine.model_copy(update=update | {"title": f"{machine.title}, {said} as given"})
        found.setdefault(machine.name, machine)
    return list(found.values())


def _computer(memory: str, bandwidth: str | None) -> "Machine":
    """One of which a person knows the memory."""
    from manyhands.format import show
    from manyhands.plan.machine import machine_named

    plain = machine_named(_PLAIN)
    size_ = sold_size("--memory", memory)
    if size_ is None or size_ < LEAST:
        raise ConfigError(f"--memory {memory}: expected at least 64MB, such as 16GB")
    rate = _rate("--bandwidth", bandwidth)
    how = "as given" if rate is not None else "assumed: two channels DDR5-5600; --bandwidth or --machine says better"
    update = {
        "name": "computer",
        "title": f"a computer with {size_ / 2**30:.4g} GiB, {show(rate or plain.bandwidth, 'B/s')} {how}",
        "memory": float(size_),
        "bandwidth": rate or plain.bandwidth,
        "source": "as given",
    }
    return plain.model_copy(update=update)


def _host(machine: "Machine", asked: str | None) -> "Machine | None":
    """The computer around a GPU: as asked, as measured, else assumed. Raises `ConfigError`."""
    from manyhands.plan.machine import machine_named

    if machine.kind != "gpu" or asked == "none":
        return None
    if asked is not None:
        found = read_machine(Path(asked)) if asked.endswith(".toml") else machine_named(asked)
        if found.kind == "gpu":
            raise ConfigError(f"--host {asked}: {found.title} is a GPU; a host is a computer, such as desktop-ddr5")
        return found
    if machine.name == "here":
        from manyhands.plan.remember import remembered

        here = remembered()
        return here.processor if here is not None else None
    assumed = machine_named(_HOST)
    return assumed.model_copy(update={"title": f"{assumed.title} (assumed)"})


def _rate(flag: str, text: str | None) -> float | None:
    found = size(flag, text.removesuffix("/s")) if text is not None else None
    return float(found) if found is not None else None


def _prices(texts: list[str], machines: "list[Machine]") -> dict[str, float]:
    """USD per device and hour by machine's name; of all machines under the empty name."""
    from manyhands.plan.machine import machine_named

    names = {machine.name.removesuffix(f"x{machine.devices}"): machine.name for machine in machines}
    found: dict[str, float] = {}
    for text in texts:
        read = _PRICE.fullmatch(text.strip())
        if read is None or not float(read["usd"]) > 0:
            raise ConfigError(f"--price {text}: expected USD per device and hour, such as 2.5 or h100=2.5")
        name = ""
        if read["name"] is not None:
            name = read["name"].strip()
            name = name if name in names else machine_named(name).name
            if name not in names:
                raise ConfigError(f"--price {text}: {name} is not among the machines: --machine {name} asks about it")
            name = names[name]
        found[name] = float(read["usd"])
    return found
