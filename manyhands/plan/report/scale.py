"""Sections of `--scale`: expert parallelism on paper, and the scaling law."""

from dataclasses import replace

from manyhands.errors import ConfigError
from manyhands.format import show
from manyhands.plan import law
from manyhands.plan.machine import Machine
from manyhands.plan.network import Network
from manyhands.plan.parallel import COMBINE_BYTES, DISPATCH_BYTES, distinct_shards, per_device, smallest_count
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask
from manyhands.plan.report.figure import Cell, Figure, Section, Table
from manyhands.plan.routes import LINKS, NET, NODE, Fabric, Route, node_limit, routes
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import weight_bytes
from manyhands.plan.subject import Subject


def parallel(subject: Subject, ask: Ask, machine: Machine) -> Section:
    """All-to-all of one layer and direction, by number of expert-parallel devices."""
    sizes = subject.sizes
    assert sizes is not None
    fabric = fabric_of(machine, ask.network)
    E, tokens, D = sizes.num_experts, ask.tokens_per_device, sizes.hidden_size
    counts = [ask.devices] if ask.devices else [n for n in COUNTS if possible(E, n, fabric)]
    weights = weight_bytes(subject.counts, ask.storage)
    experts = subject.counts.by_component["routed experts"] * ask.storage.routed / 8
    rows: list[tuple[Cell, ...]] = []
    for devices in counts:
        recorded = ask.recorded.get(devices) if ask.recorded else None
        ways = routes(sizes, fabric, devices, ask.imbalance, recorded)
        way = max(ways, key=lambda way: way.copies * way.imbalance / way.over.bandwidth)
        load = recorded.load if recorded is not None else ask.imbalance
        held = per_device(experts, weights - experts, E, devices)
        work = f"{tokens}·{way.copies:.4g}·{D}"
        rows.append(
            (
                f"{devices} ({way.how})",
                Figure("copies", way.copies, "", f.SHARDS, _shards(sizes, fabric, devices, way, ask)),
                Figure(
                    "dispatch", way.bytes(tokens, D, DISPATCH_BYTES), "B", f.ALL_TO_ALL, f"{work}·{DISPATCH_BYTES:g}"
                ),
                *(_time(name, way, tokens, D, b, work, ask) for name, b in _DIRECTIONS),
                *_busiest(way, load, ask),
                _arithmetic(subject, ask, machine, load),
                Figure("weights", held, "B", f.WEIGHTS, f"⌈{E}/{devices}⌉ of {E} experts, and all else"),
            )
        )
    least = smallest_count(weights, machine.memory)
    work = f"⌈{weights:,.0f} / ({machine.memory:,.0f}·0.9)⌉ = {least}, up to equal shares and whole nodes"
    note = f"equal shares of {E} experts, whole nodes, in {ask.storage.name}"
    figures = [Figure("devices that hold the weights", _holding(E, least, fabric), "", f.HOLD, work, note)]
    recorded_too = ("busiest rows", "busiest load") if ask.recorded else ()
    columns = ("devices", "copies", "dispatch", "time", "combine", *recorded_too, "experts", "weights")
    busiest = (
        f"busiest / mean as recorded: {ask.recorded_source}" if ask.recorded else f"busiest / mean = {ask.imbalance:g}"
    )
    notes = [
        f"one layer, one direction, {tokens:,} tokens per device of {machine.title}: FP8 out, bf16 back; {busiest}",
        _ways_note(fabric, ask),
        "experts: their arithmetic on one device; weights: a device's experts and a copy of all else",
    ]
    if sizes.node_limit and not fabric.alike:
        notes.append(
            f"a token's experts lie in at most {sizes.node_limit} of {sizes.groups} groups, which bounds its copies "
            "between nodes"
        )
    return Section("parallel", "Expert parallelism", figures, Table(columns, tuple(rows)), notes)


COUNTS = (2, 4, 8, 16, 32, 64, 128, 256)
_DIRECTIONS = (("dispatch time", DISPATCH_BYTES), ("combine time", COMBINE_BYTES))


