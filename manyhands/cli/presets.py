"""`manyhands presets`: the runs that ship with the package."""

import shutil
import textwrap
from typing import Annotated, Any

import typer


def presets(
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """The runs that ship with manyhands: what each is for, its size, and how long it takes where that is known.

    `manyhands train --preset NAME` trains one, `--print-config` shows all of it. There is one for each kind of router;
    Soft MoE mixes later tokens into earlier ones, so no language model has it: it is for mh.MoELayer.
    """
    from manyhands.config.load import load_preset, preset_about, preset_names
    from manyhands.format import duration, rounded
    from manyhands.plan.count_kind import count_any

    found: list[dict[str, Any]] = []
    for name in preset_names():
        run = load_preset(name)
        counts = count_any(run.model)
        found.append(
            {
                "name": name,
                "about": preset_about(name),
                "parameters": counts.total,
                "active_parameters": counts.active,
                "max_steps": run.train.max_steps,
                "tokens": run.train.max_steps * run.train.batch_size * run.train.sequence_length,
                "max_seconds": run.train.max_seconds,
            }
        )
    if json_output:
        import json

        print(json.dumps(found, ensure_ascii=False))
        return
    width = max(min(shutil.get_terminal_size((80, 24)).columns, 120), 50)
    for preset in found:
        seconds = preset["max_seconds"]
        long = f"{preset['max_steps']:,} steps" if seconds is None else f"{duration(seconds)} at most"
        size = f"{rounded(preset['parameters'])} parameters, {rounded(preset['active_parameters'])} active"
        print(f"{preset['name']:<20} {size}, {long}")
        about = textwrap.fill(preset["about"], width, initial_indent="    ", subsequent_indent="    ")
        print(about)
