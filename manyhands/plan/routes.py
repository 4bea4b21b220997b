"""The ways that a token's copies take between devices, and what each costs.

R devices share one set of E experts, T tokens per device, K experts per token, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from manyhands.plan.machine import Machine
from manyhands.plan.network import Network
from manyhands.plan.parallel import distinct_shards, remote_copies
from manyhands.plan.roof import LINK_LATENCY, NETWORK_LATENCY
from manyhands.plan.sizes import Sizes

NODE, NET, LINKS = "node", "net", "links"


@dataclass(frozen=True, slots=True)
class Fabric:
    """How devices talk: within a node, and beyond."""

    link: Network
    network: Network | None
    """None: there is one node."""
    node: int
    """Devices of one."""

    @classmethod
    def of(cls, machine: Machine, given: Network | None = None) -> "Fabric | None":
        """Of a machine, or as `given`: then all devices are alike. None where nobody says."""
        if given is not None:
            return cls(given, None, _ANY)
        if machine.link is None:
            return None
        link = Network(latency=LINK_LATENCY, bandwidth=machine.link)
        beyond = machine.network and Network(latency=NETWORK_LATENCY, bandwidth=machine.network)
        return cls(link, beyond or None, machine.node)

    def whole(self, devices: int) -> bool:
        """Whether so many are a part of one node, or whole nodes that a network joins."""
        return devices <= self.node or (self.network is not None and devices % self.node == 0)

    @property
    def alike(self) -> bool:
        """Whether any device reaches any other in one way."""
        return self.node == _ANY


_ANY = 1 << 30


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a trace says of R devices, where uniform routing would be assumed: means over layers."""

    load: float
    """Pairs computed by the busiest device over the mean one."""
    copies: Mapping[str, float] = field(default_factory=dict)
    """Rows per token that leave their device (node), by way."""
    port: Mapping[str, float] = field(default_factory=dict)
    """Rows of the busiest device, in its busier direction, over the mean one's, by way."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way: several are gone at the same time."""

    how: str
    copies: float
    """Per token."""
    imbalance: float
    """Busiest over mean device."""
    over: Network

    def bytes(self, tokens: int, width: int, element: float) -> float:
        """Of one layer and direction, from the mean device: T·copies·D·bytes."""
        return tokens * self.copies * width * element

    def seconds(self, tokens: int, width: int, element: float, collectives: float = 1) -> float:
        """Of one layer and direction: the busiest device's bytes."""
        return self.over.seconds(self.bytes(tokens, width, element) * self.imbalance, collectives)


def routes(
    sizes: Sizes, fabric: Fabric, devices: int, imbalance: float = 1.0, recorded: Recorded | None = None
) -> list[Route]:
    """All of them: within a node a copy goes to each device. Beyond, one goes to each node over the network, to one
    device of it, and from there over the node's own links to the others that want it.
    """
    if devices == 1:
        return []
    E, K = sizes.num_experts, sizes.experts_per_token

    def route(how: str, copies: float, over: Network) -> Route:
        if recorded is None:
            return Route(how, copies, imbalance, over)
        return Route(how, recorded.copies[how], recorded.port[how], over)

    if devices <= fabric.node:
        return [route(NODE, remote_copies(E, K, devices), fabric.link)]
    assert fabric.network is not None
    nodes = devices // fabric.node
    limit = node_limit(sizes, nodes)
    wanted = distinct_shards(E, K, devices)
    inside = min(wanted, limit * fabric.node) if limit else wanted
    over = route(NET, remote_copies(E, K, nodes, limit), fabric.network)
    return [over, route(LINKS, inside * (devices - nodes) / devices, fabric.link)]


def node_limit(sizes: Sizes, nodes: int) -> int | None:
    """Nodes that one token's groups of experts can lie in; a group may span several nodes."""
    return sizes.node_limit * max(1, nodes // sizes.groups) if sizes.node_limit else None
