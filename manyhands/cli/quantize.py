"""`manyhands quantize`: a model's weights in 4, 8 or 16 bits, and what that cost."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from manyhands import terminal
from manyhands.cli.options import IgnoreField
from manyhands.cli.progress import named_bar
from manyhands.cli.sampled import BATCH, SEQUENCE, sample_of
from manyhands.defaults import GROUP_SIZE


def quantize(
    model: Annotated[str, typer.Argument(help="A checkpoint, a run, a GGUF file, or a name on the hub.")],
    target: Annotated[str, typer.Argument(help="The directory to write: a new one, or an empty folder.")],
    experts: Annotated[
        Literal["int4", "int8", "bf16", "q4_0", "q8_0"],
        typer.Option(help="The routed experts. q4_0 and q8_0 keep what comes from such a GGUF exactly."),
    ] = "int4",
    linear: Annotated[
        Literal["int8", "int4", "bf16", "q8_0", "q4_0"],
        typer.Option(help="Attention, shared experts, dense layers, head."),
    ] = "int8",
    group_size: Annotated[int, typer.Option(help="int4: inputs that share a scale, 32 or 64.")] = GROUP_SIZE,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to calibrate with: file, folder, glob, stdlib or hf:NAME. The last quarter is measured on."
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of .jsonl and .parquet rows that holds the text.")
    ] = "text",
    max_batches: Annotated[
        int | None, typer.Option(min=1, help=f"Of {BATCH} × {SEQUENCE} tokens. Default: 4, without --data 1.")
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Compare routing and perplexity with the original's, a layer in memory at a time; or pack expert by "
            "expert. Default: what free memory allows.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the target if this program wrote it and nobody changed it.")
    ] = False,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the receipt.")] = False,
) -> None:
    """Write a packed copy of a model; receipt.json says what was rounded, what was not, and what changed.

    The router, norms and the embedding are never rounded. Without --data every input of a layer counts the same; with
    it an input's rounding error is weighed by its mean square. Either way routing and perplexity are compared with
    the original's on sample text, if memory has room for a layer; if not, about one expert is in memory at a time.
    """
    from manyhands.config import PackedConfig, parse

    def packing(format: str) -> dict[str, Any]:
        return {"format": format, "group_size": {"int4": group_size, "q8_0": 32, "q4_0": 32}.get(format, 0)}

    packed = parse(PackedConfig, {"experts": packing(experts), "linear": packing(linear)}, "--experts and --linear")

    from manyhands.checkpoint.target import claim

    claim(target, overwrite=overwrite, sources=[model], hashes=False)  # before any work
    documents = None
    if data:
        from manyhands.text import read_documents

        documents = read_documents(data, text_field)

    from manyhands.checkpoint.find import open_checkpoint
    from manyhands.quantize.quantize import quantize as run

    source = open_checkpoint(model, ignore_field or ())
    calibrate = documents is not None
    sample = sample_of(source, documents, data or [], max_batches or (4 if calibrate else 1), calibrate)
    with named_bar() as progress:
        receipt = run(source, target, packed, sample, measure=measure, overwrite=overwrite, progress=progress)
    if json_output:
        import json

        print(json.dumps(receipt))
    else:
        _print(receipt, Path(target))
    _warn(receipt["routing_agreement"], linear, experts)


def _print(receipt: dict[str, Any], target: Path) -> None:
    packed = receipt["target"]["packed"]
    formats = ", ".join(f"{name} {packed[name]['format']}" for name in ("experts", "linear") if packed[name])
    print(f"{terminal.shown(receipt['source']['model_type'])} -> {terminal.shown(target)}: {formats}")
    print(f"  {'':10} {'weights':>16} {'bits each':>9} {'MB before':>10} {'MB after':>10}  stored as")
    classes = receipt["classes"]
    for name, found in classes.items():
        before, after = found["bytes_before"] / 1e6, found["bytes_after"] / 1e6
        print(
            f"  {name:10} {found['weights']:>16,} {found['bits_per_weight']:>9.2f} {before:>10.1f} {after:>10.1f}  "
            f"{found['format']}"
        )
    before, after = (sum(found[f"bytes_{when}"] for found in classes.values()) / 1e6 for when in ("before", "after"))
    print(f"  {'together':10} {'':>16} {'':>9} {before:>10.1f} {after:>10.1f}")
    if calibration := receipt["calibration"]:
        print(f"calibrated on {calibration['tokens']:,} tokens of {terminal.shown(calibration['text'])}")
        for layer, few in calibration["weighed_by_all_tokens"].items():
            shown = ", ".join(map(str, few[:12])) + (", …" if len(few) > 12 else "")
            print(f"  layer {layer}: experts {shown} saw fewer than {calibration['fewer_than']}; weighed by all tokens")
    if receipt["notes"]:
        print(terminal.shown(receipt["notes"]))
    if receipt["not_measured"]:
        print(terminal.shown(receipt["not_measured"]))
    found = receipt["routing_agreement"]
    if found["overall"] is not None:
        worst = min(found["layers"], key=found["layers"].get)
        print(
            f"routing: {found['overall']:.2%} of the experts chosen are the same (layer {worst}: "
            f"{found['layers'][worst]:.2%}), on {found['tokens']:,} tokens of {found['on']}"
        )
    if found := receipt["perplexity"]:
        print(
            f"perplexity {found['before']:.3f} -> {found['after']:.3f} ({found['change']:+.2%}) "
            f"on {terminal.shown(found['text'])}"
        )
    print(f"what became of every tensor: {terminal.shown(target / 'receipt.json')}")


MORE = {"int4": "int8", "q4_0": "q8_0", "int8": "bf16", "q8_0": "bf16"}


def _warn(found: dict[str, Any], linear: str, experts: str) -> None:
    if found["overall"] is not None and found["overall"] < found["asked"]:
        print(
            f"WARNING: the packed model chooses {found['overall']:.2%} of the original's experts; {found['asked']:.0%} "
            f"is asked. {advice(linear, experts)}",
            file=sys.stderr,
        )


def advice(linear: str, experts: str) -> str:
    """What would agree better than these formats: one step up for each that has one, the coarser first."""
    steps = [
        (now, f"{name} {MORE[now]}") for name, now in (("--linear", linear), ("--experts", experts)) if now in MORE
    ]
    steps.sort(key=lambda step: "4" not in step[0])  # where both are alike, linear layers: they are fewer
    if not steps:
        return "Nothing is rounded to fewer than 16 bits: the original is in more."
    return f"More bits agree better: {', then '.join(flag for _, flag in steps)}"
