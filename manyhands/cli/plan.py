"""`manyhands plan`: what a model costs, from its description alone."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyhands import terminal
from manyhands.cli import complete
from manyhands.cli.drawn import drawn
from manyhands.cli.loudness import quiet
from manyhands.defaults import PLAN_CONTEXT, TOKENS_PER_DEVICE
from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from manyhands.plan.network import Network
    from manyhands.plan.report import Ask, Section
    from manyhands.plan.storage import Storage
    from manyhands.plan.subject import Subject
    from manyhands.plan.traffic import Load


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name of the catalogue, a config.json, a checkpoint or run directory, a run file, a preset.",
            autocompletion=complete.described,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="Changes: section.key=value of a preset or run file, num_experts=16 of a model of the catalogue.",
        ),
    ] = None,
    versus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Another model, side by side; may be given several times.",
            autocompletion=complete.described,
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="here (measured once), 8xh100, rtx4090, m4-max, …, or FILE.toml; the speeds are its upper bound.",
            autocompletion=complete.machines,
        ),
    ] = None,
    memory_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of one device, in place of the machine's: 64GiB.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE/s", help="Of one device's memory, in place of the machine's: 400GB/s.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, max=99_999, help="Devices of the machine, as in NAMExN.")] = None,
    context: Annotated[
        str | None, typer.Option(metavar="TOKENS", help=f"4096, 32k, …  Default: {PLAN_CONTEXT // 1024}k.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1 << 20, help="Sequences decoded together.")] = 1,
    prompt: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Length of the prompt.  Default: context.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Weights: bf16, int8, int4, fp8, mxfp4, nvfp4, fp32, native; GGUF's q4_k_m, q8_0, …; awq, gptq; as "
            "quantize writes them: manyhands-int4, manyhands-int8.  Default: native."
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="CLASS=BITS,…", help="Bits per weight of routed, linear, embedding, rest.")
    ] = None,
    kv_bits: Annotated[float, typer.Option(min=1, max=32, help="Bits per cached number.")] = 16,
    speculate: Annotated[
        int | None,
        typer.Option(min=1, max=64, metavar="N", help="With --machine: N tokens are guessed ahead (MTP, …)."),
    ] = None,
    accepted: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="With --speculate: what a step gives, 2.8, or each guess's chance, 85%."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Experts on disk, in a process of so many bytes: 4GB.")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="SIZE/s", help="What the disk reads: 2GB/s.  Default: the machine's.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Recorded routing: with --memory its hit rate, with --scale its rows and load."
        ),
    ] = None,
    load: Annotated[Path | None, typer.Option(help="A recorded load: journal.jsonl, or eval --json's output.")] = None,
    price: Annotated[float | None, typer.Option(help="USD per device and hour.")] = None,
    api_price: Annotated[
        str | None,
        typer.Option(metavar="IN/OUT", help="With --price: break-even against USD per 10^6 tokens; IN/CACHED/OUT too."),
    ] = None,
    in_out: Annotated[
        float | None, typer.Option(min=0.0, max=1e6, help="With --price: tokens in for one out, 3 by default.")
    ] = None,
    cached: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="With --price: share of the input in a cache.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Train on so many: 14.8T.")] = None,
    train_memory: Annotated[
        bool, typer.Option("--train-memory", help="Memory of training --batch sequences a device, by optimiser.")
    ] = False,
    ep: Annotated[
        int, typer.Option(min=1, max=99_999, help="With --train-memory: devices that share out one set of experts.")
    ] = 1,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of the matrix rate in training.")] = 0.4,
    gpu_hours: Annotated[str | None, typer.Option(help="Device hours of training, instead of --utilisation.")] = None,
    scale: Annotated[bool, typer.Option("--scale", help="Expert parallelism on paper.")] = False,
    devices: Annotated[int | None, typer.Option(min=2, help="With --scale: expert-parallel devices.")] = None,
    tokens_per_device: Annotated[
        int, typer.Option(min=1, max=1 << 24, help="With --scale: per layer and step.")
    ] = TOKENS_PER_DEVICE,
    imbalance: Annotated[float, typer.Option(min=1.0, max=1e4, help="With --scale: busiest / mean load.")] = 1.0,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="With --scale, between any devices: 20us,5GB/s, or benchmarks/scale.py's file.",
        ),
    ] = None,
    flops: Annotated[str | None, typer.Option(help="Scaling law: the best model for so many FLOPs, 1e20.")] = None,
    include_rumours: Annotated[
        bool, typer.Option("--include-rumours", help="Compute with figures nobody confirmed.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print every formula with the numbers in it.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw to a .png, .svg or .pdf.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Parameters, FLOPs, bytes, memory, best speed, price: of one model, or of several side by side.

    Computed from the configuration; nothing is loaded. Speeds need --machine and are upper bounds (a roofline).
    """
    from manyhands.cli.machines import Changes, machine_asked, recorded_here
    from manyhands.cli.size import size
    from manyhands.plan.price import read_api_price
    from manyhands.plan.report.numbers import length, quantity
    from manyhands.plan.storage import storage_named, with_bits
    from manyhands.plan.subject import read_subject

    subjects = [read_subject(model, overrides or [], include_rumours=include_rumours)]
    if versus:
        from manyhands.plan.report.versus import MOST_SIDES

        if len(versus) >= MOST_SIDES:
            raise ConfigError(f"--versus {versus[MOST_SIDES - 1]}: at most {MOST_SIDES} models stand side by side")
        subjects += [read_subject(other, include_rumours=include_rumours) for other in versus]
    given = {
        "--load": load,
        "--speculate": speculate is not None,
        "--accepted": accepted is not None,
        "--train-memory": train_memory,
        "--ep": ep != 1,
        "--memory": memory,
        "--disk": disk,
        "--trace": trace,
        "--price": price,
        "--api-price": api_price,
        "--in-out": in_out is not None,
        "--cached": cached is not None,
        "--tokens": tokens,
        "--gpu-hours": gpu_hours,
        "--scale": scale,
        "--flops": flops,
        "--devices": devices,
        "--imbalance": imbalance != 1.0,
        "--network": network,
        "--tokens-per-device": tokens_per_device != TOKENS_PER_DEVICE,
    }
    _refuse_ignored(subjects, {option for option, value in given.items() if value})
    asked: list[Storage | None] = []
    for subject in subjects:
        held = storage_named(format, subject.native) if format else None
        asked.append(with_bits(held or _default(subject), bits) if bits else held)

    from manyhands.plan.report import Ask

    values: dict[str, Any] = {
        "batch": batch,
        "prompt": length(prompt, "--prompt") if prompt else None,
        "kv_bits": kv_bits,
        "machine": machine_asked(
            machine,
            Changes(memory_size, bandwidth, count),
            needed=scale or speculate is not None or (price is not None and tokens is None),
            quiet=quiet(),
        ),
        "load": _load(load, subjects[0]),
        "memory": size("--memory", memory),
        "disk": size("--disk", disk.removesuffix("/s") if disk else None),
        "speculate": speculate,
        "accepted": _accepted(accepted, speculate),
        "price": _positive(price, "--price"),
        "api_price": read_api_price(api_price) if api_price is not None else None,
        "in_out": 3.0 if in_out is None else in_out,
        "cached": cached or 0.0,
        "mixed": api_price is not None or in_out is not None or cached is not None,
        "tokens": quantity(tokens, "--tokens") if tokens else None,
        "hours": quantity(gpu_hours, "--gpu-hours") if gpu_hours else None,
        "train_memory": train_memory,
        "ep": ep,
        "utilisation": utilisation,
        "scale": scale,
        "devices": devices,
        "tokens_per_device": tokens_per_device,
        "imbalance": imbalance,
        "network": _network(network),
        "flops": quantity(flops, "--flops", 1e12, 1e30) if flops else None,
    }
    values["recorded_here"] = recorded_here(values["machine"])
    if values["memory"] and not values["disk"] and values["machine"] is None:
        raise ConfigError("--memory needs what the disk reads: --disk 2GB/s, or --machine here, which measures it")
    if values["disk"] and not values["memory"] and values["machine"] is None:
        raise ConfigError("--disk goes with --memory or --machine")
    if devices is not None and values["machine"] is not None:
        from manyhands.plan.report.scale import check_devices

        check_devices(subjects[0], values["machine"], devices, values["network"])
    if train_memory:
        from manyhands.plan.report.training_memory import check_ep

        check_ep(subjects[0], values["machine"], ep)
    positions = [s.sizes.positions for s in subjects if s.sizes is not None and s.sizes.positions is not None]
    values["context"] = length(context, "--context") if context else min([PLAN_CONTEXT, *positions])
    asks = [
        Ask(**values, storage=storage or _default(subject)) for subject, storage in zip(subjects, asked, strict=True)
    ]
    if trace is not None:
        from manyhands.cli.replayed import on_devices, replayed

        if memory is not None:
            asks = [replace(asks[0], hits=replayed(trace, subjects[0], asks[0]))]
        if scale:
            found, source = on_devices(trace, subjects[0], asks[0])
            asks = [replace(asks[0], recorded=found, recorded_source=source)]
    sections = _sections(subjects, asks)
    if plot is not None:
        from manyhands.plan.report.plot import draw

        line = drawn(plot)
        draw(plot, subjects, asks)
    _print(subjects, asks, sections, explain=explain, json_output=json_output, hint=machine is None)
    if plot is not None and not json_output:
        print(line)


