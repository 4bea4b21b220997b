"""`manyhands simulate --layout`: what expert parallelism sends and waits for on a recorded trace."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.cli.size import size
from manyhands.config.parallel import layout_named
from manyhands.errors import UserError
from manyhands.format import number, show
from manyhands.terminal import shown

if TYPE_CHECKING:
    from manyhands.simulate.parallel import Report, Settings

_MOST_RANKS = 16
"""Whose rows are printed one by one; --json has all."""


def layout_settings(
    layout: str,
    placement: str | None,
    redundant: int,
    groups: int,
    node: int | None,
    network: str | None,
    row_bytes: str | None,
    sequences: int,
    tokens: int,
    pin: Path | None,
) -> "Settings":
    """What was asked, read. Raises `UserError`."""
    from manyhands.cli.network import Ways, ways
    from manyhands.simulate.parallel import Settings

    if pin is not None and placement != "eplb":
        raise UserError("--pin with --layout is for --placement eplb, which is placed by a load")
    if groups > 1 and placement != "eplb":
        raise UserError(f"--groups {groups} is for --placement eplb, which packs groups onto nodes")
    if row_bytes is not None and network is None:
        raise UserError("--row-bytes goes with --network")
    found, asked = ways(network) if network is not None else None, layout_named(layout)
    if found is not None and found.within is not None and found.node is not None:
        nodes = (node or found.node) < asked.ep
        found, node = (found, node or found.node) if nodes else (Ways(found.within), node)
    return Settings(
        layout=asked,
        placement=placement or "contiguous",
        redundant=redundant,
        groups=groups,
        node=node,
        sequences=sequences,
        max_tokens=tokens or None,
        counted=pin,
        row_bytes=_row_bytes(row_bytes),
        network=None if found is None else found.between,
        links=None if found is None else found.within,
    )


def _row_bytes(text: str | None) -> tuple[float, float] | None:
    """Out and back; one size is both."""
    if text is None:
        return None
    sizes = [float(size("--row-bytes", part) or 0) for part in text.split(",")]
    if len(sizes) > 2:
        raise UserError(f"--row-bytes {text}: expected one size, or two: out and back")
    return sizes[0], sizes[-1]


def print_layout(report: "Report") -> None:
    """What was counted, layer by layer, then rank by rank, then the time."""
    m, s, x = report.manifest, report.settings, report.exchange
    R = s.layout.ep
    part = "" if x.tokens == report.recorded_tokens else f" of {report.recorded_tokens:,}"
    print(
        f"{shown(report.name)}: {len(m.layers)} layers, {m.num_experts_per_tok} of {m.num_experts} experts per token; "
        f"{x.tokens:,}{part} tokens in {x.passes:,} passes"
    )
    slots = f"{(n := report.slots.experts_LS.shape[1] // R)} expert{'s' if n > 1 else ''}"
    redundant = f" ({s.redundant} redundant in all)" if s.redundant else ""
    node = f", {s.node} ranks per node" if s.node is not None else ""
    print(f"layout {s.layout}: {s.layout.size} ranks, {slots}{redundant} of each layer on each{node}\n")
    _table(_layers(report), left=0)
    if s.layout.size <= _MOST_RANKS:
        print()
        _table(_ranks(report), left=0)
    times = [(way, report.seconds(way)) for way in ("by_pairs", "by_tokens", "by_nodes")]
    if any(seconds is not None for _, seconds in times):
        print()
        for way, seconds in times:
            if seconds is not None:
                print(f"exchange of a pass, {way:<10} {show(seconds, 's')}")
    for note in _notes(report):
        print("\n".join(textwrap.wrap(f"- {note}", 100, subsequent_indent="  ")))


def _layers(report: "Report") -> list[list[str]]:
    """A line per layer, and one for all."""
    x, plain, T = report.exchange, report.plain, report.exchange.tokens
    uniform, nodes = report.uniform, x.network is not None
    head = ["layer", "rows by pairs", "by tokens", *(["by nodes"] if nodes else []), "ranks", "if uniform"]
    head += [*(["nodes", "if uniform"] if nodes else []), "busiest rows", "load", "by pass"]
    head += ["contiguous", "by pass"] if plain is not None else []
    lines = [head]
    L = len(report.manifest.layers)
    for name, chosen in [*((str(n), [i]) for i, n in enumerate(report.manifest.layers)), ("mean", list(range(L)))]:

        def per_token(rows: "object", chosen: list[int] = chosen) -> str:
            return f"{float(rows[chosen].sum()) / T / len(chosen):.3f}"  # type: ignore[index]

        def mean(ratio: "object", chosen: list[int] = chosen) -> str:
            return f"{float(ratio[chosen].mean()):.3f}"  # type: ignore[index]

        line = [name, per_token(x.by_pairs.remote_L), per_token(x.by_tokens.remote_L)]
        line += [per_token(x.network.remote_L)] if x.network is not None else []
        line += [per_token(x.tokens_LWR.sum((1, 2))), number(uniform)]
        line += [per_token(x.nodes_L), number(report.uniform_nodes)] if nodes else []
        line += [mean(x.port_L(x.by_pairs)), mean(x.load_L), mean(x.waiting_L)]
        line += [mean(plain.load_L), mean(plain.waiting_L)] if plain is not None else []
        lines.append(line)
    return lines


def _ranks(report: "Report") -> list[list[str]]:
    """What each rank sends, gets and computes in all layers together."""
    x, (dp, R) = report.exchange, report.settings.layout
    lines = [["rank", "sends by pairs", "gets", "sends by tokens", "gets", "computes"]]
    ways = []
    for rows_LWR in (x.pairs_LWR, x.tokens_LWR):
        rows = rows_LWR.sum(0).reshape(dp, R, R)
        own = rows.diagonal(axis1=-2, axis2=-1)
        ways += [(rows.sum(-1) - own).ravel(), (rows.sum(-2) - own).ravel()]
    ways.append(x.load_LWR.sum(0).ravel())
    lines += [[str(rank), *(f"{int(way[rank]):,}" for way in ways)] for rank in range(dp * R)]
    return lines


def _table(lines: list[list[str]], left: int) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [c.ljust(w) if i == left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())


def _notes(report: "Report") -> list[str]:
    s, x = report.settings, report.exchange
    notes = [
        "rows: what leaves its rank, per token, one way; back come as many. ranks: how many hold a token's experts, "
        "its own among them",
        "busiest rows, load: the busiest rank over the mean one, of rows by pairs pass by pass, and of pairs computed: "
        "all passes together, then pass by pass, which is what is waited for",
    ]
    if x.network is not None:
        most = f"no token's experts lie in more than {x.most_nodes} of {s.layout.ep // (s.node or 1)} nodes"
        notes.append(f"by nodes: over the network once for each node, then over links; {most}")
    if s.placement == "eplb":
        where = (
            f"in {shown(str(s.counted))}"
            if s.counted
            else "in this same trace, which flatters it; --pin OTHER does not"
        )
        notes.append(f"experts were placed by their load {where}; a token takes copies in turn")
    if x.short:
        notes.append(
            f"{x.short:,} of {x.passes:,} passes have fewer tokens than there are ranks: some ranks have none of their "
            "own; --sequences N lets N texts run together"
        )
    if report.cut:
        notes.append("the trace has fewer texts than sequences: these are pieces of the same text")
    if x.tokens < report.recorded_tokens and not s.sequences:
        notes.append(f"the first {x.tokens:,} tokens; --tokens 0 takes all")
    if s.network is not None and s.row_bytes is not None:
        links = (
            ""
            if s.links is None
            else f", links {show(s.links.latency, 's')} + bytes / {show(s.links.bandwidth, 'B/s')}"
        )
        notes.append(
            f"exchange: out and back of all layers, nothing overlapped: {show(s.network.latency, 's')} for each "
            f"collective + the busiest rank's bytes / {show(s.network.bandwidth, 'B/s')}{links}"
        )
    elif s.network is not None:
        notes.append("no times: give --row-bytes, what a token takes on its way (its width times 2 in bf16)")
    return notes
