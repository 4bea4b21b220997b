"""`manyhands doctor`: this machine, and what limits mixture-of-experts models on it."""

from pathlib import Path
from typing import Annotated

import typer

from manyhands import terminal
from manyhands.cli.loudness import quiet
from manyhands.format import show


def doctor(
    again: Annotated[bool, typer.Option("--again", help="Measure again, whatever is remembered.")] = False,
    disk_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also measure random reads of this file, such as a model's .safetensors."),
    ] = None,
    record: Annotated[
        str, typer.Option(metavar="SIZE", help="With --disk-file: bytes of a read; an expert's, as packed.")
    ] = "1MiB",
    speeds: Annotated[
        bool,
        typer.Option(
            "--speeds", help="Also run small random models in four formats (a minute or two), for plan's estimates."
        ),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure this machine once: read bandwidth, matrix rates, memory, disk; say what limits MoE models here."""
    import os

    from manyhands.cli.size import size
    from manyhands.plan.disk import THREADS, random_rate

    record_bytes = size("--record", record)
    assert record_bytes is not None
    rate = None if disk_file is None else random_rate(disk_file, record_bytes)

    from manyhands.plan.diagnose import diagnose, experts_from_disk
    from manyhands.plan.host import cache_file, free_memory
    from manyhands.plan.remember import measured, remembered

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    here = measured(again=again, quiet=quiet())
    limits = diagnose(here, environment=os.environ, load=load, free=free_memory())
    if speeds:
        from manyhands.cli.speeds import run_typical

        run_typical(here, load, quiet=quiet())
    from manyhands.cli.speeds import speeds_section
    from manyhands.kernels.native import levels, missing
    from manyhands.kernels.native.library import default_level
    from manyhands.plan.recorded import recorded_speeds

    section = speeds_section(here, recorded_speeds())
    forecast, native = experts_from_disk(here), missing()
    if native is not None:
        limits.append(f"the native expert kernels are not here: {native}; experts run through PyTorch")
    if json_output:
        import json

        kernels = [] if native is not None else levels()
        found = {
            **here.model_dump(mode="json"),
            "native_levels": kernels,
            "limits": limits,
            "experts_on_disk": forecast,
            "speeds": section.to_dict()["table"] if section is not None else [],
        }
        if rate is not None:
            found["disk_file"] = {"path": str(disk_file), "record_bytes": record_bytes, "bytes_per_second": rate}
        print(json.dumps(found))
        return
    import shutil

    from manyhands.plan.report.machine_table import machine_section
    from manyhands.plan.report.render import render, wrapped

    width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    print(render([machine_section(here), *([section] if section is not None else [])], width))
    if rate is not None:
        reads = f"random reads of {show(record_bytes, 'B')}, {THREADS} at a time"
        print(f"\n{terminal.shown(disk_file)}: {show(rate, 'B/s')} in {reads}")
    print("\nWhat limits MoE models here")
    for sentence in limits or ["nothing stands out"]:
        print("\n".join(wrapped(f"- {sentence}", width)))
    if forecast is not None:
        speed, hits = show(forecast["tokens_per_second"], "tok/s"), forecast["hit_rate"]
        told = (
            f"Experts on disk: {show(forecast['bytes_per_second'], 'B/s')}, so {speed} at best for a model that uses "
            f"1 GB of experts a token and has {forecast['share']:.0%} of all in memory (hit rate {hits:.0%}, assumed); "
            "manyhands plan MODEL --memory SIZE forecasts for a model"
        )
        print("\n" + "\n".join(wrapped(told, width)))
    if native is None:
        told = f"native expert kernels: {default_level()} (this processor has: {', '.join(levels())})"
        print("\n" + "\n".join(wrapped(told, width, "")))
    kept = f"remembered in {cache_file()}; --again measures anew" if remembered() == here else "not remembered"
    print("\n" + "\n".join(wrapped(f"measured {here.measured}, {kept}", width, "")))
