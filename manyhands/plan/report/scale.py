"""Sections of `--scale`: expert parallelism on paper, and the scaling law."""

from manyhands.errors import ConfigError
from manyhands.format import show
from manyhands.plan import law
from manyhands.plan.machine import Machine
from manyhands.plan.parallel import (
    COMBINE_BYTES,
    DISPATCH_BYTES,
    all_to_all,
    distinct_shards,
    per_device,
    remote_copies,
    smallest_count,
)
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask
from manyhands.plan.report.figure import Cell, Figure, Section, Table
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import weight_bytes
from manyhands.plan.subject import Subject


def parallel(subject: Subject, ask: Ask, machine: Machine) -> Section:
    """All-to-all of one layer and direction, by number of expert-parallel devices."""
    sizes = subject.sizes
    assert sizes is not None
    if machine.link is None:
        raise ConfigError(
            f"--scale: no link between devices is known of {machine.title}: choose a machine that has one"
        )
    E, tokens = sizes.num_experts, ask.tokens_per_device
    counts = [ask.devices] if ask.devices else [n for n in _COUNTS if _possible(E, n, machine)]
    weights = weight_bytes(subject.counts, ask.storage)
    experts = subject.counts.by_component["routed experts"] * ask.storage.routed / 8
    rows: list[tuple[Cell, ...]] = []
    for devices in counts:
        ways = _route(sizes, machine, devices)
        copies, bandwidth, how = max(ways, key=lambda way: way[0] / way[1])
        send = all_to_all(tokens, sizes.hidden_size, copies, DISPATCH_BYTES, bandwidth, ask.imbalance)
        back = all_to_all(tokens, sizes.hidden_size, copies, COMBINE_BYTES, bandwidth, ask.imbalance)
        held = per_device(experts, weights - experts, E, devices)
        work = f"{tokens}·{copies:.4g}·{sizes.hidden_size}"
        over = f" / {show(bandwidth, 'B/s')}·{ask.imbalance:g}"
        rows.append(
            (
                f"{devices} ({how})",
                Figure("copies", copies, "", f.SHARDS, _shards(sizes, machine, devices, how)),
                Figure("dispatch", send.bytes, "B", f.ALL_TO_ALL, f"{work}·{DISPATCH_BYTES:g}"),
                Figure("dispatch time", send.seconds, "s", f.ALL_TO_ALL, f"{work}·{DISPATCH_BYTES:g}{over}"),
                Figure("combine time", back.seconds, "s", f.ALL_TO_ALL, f"{work}·{COMBINE_BYTES:g}{over}"),
                _arithmetic(subject, ask, machine),
                Figure("weights", held, "B", f.WEIGHTS, f"⌈{E}/{devices}⌉ of {E} experts, and all else"),
            )
        )
    least = smallest_count(weights, machine.memory)
    work = f"⌈{weights:,.0f} / ({machine.memory:,.0f}·0.9)⌉ = {least}, up to equal shares and whole nodes"
    note = f"equal shares of {E} experts, whole nodes, in {ask.storage.name}"
    figures = [Figure("devices that hold the weights", _holding(E, least, machine), "", f.HOLD, work, note)]
    columns = ("devices", "copies", "dispatch", "time", "combine", "experts", "weights")
    link = show(machine.link, "B/s") if machine.link else "none"
    network = show(machine.network, "B/s") if machine.network else "none"
    notes = [
        f"one layer, one direction, {tokens:,} tokens per device of {machine.title}: FP8 out, bf16 back; "
        f"busiest / mean = {ask.imbalance:g}",
        f"node: within one, over its link ({link}); net: {machine.node} devices per node, over the network "
        f"({network}); links: beyond a node too, but the nodes' own links take longer than the network",
        "experts: their arithmetic on one device; weights: a device's experts and a copy of all else",
    ]
    if sizes.node_limit:
        notes.append(
            f"a token's experts lie in at most {sizes.node_limit} of {sizes.groups} groups, which bounds its copies "
            "between nodes"
        )
    return Section("parallel", "Expert parallelism", figures, Table(columns, tuple(rows)), notes)


_COUNTS = (2, 4, 8, 16, 32, 64, 128, 256)


def _possible(num_experts: int, devices: int, machine: Machine) -> bool:
    """Equal shares for every device, and whole nodes, joined by a network, beyond one."""
    whole = devices <= machine.node or (machine.network is not None and devices % machine.node == 0)
    return num_experts % devices == 0 and whole


def _holding(num_experts: int, least: int, machine: Machine) -> int | None:
    """The smallest possible number of devices from `least` on; None if there is none."""
    return next((n for n in range(least, num_experts + 1) if _possible(num_experts, n, machine)), None)


