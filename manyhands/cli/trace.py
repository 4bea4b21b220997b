"""`manyhands trace`: what is in a recorded trace; traces of other engines in, arrays and CSV out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli.sections import Verb, Verbs
from manyhands.errors import UserError

if TYPE_CHECKING:
    from manyhands.trace.recording import Trace
    from manyhands.trace.summary import Summary

app = typer.Typer(
    cls=Verbs,
    help="Recorded routing: which experts each token went to, and which tokens shared a forward pass.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_ROWS = 16
"""Layers on one screen."""
_FORMATS = "big-moe-on-edge, lattice, llama.cpp, megatron, sglang, vllm"


@app.command("show", cls=Verb)
def show(
    trace: Annotated[Path, typer.Argument(help="A directory that --trace or `trace import` wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Also compare every file's SHA-256.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """What a trace is of: tokens, forward passes, and how evenly the experts were used.

    Reads and checks all of it. A recording that was cut off, or goes on, is shown as far as it goes.
    """
    from manyhands.trace.recording import Trace
    from manyhands.trace.summary import summary

    found = Trace.open(trace)
    if verify:
        from manyhands.checkpoint import verify as verify_files

        verify_files(trace)
    about = summary(found)
    if json_output:
        import json

        manifest = found.manifest.model_dump(mode="json")
        print(json.dumps({"complete": found.complete, "manifest": manifest, **about.as_dict()}))
        return
    _print(found, about)


@app.command("import", cls=Verb)
def import_(
    source: Annotated[Path, typer.Argument(help="A file of another engine, or Megatron's directory.")],
    target: Annotated[Path, typer.Argument(help="The directory to write; it must be new or empty.")],
    format: Annotated[
        str | None, typer.Option("--from", metavar="ENGINE", help=f"Whose: {_FORMATS}. Default: as it looks.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="1-27", help="The sparse layers' numbers, with commas and ranges.")
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: one more than the highest that is in it.")
    ] = None,
    num_experts_per_tok: Annotated[int | None, typer.Option(min=1, help="Where the file does not say.")] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="The first so many ran in one pass, the others one by one."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print what `trace show` does, as JSON.")] = False,
) -> None:
    """Make a trace of another engine's record of its routing.

    vLLM's routed_experts (.npy, base64, or the server's answer), SGLang's (raw int32 or the answer), Megatron-LM's
    router_trace_rankN.jsonl, llama.cpp's layer,expert CSV, BigMoeOnEdge's route_trace v1, lattice's JSON Lines. What
    the file does not say is given by the flags. Pickles (.pt) are not read.
    """
    from manyhands.trace.foreign import Hints, import_trace

    hints = Hints(_numbers(layers), num_experts, num_experts_per_tok, prompt_tokens)
    import_trace(source, target, hints, format)
    show(target, json_output=json_output)


@app.command("export", cls=Verb)
def export(
    trace: Annotated[Path, typer.Argument(help="A trace.")],
    target: Annotated[Path, typer.Argument(help="The file to write, .npy or .csv; it must not exist.")],
    array: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Of .npy: expert_ids, weights, token_ids, sequence, position, phase or step."
        ),
    ] = "expert_ids",
) -> None:
    """Write a trace as a NumPy array ([T, L, K] as vLLM's), or as CSV with a line for each token, layer and expert."""
    from manyhands.trace.export import export_csv, export_npy
    from manyhands.trace.recording import Trace

    if target.suffix not in (".npy", ".csv"):
        raise UserError(f"{target}: what shall it be? Name a file that ends in .npy or .csv")
    if target.suffix == ".csv" and array != "expert_ids":
        raise UserError("--array says nothing with .csv, which has them all; leave it out")
    found = Trace.open(trace)
    if target.suffix == ".npy":
        export_npy(found, target, array)
    else:
        export_csv(found, target)


def _numbers(text: str | None) -> tuple[int, ...] | None:
    """`0-3,7` -> 0, 1, 2, 3, 7."""
    if text is None:
        return None
    found: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.strip().partition("-")
        ends = first, last or first
        if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends) or int(ends[0]) > int(ends[1]):
            raise UserError(f"--layers {text}: expected numbers and ranges, as in 0-3,7")
        found += range(int(ends[0]), int(ends[1]) + 1)
    if found != sorted(set(found)):
        raise UserError(f"--layers {text}: expected each layer once, in ascending order")
    return tuple(found)


def _print(trace: "Trace", about: "Summary") -> None:
    from rich.console import Console
    from rich.table import Table

    from manyhands.format import show as with_unit
    from manyhands.terminal import shown

    manifest = trace.manifest
    if manifest.source:
        print(shown(manifest.source))
    state = "" if trace.complete else "; the recording was cut off, or goes on"
    phases = ", ".join(f"{count:,} {name}" for name, count in about.phases.items())
    print(
        f"{about.tokens:,} tokens ({phases or 'none'}) of {about.sequences:,} texts in {about.steps:,} forward passes, "
        f"{about.tokens_per_step:.1f} tokens each{state}"
    )
    arrays = ", ".join(("expert ids", *manifest.recorded))
    print(
        f"{len(manifest.layers)} sparse layers, {manifest.num_experts_per_tok} of {manifest.num_experts} experts per "
        f"token; {arrays}; {with_unit(about.bytes, 'B')}"
    )
    if manifest.record_bytes is not None:
        cycle = manifest.num_experts_per_tok * sum(manifest.record_bytes)
        print(f"the experts of one token take {with_unit(cycle, 'B')}")
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "busiest expert", "unused", "experts a pass"):
        table.add_column(name, justify="right")
    L = len(about.layers)
    shown_layers = sorted({round(i * (L - 1) / (_ROWS - 1)) for i in range(_ROWS)}) if L > _ROWS else range(L)
    for one in (about.layers[at] for at in shown_layers):
        table.add_row(
            str(one.layer), f"{one.load_max_over_mean:.2f}x mean", f"{one.dead}", f"{one.distinct_per_step:.1f}"
        )
    Console(highlight=False, soft_wrap=True).print(table)
    if len(shown_layers) < L:
        print(f"{len(shown_layers)} of {L} layers; --json has all")
