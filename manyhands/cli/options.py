"""Options that several verbs have, described once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from manyhands.cli.size import size
from manyhands.errors import UserError

IgnoreField = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-field",
        metavar="NAME",
        help="Read past this unknown field of config.json, which you know to change nothing. Repeatable.",
    ),
]
"""`ignore_fields` of `load`, `load_model`, `open_source` and `convert`."""

Which = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", metavar="WHICH", help="Of a run: best (by validation), last (default), or a step. RUN/best too."
    ),
]
"""`which` of `checkpoint.runs.checkpoint_of`."""

TraceDirectory = Annotated[
    Path | None,
    typer.Option("--trace", metavar="DIR", help="Record which experts each token goes to, in a new directory."),
]
"""`manyhands trace show` reads it; docs/trace.md has the format."""

Adapter = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Put this on the model: a run of `manyhands tune`, or a folder of PEFT's."),
]
"""`adapter` of `load`."""

TraceLimit = Annotated[
    str, typer.Option("--trace-limit", metavar="SIZE", help="Bytes of the trace; the oldest are deleted beyond them.")
]
TRACE_LIMIT = "1GB"
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="What this process may take (4GB): a packed model's experts stay on disk, as many as fit in memory.",
    ),
]
CachePolicy = Annotated[
    str | None, typer.Option("--cache-policy", help="Which experts stay: lfu (default), lru, or pinned with --pin.")
]
Pin = Annotated[
    Path | None, typer.Option("--pin", metavar="TRACE", help="Keep the experts that this trace used most in memory.")
]


def on_disk(memory: str | None, cache_policy: str | None, pin: Path | None) -> dict[str, Any]:
    """The arguments of `load` that these three are. Raises `UserError`, and `DataError` for what is no trace."""
    if memory is None:
        if cache_policy is not None or pin is not None:
            flag = "--pin" if cache_policy is None else "--cache-policy"
            raise UserError(f"{flag} says which experts stay in memory: give --memory SIZE too")
        return {}
    if cache_policy == "pinned" and pin is None:
        raise UserError("--cache-policy pinned needs --pin TRACE, whose experts it keeps")
    if pin is not None and cache_policy not in (None, "pinned"):
        raise UserError(f"--pin is for --cache-policy pinned, not {cache_policy}")
    counts = None
    if pin is not None:
        from manyhands.trace.counts import expert_counts
        from manyhands.trace.recording import Trace

        counts = expert_counts(Trace.open(pin)).tolist()
    policy = cache_policy or ("lfu" if pin is None else "pinned")
    return {"memory": size("--memory", memory), "cache_policy": policy, "pin": counts}
