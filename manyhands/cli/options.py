"""Options that several verbs have, described once."""

from pathlib import Path
from typing import Annotated

import typer

IgnoreField = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-field",
        metavar="NAME",
        help="Read past this unknown field of config.json, which you know to change nothing. Repeatable.",
    ),
]
"""`ignore_fields` of `load`, `load_model`, `open_source` and `convert`."""

TraceDirectory = Annotated[
    Path | None,
    typer.Option("--trace", metavar="DIR", help="Record which experts each token goes to, in a new directory."),
]
"""`manyhands trace show` reads it; docs/trace.md has the format."""

TraceLimit = Annotated[
    str, typer.Option("--trace-limit", metavar="SIZE", help="Bytes of the trace; the oldest are deleted beyond them.")
]
TRACE_LIMIT = "1GB"
