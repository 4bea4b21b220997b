"""Options that several verbs have, described once."""

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