def _refuse_ignored(subjects: "list[Subject]", given: set[str]) -> None:
    """Raises `ConfigError` for an option that would change nothing."""
    first = subjects[0]
    if len(subjects) > 1 and given:
        raise ConfigError(f"{min(given)} is about one model: leave --versus out")
    if first.sizes is None and (about := given - {"--flops"}):
        planned = "parameters, memory and FLOPs" if first.pairs is not None else "parameters and memory"
        raise ConfigError(f"{min(about)} has no meaning for {first.name}: only {planned} are planned for it")
    of_experts = given & {"--scale", "--load", "--memory", "--disk", "--trace"}
    if first.sizes is not None and not first.sizes.num_experts and (about := of_experts):
        raise ConfigError(f"{min(about)} is about experts, and {first.name} is dense")
    if first.config is None and (about := given & {"--load", "--train-memory"}):
        raise ConfigError(f"{min(about)} has no meaning for {first.name}: it is not of a family that manyhands runs")
    if "--ep" in given and "--train-memory" not in given:
        raise ConfigError("--ep goes with --train-memory")
    of_scale = {"--devices", "--imbalance", "--tokens-per-device", "--network"}
    if "--scale" not in given and (about := given & of_scale):
        raise ConfigError(f"{min(about)} goes with --scale")
    if "--trace" in given and not given & {"--memory", "--scale"}:
        raise ConfigError("--trace goes with --memory or --scale")
    if given >= {"--trace", "--scale", "--imbalance"}:
        raise ConfigError("--imbalance is what --trace says of the busiest device: leave one of them out")
    if (about := given & {"--api-price", "--in-out", "--cached"}) and "--price" not in given:
        raise ConfigError(f"{min(about)} goes with --price")
    if "--gpu-hours" in given and "--tokens" not in given:
        raise ConfigError("--gpu-hours goes with --tokens")


