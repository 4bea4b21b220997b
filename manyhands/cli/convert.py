"""`manyhands convert`: a checkpoint from one family's format to another's, with a receipt."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import typer

from manyhands.cli.options import IgnoreField, Which
from manyhands.cli.progress import named_bar
from manyhands.defaults import MAX_SHARD_SIZE
from manyhands.terminal import shown


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint, a run, a GGUF file, or a name on the hub.")],
    target: Annotated[
        str, typer.Argument(help="The directory to write: a new one, or an empty folder. Or a file, NAME.gguf.")
    ],
    to: Annotated[
        str | None,
        typer.Option(help="The family (model_type) to write. Default: its own; for our own models, the nearest."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Default: as stored (decoded: bfloat16).")
    ] = None,
    file_type: Annotated[
        Literal["f32", "bf16", "q8_0", "q4_0", "mxfp4"] | None,
        typer.Option("--type", help="Of NAME.gguf: how the weights are stored there. Default: bf16."),
    ] = None,
    without_vocabulary: Annotated[
        bool, typer.Option("--without-vocabulary", help="Write NAME.gguf without the tokenizer: for token ids only.")
    ] = False,
    max_shard_size: Annotated[float, typer.Option(min=1e-6, help="GB (10⁹ bytes) per file.")] = MAX_SHARD_SIZE / 1e9,
    drop_extras: Annotated[
        bool, typer.Option("--drop-extras", help="Leave out what the model does not compute with (MTP, vision).")
    ] = False,
    agreement: Annotated[
        bool, typer.Option(help="Run both models on sample tokens before the new directory appears.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the target if this program wrote it and nobody changed it.")
    ] = False,
    which: Which = None,
    ignore_field: IgnoreField = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A directory with the tokenizer to write, if not the source's."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A LoRA adapter of the model, as PEFT keeps it: merged into what is written."),
    ] = None,
    as_adapter: Annotated[
        Literal["per-expert", "fused"] | None,
        typer.Option(
            "--as-adapter",
            help="Write the adapter alone, of a tuned SOURCE or of --adapter, as PEFT reads it: experts one by one "
            "(vLLM and llama.cpp too) or all together.",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the receipt.")] = False,
) -> None:
    """Write a checkpoint in another family's format; receipt.json says what became of every tensor.

    To NAME.gguf: one file for llama.cpp, if that computes the same.
    """
    import json

    import torch

    from manyhands.checkpoint.convert import RECEIPT
    from manyhands.checkpoint.convert import convert as run
    from manyhands.checkpoint.gguf.export import export, said
    from manyhands.checkpoint.runs import checkpoint_of
    from manyhands.errors import UserError

    if which is not None:
        source = str(checkpoint_of(source, which))
    to_gguf = target.endswith(".gguf")
    if not to_gguf and (file_type is not None or without_vocabulary):
        flag = "--without-vocabulary" if file_type is None else "--type"
        raise UserError(f"{flag} is for a GGUF file, and {target} does not end in .gguf")
    if as_adapter is not None:
        if to_gguf or to is not None or dtype is not None or tokenizer is not None:
            raise UserError(
                "--as-adapter writes a directory of the adapter alone, in float32 and under the model's own names: not "
                "with NAME.gguf, --to, --dtype or --tokenizer"
            )
        _as_adapter(source, target, as_adapter, adapter, overwrite, ignore_field or (), json_output)
        return
    if to_gguf and adapter is not None:
        raise UserError("--adapter merges into a directory; convert that to a GGUF file afterwards")
    if to_gguf and dtype is not None:
        raise UserError("--dtype is for a directory; how a GGUF file stores weights is --type")
    with named_bar() as progress:
        if to_gguf:
            written = export(
                source,
                target,
                file_type=file_type or "bf16",
                to=to,
                with_vocabulary=not without_vocabulary,
                overwrite=overwrite,
                ignore_fields=ignore_field or (),
                tokenizer=tokenizer,
                progress=progress,
            )
            print(json.dumps(written) if json_output else said(written))
            return
        receipt = run(
            source,
            target,
            to=to,
            dtype=None if dtype is None else getattr(torch, dtype),
            max_shard_size=int(max_shard_size * 1e9),
            drop_extras=drop_extras,
            agreement=agreement,
            overwrite=overwrite,
            ignore_fields=ignore_field or (),
            tokenizer=tokenizer,
            adapter=adapter,
            progress=progress,
        )
    if json_output:
        print(json.dumps(receipt))
        return
    source_type, target_type = receipt["source"]["model_type"], receipt["target"]["model_type"]
    print(f"{shown(source_type)} -> {target_type}: {len(receipt['source_tensors'])} tensors read, ", end="")
    print(f"{len(receipt['target_tensors'])} written to {shown(target)}")
    counts: dict[str, int] = {}
    for fate in receipt["source_tensors"].values():
        counts[fate["how"]] = counts.get(fate["how"], 0) + 1
    for how, count in counts.items():
        print(f"  {count:>6} {how}")
    if found := receipt["agreement"]:
        experts = found["same_experts"]
        print(
            f"on {found['tokens']} sample tokens: logits differ by {found['mean_logit_difference']:.2g} on average, "
            f"{found['largest_logit_difference']:.2g} at most (their spread is {found['logits_std']:.2g})"
            + ("" if experts is None else f"; {experts:.2%} of the experts chosen are the same")
        )
    if merged := receipt.get("adapter"):
        nothing = len(merged["adds_nothing_to"])
        print(
            f"adapter {shown(adapter or '')}: {len(merged['changed'])} matrices, experts one by one, have changed"
            + (f"; to {nothing} it adds nothing" if nothing else "")
        )
    if merged := receipt.get("tuned"):
        print(
            f"{merged['method']}: {len(merged['changed'])} matrices are no longer the base's; "
            f"{len(merged['unchanged'])} that were to change are as they were"
        )
    if receipt["notes"]:
        print(shown(receipt["notes"]))
    print(f"what became of every tensor: {shown(Path(target) / RECEIPT)}")


def _as_adapter(
    source: str,
    target: str,
    form: Literal["per-expert", "fused"],
    adapter: str | None,
    overwrite: bool,
    ignore_fields: Collection[str],
    json_output: bool,
) -> None:
    import json

    from manyhands.checkpoint.adapters.export import export_adapter

    written = export_adapter(
        source, target, form=form, adapter=adapter, overwrite=overwrite, ignore_fields=ignore_fields
    )
    if json_output:
        print(json.dumps(written))
        return
    ranks = sorted(set(written["ranks"].values()))
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f"LoRA on {len(written['ranks'])} matrices of {shown(written['base'] or source)}, {rank}: {shown(target)}")
