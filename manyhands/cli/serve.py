"""`manyhands serve`: a model behind OpenAI's HTTP interface."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli.crew import with_crew
from manyhands.cli.loudness import dated
from manyhands.cli.options import TRACE_LIMIT, CachePolicy, IgnoreField, Pin, TraceDirectory, TraceLimit, on_disk
from manyhands.cli.recorded import check_trace
from manyhands.cli.size import size
from manyhands.errors import UserError

if TYPE_CHECKING:
    from manyhands.moe.crew import Crew


def serve(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint, a run, a GGUF file, or a name on the hub.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A further model, loaded when it is first asked for. Repeatable."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="What `manyhands tune` or PEFT made of CHECKPOINT: requests for model NAME get it. Its weights are in "
            "memory once. Repeatable.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the model. Default: the last part of its path.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(help="A key that requests must carry. Repeatable.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with such keys, one a line: other users see what a command line says.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Web pages of https://HOST may ask too, beside this machine's own; *: all may. Repeatable.",
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen at a public address without a key.")] = False,
    max_sequences: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 32,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step; prompts run in chunks.")] = 256,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are told 429.")] = 128,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes of the cache (512MB, 2GiB). Default: what contexts need, at most a quarter of what is free.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Weights of all models in memory; idle ones are given back. A packed model that is larger keeps its "
            "experts on disk, and the process within this.",
        ),
    ] = None,
    cache_policy: CachePolicy = None,
    pin: Pin = None,
    request_timeout: Annotated[float, typer.Option(min=0, help="Seconds a request may take; 0: any time.")] = 0,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="Seconds to finish what runs after SIGTERM.")] = 30,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Bytes of a request's body.")] = "8MiB",
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="The same logits in any batch, bit for bit, of float weights too (int8, int4: always)."
        ),
    ] = False,
    prefix_caching: Annotated[bool, typer.Option(help="Prompts that begin alike are computed once.")] = True,
    trace: TraceDirectory = None,
    trace_limit: TraceLimit = TRACE_LIMIT,
    ignore_field: IgnoreField = None,
) -> None:
    """Serve models over HTTP, as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models and more.

    Requests run together, each as it would alone. The page at / chats with the model and shows its experts. Ctrl-C and
    SIGTERM let what runs finish. A public address needs --api-key, or --insecure.

    On N processes, which share out the experts: torchrun --nproc-per-node N -m manyhands serve …
    """
    from manyhands.parallel.started import alike, started_together

    with alike():
        paths = _paths(checkpoint, model or [], served_model_name)
        adapters = _adapters(adapter or [], paths, checkpoint)
        keys = [*(api_key or []), *_read_keys(api_key_file)]
        if any(not (key.isascii() and key.isprintable() and key == key.strip() and key) for key in keys):
            raise UserError("--api-key: an empty key, or one that HTTP cannot carry: take printable ASCII")
        stay = on_disk(memory, cache_policy, pin)
        bounds = {"--kv-memory": kv_memory, "--memory": memory, "--max-body": max_body}
        limit = size("--trace-limit", trace_limit)
        check_trace(trace)
        kv_bytes, memory_bytes, body_bytes = (size(flag, text) for flag, text in bounds.items())
        if started_together() and (checkpoint is None or len(paths) > 1 or memory is not None or adapters):
            raise UserError("several processes share the experts of one model: no --model, --adapter or --memory")
        try:
            from manyhands.serve import app as application
            from manyhands.serve import load, run
            from manyhands.serve.memory import one_arena
            from manyhands.serve.models import Models
            from manyhands.serve.origins import origins
        except ModuleNotFoundError as error:
            raise UserError(f"serving needs the package {error.name}: pip install 'manyhands[serve]'") from None
        pages = origins(allow_origin or [])
        if not run.is_local(host) and not keys and not insecure:
            raise UserError(
                f"--host {host} lets everybody who can reach this machine use the model: give --api-key KEY, "
                "or --insecure"
            )
    settings = load.Settings(
        max_sequences,
        max_batch_tokens,
        max_waiting,
        kv_bytes,
        request_timeout or None,
        exact,
        prefix_caching,
        tuple(ignore_field or ()),
        trace,
        len(paths) + len(adapters) > 1,
        limit,
        **stay,
    )
    dated()
    one_arena()
    code = 0

    def listen(crew: "Crew | None") -> None:
        nonlocal code
        models = Models(load.entries(paths, replace(settings, crew=crew), adapters), memory_bytes)
        closed = run.is_local(host) and not keys
        app = application.build(models, [key.encode() for key in keys], body_bytes or 0, pages, closed)
        bound = run.bind(host, port)
        with bound:  # given back too if the model is refused
            if checkpoint is not None:
                models.load_first()
            code = run.serve(app, models, bound, shutdown_timeout)

    with_crew(listen)
    sys.exit(code)


def _read_keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise UserError(f"--api-key-file {path}: cannot be read: {error}") from None
    if not keys:
        raise UserError(f"--api-key-file {path}: there is no key in it")
    return keys


def _paths(checkpoint: Path | None, others: list[str], name: str | None) -> dict[str, str | Path]:
    """Path by name, the argument's first."""
    paths: dict[str, str | Path] = {}
    if checkpoint is not None:
        own = checkpoint.resolve().name if checkpoint.exists() else str(checkpoint)
        paths[name or own or str(checkpoint)] = checkpoint
    elif name is not None:
        raise UserError(
            "--served-model-name names the model that is given as the argument; --model NAME=PATH has its own"
        )
    for text in others:
        own, path = _named("--model", text, paths)
        paths[own] = path
    if not paths:
        raise UserError("nothing to serve: give a checkpoint, or --model NAME=PATH")
    return paths


def _adapters(texts: list[str], paths: dict[str, str | Path], checkpoint: Path | None) -> dict[str, str | Path]:
    """Path by name."""
    found: dict[str, str | Path] = {}
    for text in texts:
        if checkpoint is None:
            raise UserError("--adapter is put on the model that is given as the argument: give one")
        own, path = _named("--adapter", text, {**paths, **found})
        found[own] = path
    return found


def _named(flag: str, text: str, taken: dict[str, str | Path]) -> tuple[str, str]:
    """NAME=PATH. Raises `UserError` for what is not, and for a name that is taken."""
    own, separator, path = text.partition("=")
    if not separator or not own or not path:
        raise UserError(f"{flag} {text}: expected NAME=PATH")
    if own in taken:
        raise UserError(f"{flag} {text}: there are two models of the name {own}")
    return own, path
