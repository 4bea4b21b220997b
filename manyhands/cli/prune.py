"""`manyhands prune`: a mixture with fewer experts, and what that cost."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from manyhands.cli.options import IgnoreField
from manyhands.cli.progress import named_bar
from manyhands.cli.sampled import BATCH, SEQUENCE
from manyhands.defaults import MAX_SHARD_SIZE
from manyhands.errors import UserError

BATCHES = 8


def prune(
    model: Annotated[str, typer.Argument(help="A checkpoint, a run, a GGUF file, or a name on the Hugging Face hub.")],
    target: Annotated[str, typer.Argument(help="The directory to write: a new one, or an empty folder.")],
    keep: Annotated[str, typer.Option(help="Experts of each layer that stay: 48, or a share of them, 0.75 or 75%.")],
    by: Annotated[
        Literal["reap", "frequency", "gate", "random"],
        typer.Option(
            help="Which stay. reap: mean of weight × length of what the expert says; frequency: tokens that chose it; "
            "gate: sum of its weights; random: a control."
        ),
    ] = "reap",
    merge: Annotated[
        Literal["ream", "msmoe"] | None,
        typer.Option(help="Put the others into those that stay, channels aligned. Default: they go."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to score experts on: file, folder, glob, stdlib or hf:NAME. The last quarter is measured on. "
            "Default: the standard library's sources."
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of .jsonl and .parquet rows that holds the text.")
    ] = "text",
    trace: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Score them by a recorded trace instead: --by frequency or gate."),
    ] = None,
    max_batches: Annotated[int, typer.Option(min=1, help=f"Of {BATCH} × {SEQUENCE} tokens of text, in all.")] = BATCHES,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Run the model on text before and after.")
    ] = True,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Also measure 75, 50 and 25 % of the experts, beside random and the wrong ones."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what chance decides.")] = 0,
    to: Annotated[str | None, typer.Option(help="The family (model_type) to write. Default: its own.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Default: as stored.")] = None,
    max_shard_size: Annotated[float, typer.Option(min=1e-6, help="GB (10⁹ bytes) per file.")] = MAX_SHARD_SIZE / 1e9,
    drop_extras: Annotated[
        bool, typer.Option("--drop-extras", help="Leave out what the model does not compute with (MTP, vision).")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the target if this program wrote it and nobody changed it.")
    ] = False,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the receipt.")] = False,
) -> None:
    """Write a mixture with fewer experts in each layer; receipt.json says which stayed, and what that cost.

    How much a model loses depends on the model: look at the --curve before trusting a share.
    """
    from manyhands.checkpoint.target import claim
    from manyhands.tune.keep import check_prunable, parse_keep
    from manyhands.tune.prune import Pruning
    from manyhands.tune.prune import prune as run

    if trace is not None and data:
        raise UserError("--trace and --data both say what experts are scored on: give one")
    if not measure and (curve or data or merge):
        flag = "--curve" if curve else "--data" if data else "--merge"
        raise UserError(f"--no-measure runs nothing, and {flag} needs a run")
    claim(target, overwrite=overwrite, sources=[model], hashes=False)  # before any work

    import torch

    from manyhands.checkpoint.find import open_checkpoint
    from manyhands.cli.sampled import sample_of
    from manyhands.trace.recording import Trace

    recorded = None if trace is None else Trace.open(trace)
    documents = None
    if data:
        from manyhands.text import read_documents

        documents = read_documents(data, text_field)
    source = open_checkpoint(model, ignore_field or ())
    config = source.decoder("pruning")
    check_prunable(config)
    assert config.moe is not None
    count = parse_keep(keep, config.moe.router.num_experts)
    scores = recorded is None and (by != "random" or merge is not None)
    sample = sample_of(source, documents, data or [], max_batches, calibrate=scores) if measure else None
    with named_bar() as progress:
        receipt = run(
            source,
            target,
            Pruning(count, by, merge, curve, seed),
            sample,
            trace=recorded,
            to=to,
            dtype=None if dtype is None else getattr(torch, dtype),
            drop_extras=drop_extras,
            max_shard_size=int(max_shard_size * 1e9),
            overwrite=overwrite,
            progress=progress,
        )
    if json_output:
        import json

        print(json.dumps(receipt))
    else:
        _print(receipt, Path(target))


def _print(receipt: dict[str, Any], target: Path) -> None:
    from manyhands.terminal import shown

    made, found = receipt["pruned"], receipt["measured"]
    merged = "" if made["merge"] is None else f", the others put into them ({made['merge']})"
    print(
        f"{shown(receipt['source']['model_type'])} -> {shown(target)}: {made['kept']} of {made['experts']} experts "
        f"stay in each of {len(made['layers'])} layers, by {made['by']}{merged}"
    )
    if scored := made["scored_on"]:
        print(f"  scored on {scored['tokens']:,} tokens of {shown(scored.get('text') or scored['trace'])}")
    before = sum(entry["size"] for entry in receipt["source"]["files"].values()) / 1e6
    after = sum(entry["size"] for entry in receipt["target"]["files"].values()) / 1e6
    print(f"  {before:.1f} MB -> {after:.1f} MB")
    if found:
        a, b = found["before"], found["after"]
        print(
            f"  perplexity {a['perplexity']:.3f} -> {b['perplexity']:.3f}{_bits(a, b)} on {found['tokens']:,} other "
            f"tokens of {shown(found['text'])}"
        )
    for line in _curve(receipt["curve"] or []):
        print(f"  {line}")
    if receipt["notes"]:
        print(shown(receipt["notes"]))
    print(f"what became of every tensor: {shown(target / 'receipt.json')}")


def _bits(a: dict[str, Any], b: dict[str, Any]) -> str:
    if a["bits_per_byte"] is None or b["bits_per_byte"] is None:
        return ""
    return f", bits per byte {a['bits_per_byte']:.4f} -> {b['bits_per_byte']:.4f}"


def _curve(points: list[dict[str, Any]]) -> list[str]:
    if not points:
        return []
    width = max(len(point["how"]) for point in points)
    lines = [f"{'experts':>7}  {'share':>5}  {'chosen by':{width}}  {'perplexity':>11}  bits per byte"]
    for p in points:
        bits = "" if p["bits_per_byte"] is None else f"{p['bits_per_byte']:.4f}"
        draws = f"  mean of {len(p['draws'])} draws" if "draws" in p else ""
        lines.append(
            f"{p['experts']:>7}  {p['share']:>5.0%}  {p['how']:{width}}  {p['perplexity']:>11.3f}  {bits}{draws}"
        )
    return lines
