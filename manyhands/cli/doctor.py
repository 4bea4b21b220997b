"""`manyhands doctor`: this machine, and what limits mixture-of-experts models on it."""

from typing import Annotated

import typer


def doctor(
    again: Annotated[bool, typer.Option("--again", help="Measure again, whatever is remembered.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure this machine once: read bandwidth, matrix rates, memory, disk; say what limits MoE models here."""
    import os

    from manyhands.plan.diagnose import diagnose
    from manyhands.plan.host import cache_file, free_memory
    from manyhands.plan.remember import measured, remembered

    here = measured(again=again, quiet=json_output)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    limits = diagnose(here, environment=os.environ, load=load, free=free_memory())
    from manyhands.kernels.native import levels, missing
    from manyhands.kernels.native.library import default_level

    native = missing()
    if native is not None:
        limits.append(f"the native expert kernels are not here: {native}; experts run through PyTorch")
    if json_output:
        import json

        kernels = [] if native is not None else levels()
        print(json.dumps({**here.model_dump(mode="json"), "native_levels": kernels, "limits": limits}))
        return
    import shutil

    from manyhands.plan.report.machine_table import machine_section
    from manyhands.plan.report.render import render, wrapped

    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    print(render([machine_section(here)], width))
    print("\nWhat limits MoE models here")
    for sentence in limits or ["nothing stands out"]:
        print("\n".join(wrapped(f"- {sentence}", width)))
    if native is None:
        print(f"\nnative expert kernels: {default_level()} (this processor has: {', '.join(levels())})")
    kept = f"remembered in {cache_file()}; --again measures anew" if remembered() == here else "not remembered"
    print(f"\nmeasured {here.measured}, {kept}")
