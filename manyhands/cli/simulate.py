"""`manyhands simulate`: a recorded trace under cache policies, or laid out on ranks that share experts."""

import textwrap
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli.drawn import drawn
from manyhands.cli.progress import bar
from manyhands.cli.size import size
from manyhands.errors import UserError
from manyhands.format import number, show
from manyhands.terminal import shown

if TYPE_CHECKING:
    from manyhands.simulate.report import Report
    from manyhands.simulate.sweep import Row, Speed

_POLICIES, _DISKS = "lfu,lru,pinned,belady", "500MB/s,3GB/s,7GB/s"
_NETWORK = "20us,5GB/s, a file of benchmarks/scale.py, or a machine's name."
_MOST = 64
"""Policies, budgets or disks of one call."""


def simulate(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A trace: a directory of --trace, or another engine's file.")
    ],
    policies: Annotated[str, typer.Option(metavar="NAME,…", help="Of lfu, lru, pinned, belady.")] = _POLICIES,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="SIZE,…", help="Bytes of experts in memory, like 2GB, or a share of all, like 10%."),
    ] = None,
    disk: Annotated[str, typer.Option(metavar="RATE,…", help="Disks: bytes per second, like 500MB/s.")] = _DISKS,
    memory_rate: Annotated[
        str | None,
        typer.Option(
            metavar="RATE", help="What memory reads per second; default: what doctor measured here, if it did."
        ),
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=0, help="Replay as if so many sequences were decoded together; 0: as it was recorded.")
    ] = 0,
    tokens: Annotated[int, typer.Option(min=0, help="Only the first so many tokens; 0: all.")] = 20_000,
    record_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="One expert's bytes, where the trace does not say.")
    ] = None,
    pin: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE", help="For pinned and eplb: count in this trace; default: in the same, which flatters it."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it too: .svg, .png or .pdf; needs matplotlib.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(metavar="DPxEP", help="Not caches, but ranks that share experts: what they send and wait for."),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --layout: contiguous (as training does), or eplb, by load."),
    ] = None,
    redundant: Annotated[
        int, typer.Option(min=0, max=1 << 20, help="With eplb: further copies of experts in each layer.")
    ] = 0,
    groups: Annotated[
        int, typer.Option(min=1, max=1 << 16, help="With eplb: groups that a token's experts are limited to.")
    ] = 1,
    node: Annotated[
        int | None, typer.Option(min=1, max=1 << 16, help="With --layout: ranks of a node; default: all are alike.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(metavar="NETWORK", help=f"With --layout, for times: {_NETWORK}")
    ] = None,
    row_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE[,SIZE]", help="With --network: what a token takes on its way out, and back."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Replay a trace's routing under cache policies and byte budgets: hits, bytes per token, tokens per second.

    A budget is what the experts in memory may take. T is what one token wants: K experts of each layer. Belady is the
    best that was possible, knowing the future.

    With --layout: the rows that expert parallelism sends for the same trace, rank by rank, and the load of each.
    """
    about_caches = {
        "--policies": policies != _POLICIES,
        "--budgets": budgets,
        "--disk": disk != _DISKS,
        "--memory-rate": memory_rate,
        "--record-bytes": record_bytes,
        "--plot": plot,
    }
    about_ranks = {
        "--placement": placement,
        "--redundant": redundant,
        "--groups": groups > 1,
        "--node": node,
        "--network": network,
        "--row-bytes": row_bytes,
    }
    if layout is not None:
        if given := [name for name, value in about_caches.items() if value]:
            raise UserError(f"{given[0]} is about caches: leave --layout out")
        from manyhands.cli.simulate_layout import layout_settings, print_layout
        from manyhands.simulate.parallel import laid_out

        laid = layout_settings(layout, placement, redundant, groups, node, network, row_bytes, sequences, tokens, pin)
        with bar("replaying") as update:
            found = laid_out(trace, laid, update)
        if json_output:
            import json

            print(json.dumps(found.described(), ensure_ascii=False))
        else:
            print_layout(found)
        return
    if given := [name for name, value in about_ranks.items() if value]:
        raise UserError(f"{given[0]} goes with --layout")
    from manyhands.simulate.report import Settings, simulated

    settings = Settings(
        policies=_names("--policies", policies),
        budgets=[_budget(text) for text in _names("--budgets", budgets)] if budgets is not None else (),
        disks=[_rate("--disk", text) for text in _names("--disk", disk)],
        memory=_rate("--memory-rate", memory_rate) if memory_rate is not None else _measured(),
        sequences=sequences,
        max_tokens=tokens or None,
        record_bytes=size("--record-bytes", record_bytes),
        pin=pin,
    )
    if plot is not None:
        from manyhands.simulate.plot import check_plot, draw

        check_plot(plot)
    with bar("replaying") as update:
        report = simulated(trace, settings, update)
    if plot is not None:
        line = drawn(plot)
        draw(plot, report)
    if json_output:
        import json

        print(json.dumps(report.described(), ensure_ascii=False))
        return
    _print(report)
    if plot is not None:
        print(line)


def _print(report: "Report") -> None:
    """What was replayed, the table, and what batching saves."""
    m, s = report.manifest, report.settings
    part = "" if report.replayed_tokens == report.recorded_tokens else f" of {report.recorded_tokens:,}"
    print(
        f"{shown(report.name)}: {len(m.layers)} layers, {m.num_experts_per_tok} of {m.num_experts} experts per token; "
        f"{report.replayed_tokens:,}{part} tokens replayed"
        + (f", {s.sequences} sequences at once" if s.sequences else "")
    )
    print(f"all experts {show(report.all_bytes, 'B')}, those of one token (T) {show(report.cycle_bytes, 'B')}")
    table = [_head(report), *(_cells(report, row) for row in report.rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    last = None
    for cells, row in zip(table, [None, *report.rows], strict=True):
        if row is not None and row.budget_bytes != last:
            last = row.budget_bytes
            print()
        print(
            "  ".join(c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        )
    print("\ntokens in one pass" + "".join(f"{one.batch:>8}" for one in report.union))
    print("distinct experts  " + "".join(f"{one.experts_per_step:>8,.0f}" for one in report.union))
    print("bytes per token   " + "".join(f"{one.bytes_per_token:>8.2f}" for one in report.union))
    for note in _notes(report):
        print("\n".join(textwrap.wrap(f"- {note}", 100, subsequent_indent="  ")))


def _head(report: "Report") -> list[str]:
    over = "decode" if report.decoded else "hit"
    disks = [f"tok/s {show(disk, 'B/s')}" for disk in report.settings.disks]
    return ["budget", "policy", f"{over} %", *(["all %"] if report.decoded else []), "of Belady", "read/token", *disks]


def _cells(report: "Report", row: "Row") -> list[str]:
    from manyhands.simulate.sweep import speed

    at = [speed(row.tally, disk, report.settings.memory, report.dense_bytes) for disk in report.settings.disks]
    return [
        f"{show(row.budget_bytes, 'B')} ({row.budget_bytes / report.cycle_bytes:.2f} T)",
        row.policy,
        f"{100 * row.tally.hit_rate:.1f}",
        *([f"{100 * row.result.all.hit_rate:.1f}"] if report.decoded else []),
        "" if row.of_belady is None else f"{row.of_belady:.1%}",
        show(row.tally.bytes_per_token, "B"),
        *(_speed(one, report.settings.memory is not None) for one in at),
    ]


def _speed(at: "Speed", forecast: bool) -> str:
    """Where nothing is read from disk there is no roofline."""
    roofline = number(at.roofline, 2) if isfinite(at.roofline) else "∞"
    return f"{number(at.forecast, 2)} / {roofline}" if forecast else roofline


def _notes(report: "Report") -> list[str]:
    s = report.settings
    notes = ["hits, bytes and speed are of decoded tokens; all % counts prompts too"] if report.decoded else []
    if s.disks and s.memory is None:
        notes.append("tok/s: the disk alone; give --memory-rate (or run `manyhands doctor` once) to count memory too")
    elif s.disks:
        with_dense = f"{show(report.dense_bytes, 'B')} of dense weights" if report.dense_bytes else "no dense weights"
        notes.append(
            f"tok/s: forecast / roofline; roofline: the disk alone; forecast: then the experts and {with_dense} "
            f"a pass from memory at {show(s.memory, 'B/s')}, one after the other"
        )
    if "pinned" in s.policies and s.pin is None:
        notes.append("pinned was counted in this same trace, which flatters it; --pin OTHER does not")
    if report.cut:
        notes.append(
            "the trace has fewer texts than sequences: these are pieces of the same text, which share more experts"
        )
    if report.replayed_tokens < report.recorded_tokens and not s.sequences:
        notes.append(f"the first {report.replayed_tokens:,} tokens; --tokens 0 replays all")
    return notes


def _names(flag: str, text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not 0 < len(names) <= _MOST:
        raise UserError(f"{flag} {text}: expected 1 to {_MOST} values with commas between them")
    return names


def _budget(text: str) -> int | float:
    """Bytes, or a share of all experts."""
    from manyhands.simulate.report import share

    if text.endswith("%"):
        found = share(text)
        if found is None:
            raise UserError(f"--budgets {text}: expected a share above 0% and up to 100%")
        return found
    return size("--budgets", text) or 0


def _rate(flag: str, text: str) -> float:
    """Bytes per second."""
    return float(size(flag, text.strip().removesuffix("/s")) or 0)


def _measured() -> float | None:
    """What this machine's memory reads, if `doctor` has measured it."""
    from manyhands.plan.remember import remembered

    here = remembered()
    return here.processor.bandwidth if here is not None else None
