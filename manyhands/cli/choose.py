"""`manyhands choose`: which model, in which format, on which machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands import terminal
from manyhands.cli import complete
from manyhands.cli.drawn import drawn
from manyhands.cli.loudness import quiet
from manyhands.defaults import PLAN_CONTEXT
from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from manyhands.plan.candidates import Known
    from manyhands.plan.choose import By
    from manyhands.plan.offer import Place
    from manyhands.plan.report import Section
    from manyhands.plan.report.chosen import Shown
    from manyhands.plan.subject import Subject
    from manyhands.plan.wish import Case, Wish


def choose(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Only these: names of the catalogue, config.json, GGUF, directories.  Default: the catalogue.",
            autocompletion=complete.systems,
        ),
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="here, 8xh100, rtx4090, FILE.toml, … or any; repeatable.  Default: this one, measured once.",
            autocompletion=complete.machines,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="As it is sold (16GB is 16 GiB): of a computer, or in place of the machine's."
        ),
    ] = None,
    bandwidth: Annotated[str | None, typer.Option(metavar="SIZE/s", help="What that memory reads: 120GB/s.")] = None,
    disk: Annotated[str | None, typer.Option(metavar="SIZE/s", help="What the disk reads: 3GB/s.")] = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The computer a GPU is in: desktop-ddr5, epyc-9654, FILE.toml, none."),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1, max=99_999, help="Up to so many of each machine may be had.  Default: as named; with any: 8."
        ),
    ] = None,
    users: Annotated[int, typer.Option(min=1, max=1 << 20, help="Served at once.")] = 1,
    context: Annotated[
        str | None, typer.Option(metavar="TOKENS", help=f"Of each user: 32k.  Default: in + out, or {PLAN_CONTEXT}.")
    ] = None,
    tokens_in: Annotated[str | None, typer.Option(metavar="TOKENS", help="A prompt's length.")] = None,
    tokens_out: Annotated[str | None, typer.Option(metavar="TOKENS", help="An answer's length.")] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(metavar="N", help="Of each user, at least.  Default: 1.")
    ] = None,
    ttft: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="To the first token of a prompt, at most.")
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]USD", help="Of a device and hour: 2.5, or h100=2.5; repeatable."),
    ] = None,
    per_hour: Annotated[float | None, typer.Option(metavar="USD", help="At most, of all devices.")] = None,
    per_million: Annotated[float | None, typer.Option(metavar="USD", help="At most, for 10^6 tokens written.")] = None,
    license: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only models whose licence has this in its name: apache.")
    ] = None,
    min_total: Annotated[str | None, typer.Option(metavar="N", help="Only models of so many parameters: 20B.")] = None,
    min_active: Annotated[str | None, typer.Option(metavar="N", help="The same of those active per token.")] = None,
    mmlu: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="Only models of which the catalogue quotes such a score.")
    ] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="Only mixtures of experts.")] = False,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these, as of plan; repeatable.  Default: as published, and narrower ones down to 4 bits."
        ),
    ] = None,
    kv_bits: Annotated[float, typer.Option(min=1, max=32, help="Bits per cached number.")] = 16,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="Where experts may lie: memory, host, disk; repeatable.  Default: all, memory preferred."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Recorded routing of MODEL: the hit rates are its own.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=10_000, help="Shown of each layout.")] = 8,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw to a .png, .svg or .pdf.")] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print as JSON (docs/choosing.md has the schema).")
    ] = False,
) -> None:
    """Which model, in which format, on which machine: what fits, how fast it can be, what it costs, and what lost.

    "What fits my 16 GB laptop?" is `manyhands choose --memory 16GB`. Speeds are upper bounds; no weights are read.
    """
    from manyhands.cli.places import Given, places_asked
    from manyhands.plan.choose import choose as search
    from manyhands.plan.report.numbers import quantity

    if plot is not None:
        from manyhands.plan.report.chosen_plot import check_plot

        check_plot(plot)
    given = Given(machine or [], memory, bandwidth, disk, host, devices, price or [], quiet=quiet())
    floors = {
        "--tokens-per-second": tokens_per_second,
        "--ttft": ttft,
        "--per-hour": per_hour,
        "--per-million": per_million,
    }
    for flag, value in floors.items():
        if value is not None and not 0 < value < 1e9:
            raise ConfigError(f"{flag} {value:g}: expected a number above 0")
    if (per_hour or per_million) and not price:
        raise ConfigError("a budget needs prices: --price 2.5 (a device and hour), or --price h100=2.5")
    if models and (license or min_total or min_active or mmlu or sparse):
        raise ConfigError(
            "--license, --min-total, --min-active, --mmlu and --sparse choose from the catalogue: leave MODEL out"
        )
    if trace is not None and len(models or []) != 1:
        raise ConfigError("--trace is of one model: name it, as in `manyhands choose MODEL --trace DIR`")
    least = [
        quantity(text, flag) if text else 0 for text, flag in ((min_total, "--min-total"), (min_active, "--min-active"))
    ]

    def wanted(known: "Known") -> bool:
        counts, score = known.subject.counts, known.entry.figure("mmlu")
        return (
            counts.total >= least[0]
            and counts.active >= least[1]
            and (license is None or license.casefold() in known.entry.license.casefold())
            and (mmlu is None or (score is not None and (score.value or 0) >= mmlu))
            and not (sparse and not known.entry.sparse)
        )

    subjects = _subjects(models or [], wanted)
    if not subjects:
        raise ConfigError("no model of the catalogue is like that: ask for less")
    wish = _wish(
        [subject for _, subject in subjects] if models else [],
        context=context,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        users=users,
        kv_bits=kv_bits,
        speed=tokens_per_second,
        first=ttft,
        per_hour=per_hour,
        per_million=per_million,
        layouts=layout or [],
        devices=given.most_devices,
    )
    places = places_asked(given)  # last: it may measure this machine
    if trace is not None:
        from dataclasses import replace

        from manyhands.cli.replayed import hit_curve

        hits = hit_curve(trace, subjects[0][1], users)
        places = [replace(place, hits=hits) for place in places]
    cases = [_cases(name, subject, wish, format or []) for name, subject in subjects]
    by: By = "model" if not models else "format" if len(models) == len(places) == 1 else "machine"
    chosen = search(cases, places, by=by, frontier=not models or "any" in given.machines)
    from manyhands.plan.report.chosen import shown

    found = shown(chosen, rows)
    notes = [place_note(places), *([f"hit rates: {terminal.shown(trace)}, replayed (policy lfu)"] if trace else [])]
    if json_output:
        import json

        from manyhands.plan.report.chosen_json import as_dict

        print(json.dumps(as_dict(chosen, found, wish, notes), allow_nan=False))
    else:
        from manyhands.plan.report.chosen import build_choice

        _print(notes, build_choice(chosen, found, wish, machines=len(places), models=len(cases)), found)
    if plot is not None:
        from manyhands.plan.report.chosen_plot import draw_choice

        line = drawn(plot)
        draw_choice(plot, chosen, found, wish)
        if not json_output:
            print(line)


def _subjects(models: list[str], wanted: "Callable[[Known], bool]") -> "list[tuple[str, Subject]]":
    """(name, model); of the catalogue, those that are wanted."""
    from manyhands.plan.candidates import known

    if not models:
        return [(found.id, found.subject) for found in known(wanted)]
    from manyhands.plan.subject import read_subject

    found = []
    for model in models:
        subject = read_subject(model)
        if subject.sizes is None:
            raise ConfigError(f"{model}: only decoders have speeds: `manyhands plan {model}` shows what there is")
        found.append((model.lower() if subject.origin.startswith("catalogue") else subject.name, subject))
    return found


def _wish(
    named: "list[Subject]",
    *,
    context: str | None,
    tokens_in: str | None,
    tokens_out: str | None,
    users: int,
    kv_bits: float,
    speed: float | None,
    first: float | None,
    per_hour: float | None,
    per_million: float | None,
    layouts: list[str],
    devices: int | None,
) -> "Wish":
    """Raises `ConfigError` for lengths that contradict each other."""
    from manyhands.plan.report.numbers import length
    from manyhands.plan.tiers import LAYOUTS
    from manyhands.plan.wish import SLOWEST, Wish

    if wrong := [each for each in layouts if each not in LAYOUTS]:
        raise ConfigError(f"--layout {wrong[0]}: expected one of {', '.join(LAYOUTS)}")
    read = length(tokens_in, "--tokens-in") if tokens_in else None
    written = length(tokens_out, "--tokens-out") if tokens_out else None
    together = (read or 0) + (written or 0)
    if context:
        positions = length(context, "--context")
        if together > positions:
            raise ConfigError(f"--context {context}: {together:,} tokens in and out need more")
    else:
        made_for = [s.sizes.positions for s in named if s.sizes is not None and s.sizes.positions is not None]
        positions = together if read and written else max(together, min([PLAN_CONTEXT, *made_for]))
    return Wish(
        context=positions,
        prompt=read or max(1, positions - (written or 0)),
        answer=written,
        users=users,
        kv_bits=kv_bits,
        speed=speed or SLOWEST,
        first=first,
        per_hour=per_hour,
        per_million=per_million,
        layouts=tuple(each for each in LAYOUTS if each in (layouts or LAYOUTS)),
        devices=devices,
    )


def _cases(name: str, subject: "Subject", wish: "Wish", asked: list[str]) -> "list[Case]":
    from manyhands.plan.candidates import formats
    from manyhands.plan.storage import storage_named
    from manyhands.plan.wish import Case

    chosen = [(storage_named(text, subject.native), None) for text in dict.fromkeys(asked)]
    return [Case(name, subject, storage, wish, only_at=rate) for storage, rate in chosen or formats(subject)]


def place_note(places: "list[Place]") -> str:
    """What there is, and what of it can be used."""
    from manyhands.format import show
    from manyhands.plan.fit import reserve, usable
    from manyhands.plan.tiers import disk_rate

    hosts = {place.host.title for place in places if place.host is not None}
    beside = f"; host: {hosts.pop()}" if len(hosts) == 1 else ""
    if len(places) > 1:
        return f"{len(places)} machines{beside}"
    machine = places[0].machine
    said = f"{machine.title}: {show(usable(machine), 'B')} for a model, {show(reserve(machine), 'B')} kept"
    said += (
        f" of each; {show(machine.all_bandwidth, 'B/s')}"
        if machine.devices > 1
        else (f"; {show(machine.all_bandwidth, 'B/s')}")
    )
    assumed = " (assumed)" if machine.disk_assumed else ""
    return said + f"; disk {show(disk_rate(machine), 'B/s')}{assumed}" + beside


def _print(notes: list[str], sections: "list[Section]", found: "list[Shown]") -> None:
    import shutil
    import sys

    from manyhands.plan.report.render import render, wrapped

    width, bold = min(shutil.get_terminal_size((80, 24)).columns, 120), terminal.styled(sys.stdout)
    for note in notes:
        print("\n".join(wrapped(terminal.shown(note), width, "")))
    if not found:
        print("\nNothing keeps all that was asked.")
    if sections:
        print("\n" + render(sections, width, bold=bold))