def _sections(subjects: "list[Subject]", asks: "list[Ask]") -> "list[Section]":
    from manyhands.plan.report import build_sections

    if len(subjects) == 1:
        return build_sections(subjects[0], asks[0])
    from manyhands.plan.report.versus import build_versus

    return build_versus(*zip(subjects, asks, strict=True))


def _default(subject: "Subject") -> "Storage":
    from manyhands.plan.storage import BF16

    return subject.native or BF16


def _load(path: Path | None, subject: "Subject") -> "Load | None":
    if path is None or subject.config is None:
        return None
    from manyhands.plan.load_file import read_load

    return read_load(path, subject.config)


def _network(text: str | None) -> "Network | None":
    """One way between any two devices; a machine's links are what --machine says."""
    if text is None:
        return None
    from manyhands.cli.network import ways

    found = ways(text)
    if found.within is not None or found.between.source.startswith("a link"):
        raise ConfigError(
            f"--network {text}: a machine's links come with --machine {text}; expected LATENCY,RATE or a file"
        )
    return found.between


def _accepted(text: str | None, drafts: int | None) -> float:
    """Tokens that a step gives. Raises `ConfigError` for one without the other, and for what no step gives."""
    from manyhands.plan.speculation import read_accepted

    if (text is None) != (drafts is None):
        raise ConfigError("--speculate and --accepted go together: how many are guessed, and what a step gives of them")
    return 1.0 if text is None or drafts is None else read_accepted(text, drafts)


def _positive(value: float | None, what: str) -> float | None:
    if value is not None and not 0 < value < 1e9:
        raise ConfigError(f"{what} {value:g}: expected more than 0")
    return value


def _print(
    subjects: "list[Subject]",
    asks: "list[Ask]",
    sections: "list[Section]",
    *,
    explain: bool,
    json_output: bool,
    hint: bool,
) -> None:
    import shutil
    import sys

    if json_output:
        import json

        print(json.dumps(_as_dict(subjects, asks, sections), allow_nan=False))
        return
    from manyhands.plan.report.render import render, wrapped

    width, bold = min(shutil.get_terminal_size((80, 24)).columns, 120), terminal.styled(sys.stdout)
    for subject in subjects:
        print(f"{terminal.shown(subject.name)}: {terminal.shown(subject.origin)}")
        for note in subject.notes:
            print("\n".join(wrapped(f"note: {terminal.shown(note)}", width)))
    print()
    print(render(sections, width, explain=explain, bold=bold))
    if hint and asks[0].machine is None and subjects[0].sizes is not None:
        print("\nFor speeds: --machine here (measured once, in some seconds), or 8xh100, m4-max, …")


def _as_dict(subjects: "list[Subject]", asks: "list[Ask]", sections: "list[Section]") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "models": [
            {"name": s.name, "origin": s.origin, "notes": list(s.notes), "counts": asdict(s.counts)} for s in subjects
        ],
        "context": asks[0].context,
        "batch": asks[0].batch,
        "format": [ask.storage.name for ask in asks],
        "machine": asks[0].machine.model_dump() if asks[0].machine is not None else None,
        "sections": {section.key: section.to_dict() for section in sections},
    }
