"""`--network`: α and 1/β as a person writes them, the file of a measurement, or the links of a known machine."""

import re
from pathlib import Path
from typing import NamedTuple

from manyhands.cli.size import size
from manyhands.errors import ConfigError, UserError
from manyhands.plan.network import Network

_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|ms|us|µs|ns)")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_MOST_BYTES = 1 << 16


class Ways(NamedTuple):
    """How devices talk."""

    between: Network
    """Nodes, or all of them."""
    within: Network | None = None
    """A node, where that is another way."""
    node: int | None = None
    """Devices of a node."""


def ways(text: str) -> Ways:
    """Raises `UserError` that says what would be right."""
    if "," in text:
        return Ways(_given(text))
    if text.endswith(".json"):
        from manyhands.config import parse
        from manyhands.strict_json import read_object

        return Ways(parse(Network, read_object(Path(text), _MOST_BYTES, ConfigError), text))
    from manyhands.plan.machine import machine_named
    from manyhands.plan.roof import LINK_LATENCY, NETWORK_LATENCY

    machine = machine_named(text)
    if machine.link is None:
        raise ConfigError(f"--network {text}: no link between devices is known of {machine.title}")
    link = Network(latency=LINK_LATENCY, bandwidth=machine.link, source=f"a link of {machine.title}")
    if machine.network is None:
        return Ways(link)
    between = Network(latency=NETWORK_LATENCY, bandwidth=machine.network, source=f"the network of {machine.title}")
    return Ways(between, link, machine.node)


def _given(text: str) -> Network:
    latency, _, rate = (part.strip() for part in text.partition(","))
    found = _TIME.fullmatch(latency)
    if found is None:
        raise UserError(f"--network {text}: expected LATENCY,RATE like 20us,5GB/s")
    bandwidth = size("--network", rate.removesuffix("/s"))
    assert bandwidth is not None
    return Network(latency=float(found[1]) * _SECONDS[found[2]], bandwidth=bandwidth, source="as given")