def fabric_of(machine: Machine, network: Network | None) -> Fabric:
    """How the devices of a machine talk. Raises `ConfigError` where nobody says."""
    found = Fabric.of(machine, network)
    if found is None:
        raise ConfigError(
            f"--scale: no link between devices is known of {machine.title}: choose a machine that has one, or say what "
            "there is with --network LATENCY,RATE"
        )
    return found


def possible(num_experts: int, devices: int, fabric: Fabric) -> bool:
    """Equal shares for every device, and whole nodes, joined by a network, beyond one."""
    return num_experts % devices == 0 and fabric.whole(devices)


def _holding(num_experts: int, least: int, fabric: Fabric) -> int | None:
    """The smallest possible number of devices from `least` on; None if there is none."""
    return next((n for n in range(least, num_experts + 1) if possible(num_experts, n, fabric)), None)


def _time(name: str, way: Route, tokens: int, width: int, element: float, work: str, ask: Ask) -> Figure:
    """The busiest device's; latency counts where it is given."""
    network = way.over if ask.network is not None else way.over.model_copy(update={"latency": 0.0})
    seconds = replace(way, over=network).seconds(tokens, width, element)
    latency = f"{network.latency:g} + " if network.latency else ""
    working = f"{latency}{work}·{element:g} / {show(network.bandwidth, 'B/s')}·{way.imbalance:.4g}"
    return Figure(name, seconds, "s", f.ALL_TO_ALL, working)


def _busiest(way: Route, load: float, ask: Ask) -> list[Figure]:
    """What a trace says of the busiest device."""
    if not ask.recorded:
        return []
    found = {"busiest rows": way.imbalance, "busiest load": load}
    return [Figure(name, value, "", f.RECORDED, ask.recorded_source) for name, value in found.items()]


def _ways_note(fabric: Fabric, ask: Ask) -> str:
    link = show(fabric.link.bandwidth, "B/s")
    if fabric.alike:
        return (
            f"every device reaches every other at {link}, {show(fabric.link.latency, 's')} for a collective: --network"
        )
    network = show(fabric.network.bandwidth, "B/s") if fabric.network else "none"
    return (
        f"node: within one, over its link ({link}); net: {fabric.node} devices per node, over the network "
        f"({network}); links: beyond a node too, but the nodes' own links take longer than the network"
    )


def check_devices(subject: Subject, machine: Machine, devices: int, network: Network | None = None) -> None:
    """Raises `ConfigError` for a number of devices that cannot share the experts evenly."""
    fabric = fabric_of(machine, network)
    experts = subject.sizes.num_experts if subject.sizes is not None else 0
    if experts and experts % devices:
        raise ConfigError(f"--devices {devices} does not divide the {experts} experts of {subject.name}")
    if fabric.node < devices and fabric.network is None:
        raise ConfigError(
            f"--devices {devices}: {machine.title} has {fabric.node} per node and no network between nodes is known"
        )
    if experts and not possible(experts, devices, fabric):
        raise ConfigError(
            f"--devices {devices} is no whole number of nodes: {machine.title} has {fabric.node} per node"
        )


def _shards(sizes: Sizes, fabric: Fabric, devices: int, way: Route, ask: Ask) -> str:
    if ask.recorded:
        return ask.recorded_source
    E, K = sizes.num_experts, sizes.experts_per_token
    nodes = max(1, devices // fabric.node)
    if way.how == LINKS:
        return f"{distinct_shards(E, K, devices):.4g} distinct of {devices} devices·({devices} - {nodes})/{devices}"
    shards = devices if way.how == NODE else nodes
    distinct = distinct_shards(E, K, shards)
    limit = node_limit(sizes, shards) if way.how == NET else None
    capped = f"min({distinct:.4g}, {limit})" if limit else f"{distinct:.4g}"
    return f"{capped} distinct of {shards}·({shards} - 1)/{shards}"


def _arithmetic(subject: Subject, ask: Ask, machine: Machine, load: float) -> Cell:
    sizes, rate = subject.sizes, machine.rate(ask.storage.rate)
    if sizes is None or rate is None:
        return "–"
    parts = subject.counts.by_component
    one = parts["routed experts"] / (sizes.num_experts * sizes.sparse_layers)
    shared = parts.get("shared experts", 0) / sizes.sparse_layers
    flops = 2 * ask.tokens_per_device * (sizes.experts_per_token * one * load + shared)
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