def check_devices(subject: Subject, machine: Machine, devices: int) -> None:
    """Raises `ConfigError` for a number of devices that cannot share the experts evenly."""
    experts = subject.sizes.num_experts if subject.sizes is not None else 0
    if experts and experts % devices:
        raise ConfigError(f"--devices {devices} does not divide the {experts} experts of {subject.name}")
    if devices > machine.node and machine.network is None:
        raise ConfigError(
            f"--devices {devices}: {machine.title} has {machine.node} per node and no network between nodes is known"
        )
    if experts and not _possible(experts, devices, machine):
        raise ConfigError(
            f"--devices {devices} is no whole number of nodes: {machine.title} has {machine.node} per node"
        )


def _route(sizes: Sizes, machine: Machine, devices: int) -> list[tuple[float, float, str]]:
    """(copies per token, bytes per second, where) of each kind of way that a token's copies take, at the same time.

    Within a node a copy goes to each device. Beyond, one goes to each node over the network, to one device of it, and
    from there over the node's own links to the others that want it.
    """
    E, K = sizes.num_experts, sizes.experts_per_token
    assert machine.link is not None
    if devices <= machine.node:
        return [(remote_copies(E, K, devices), machine.link, "node")]
    assert machine.network is not None
    nodes = devices // machine.node
    limit = _node_limit(sizes, nodes)
    wanted = distinct_shards(E, K, devices)
    inside = min(wanted, limit * machine.node) if limit else wanted
    over = remote_copies(E, K, nodes, limit), machine.network, "net"
    return [over, (inside * (devices - nodes) / devices, machine.link, "links")]


def _node_limit(sizes: Sizes, nodes: int) -> int | None:
    """Nodes that one token's groups of experts can lie in; a group may span several nodes."""
    return sizes.node_limit * max(1, nodes // sizes.groups) if sizes.node_limit else None


def _shards(sizes: Sizes, machine: Machine, devices: int, how: str) -> str:
    E, K = sizes.num_experts, sizes.experts_per_token
    nodes = devices // machine.node
    if how == "links":
        return f"{distinct_shards(E, K, devices):.4g} distinct of {devices} devices·({devices} - {nodes})/{devices}"
    shards = devices if how == "node" else nodes
    distinct = distinct_shards(E, K, shards)
    limit = _node_limit(sizes, shards) if how == "net" else None
    capped = f"min({distinct:.4g}, {limit})" if limit else f"{distinct:.4g}"
    return f"{capped} distinct of {shards}·({shards} - 1)/{shards}"


def _arithmetic(subject: Subject, ask: Ask, machine: Machine) -> Cell:
    sizes, rate = subject.sizes, machine.rate(ask.storage.rate)
    if sizes is None or rate is None:
        return "–"
    parts = subject.counts.by_component
    one = parts["routed experts"] / (sizes.num_experts * sizes.sparse_layers)
    shared = parts.get("shared experts", 0) / sizes.sparse_layers
    flops = 2 * ask.tokens_per_device * (sizes.experts_per_token * one + shared) * ask.imbalance
    each = rate[1] / machine.devices
    return Figure("experts", flops / each, "s", f.EXPERT_TIME, f"{flops:.4g} / {show(each, 'FLOP/s')} ({rate[0]})")


def scaling(flops: float) -> Section:
    """How large a model on how many tokens, by number of experts."""
    rows: list[tuple[Cell, ...]] = []
    beyond = False
    for experts in law.EXPERTS:
        best = law.best_split(flops, experts)
        beyond |= best.extrapolated
        work = f"Ê = {law.effective_experts(experts):.4g}, C = {flops:.4g}"
        rows.append(
            (
                str(experts),
                Figure("active", best.active, "parameters", f.LAW, work),
                f"{show(best.smallest, 'parameters')} – {show(best.largest, 'parameters')}",
                Figure("tokens", best.tokens, "tokens", f.LAW, f"{flops:.4g} / (6·{best.active:.4g})"),
                Figure("loss", best.loss, "", f.LAW, work),
            )
        )
    notes = [
        f"±: sizes whose loss is within {law.BAND:.1%} of the best; the loss, in nats, is for comparing rows only",
        "fitted on 1 to 32 experts, one per token, each as large as a dense feed-forward network (granularity 1); more "
        "than 280 models of up to 2.7 B active and 5 B total parameters",
    ]
    if beyond:
        notes.append(
            "EXTRAPOLATED: beyond 2.7 B active or 5 B total parameters; read the ratios between rows, not the rows"
        )
    columns = ("experts", "active", "± band", "tokens", "loss")
    title = f"Scaling law for {show(flops, 'FLOP')}"
    return Section("law", title, (), Table(columns, tuple(rows)), notes)
