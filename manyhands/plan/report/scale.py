"""Sections of `--scale`: expert parallelism on paper, and the scaling law."""

from manyhands.errors import ConfigError
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
from manyhands.plan.report.units import show
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import weight_bytes
from manyhands.plan.subject import Subject


def parallel(subject: Subject, ask: Ask, machine: Machine) -> Section:
    """All-to-all of one layer and direction, by number of expert-parallel devices."""
    sizes = subject.sizes
    assert sizes is not None
    E, tokens = sizes.num_experts, ask.tokens_per_device
    counts = [ask.devices] if ask.devices else [n for n in _COUNTS if _possible(E, n, machine)]
    weights = weight_bytes(subject.counts, ask.storage)
    experts = subject.counts.by_component["routed experts"] * ask.storage.routed / 8
    rows: list[tuple[Cell, ...]] = []
    for devices in counts:
        copies, bandwidth, how = _route(sizes, machine, devices)
        send = all_to_all(tokens, sizes.hidden_size, copies, DISPATCH_BYTES, bandwidth, ask.imbalance)
        back = all_to_all(tokens, sizes.hidden_size, copies, COMBINE_BYTES, bandwidth, ask.imbalance)
        held = per_device(experts, weights - experts, E, devices)
        work = f"{tokens}·{copies:.4g}·{sizes.hidden_size}"
        over = f" / {show(bandwidth, 'B/s')}·{ask.imbalance:g}"
        rows.append(
            (
                f"{devices} ({how})",
                Figure("copies", copies, "", f.SHARDS, _shards(sizes, machine, devices)),
                Figure("dispatch", send.bytes, "B", f.ALL_TO_ALL, f"{work}·{DISPATCH_BYTES:g}"),
                Figure("dispatch time", send.seconds, "s", f.ALL_TO_ALL, f"{work}·{DISPATCH_BYTES:g}{over}"),
                Figure("combine time", back.seconds, "s", f.ALL_TO_ALL, f"{work}·{COMBINE_BYTES:g}{over}"),
                _arithmetic(subject, ask, machine),
                Figure("weights", held, "B", f.WEIGHTS, f"⌈{E}/{devices}⌉ of {E} experts, and all else"),
            )
        )
    smallest = smallest_count(weights, machine.memory)
    work = f"⌈{weights:,.0f} / ({machine.memory:,.0f}·0.9)⌉"
    figures = [
        Figure("devices that hold the weights", smallest, "", f.HOLD, work, f"split evenly, in {ask.storage.name}")
    ]
    columns = ("devices", "copies", "dispatch", "time", "combine", "experts", "weights")
    link = show(machine.link, "B/s") if machine.link else "none"
    network = show(machine.network, "B/s") if machine.network else "none"
    notes = [
        f"one layer, one direction, {tokens:,} tokens per device of {machine.title}: FP8 out, bf16 back; "
        f"busiest / mean = {ask.imbalance:g}",
        f"node: within one, over its link ({link}); net: {machine.node} devices per node, over the network ({network})",
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
    """Equal shares for every device, and whole nodes beyond one."""
    whole = machine.network is None or devices <= machine.node or devices % machine.node == 0
    return num_experts % devices == 0 and whole


def check_devices(subject: Subject, machine: Machine, devices: int) -> None:
    """Raises `ConfigError` for a number of devices that cannot share the experts evenly."""
    experts = subject.sizes.num_experts if subject.sizes is not None else 0
    if experts and experts % devices:
        raise ConfigError(f"--devices {devices} does not divide the {experts} experts of {subject.name}")
    if experts and not _possible(experts, devices, machine):
        raise ConfigError(
            f"--devices {devices} is no whole number of nodes: {machine.title} has {machine.node} per node"
        )


def _route(sizes: Sizes, machine: Machine, devices: int) -> tuple[float, float, str]:
    """(copies per token, bytes per second, where they travel): within a node per device, beyond once per node."""
    E, K = sizes.num_experts, sizes.experts_per_token
    link = machine.link or machine.network or machine.bandwidth
    if devices <= machine.node or machine.network is None:
        return remote_copies(E, K, devices), link, "node"
    nodes = devices // machine.node
    return remote_copies(E, K, nodes, _node_limit(sizes, nodes)), machine.network, "net"


def _node_limit(sizes: Sizes, nodes: int) -> int | None:
    """Nodes that one token's groups of experts can lie in; a group may span several nodes."""
    return sizes.node_limit * max(1, nodes // sizes.groups) if sizes.node_limit else None


def _shards(sizes: Sizes, machine: Machine, devices: int) -> str:
    E, K = sizes.num_experts, sizes.experts_per_token
    shards = devices if devices <= machine.node or machine.network is None else devices // machine.node
    distinct = distinct_shards(E, K, shards)
    limit = _node_limit(sizes, shards) if shards != devices else None
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
        notes.append("EXTRAPOLATED: beyond 2.7 B active parameters; read the ratios between rows, not the rows")
    columns = ("experts", "active", "± band", "tokens", "loss")
    title = f"Scaling law for {show(flops, 'FLOP')}"
    return Section("law", title, (), Table(columns, tuple(rows)), notes)
