"""`manyhands upcycle`: a dense model as a mixture of experts that computes the same."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from manyhands.cli.options import IgnoreField
from manyhands.defaults import MAX_SHARD_SIZE


def upcycle(
    model: Annotated[str, typer.Argument(help="A dense checkpoint, a run, a GGUF file, or a name on the hub.")],
    target: Annotated[str, typer.Argument(help="The directory to write: a new one, or an empty folder.")],
    experts: Annotated[int, typer.Option(min=2, help="E, the experts of every layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="K, the experts a token goes to.")] = 2,
    granularity: Annotated[
        int, typer.Option(min=1, help="G: cut every network into so many pieces, each an expert; E and K count those.")
    ] = 1,
    drop: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Start this share of every expert's channels afresh: another function."),
    ] = 0.0,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Add this multiple of their deviation to the experts: another function.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the router's weights, and of what is drawn.")] = 0,
    to: Annotated[
        str | None, typer.Option(help="The family (model_type) to write. Default: the nearest, as mixtral for llama.")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Default: as stored.")] = None,
    max_shard_size: Annotated[float, typer.Option(min=1e-6, help="GB (10⁹ bytes) per file.")] = MAX_SHARD_SIZE / 1e9,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the target if this program wrote it and nobody changed it.")
    ] = False,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the receipt.")] = False,
) -> None:
    """Write a dense model as a mixture of experts: copies of its networks behind a fresh router, to be trained on.

    Without --drop and --noise both models must give the same logits, to 1e-5, before the directory appears. The router
    learns nothing from the first step, since all experts are equal: train it with its balance loss on.
    """
    from manyhands.checkpoint.target import claim
    from manyhands.tune.copies import Upcycling

    claim(target, overwrite=overwrite, sources=[model], hashes=False)  # before any work
    asked = Upcycling(experts, top_k, granularity, drop, noise, seed)

    import torch

    from manyhands.checkpoint.find import open_checkpoint
    from manyhands.cli.progress import named_bar
    from manyhands.tune.upcycle import upcycle as run

    source = open_checkpoint(model, ignore_field or ())
    with named_bar() as progress:
        receipt = run(
            source,
            target,
            asked,
            to=to,
            dtype=None if dtype is None else getattr(torch, dtype),
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

    made, found = receipt["upcycled"], receipt["agreement"]
    print(
        f"{shown(receipt['source']['model_type'])} -> {receipt['target']['model_type']}: {made['experts']} experts, "
        f"{made['experts_per_token']} per token" + ("" if made["granularity"] == 1 else f" ({made['copies']} copies)")
    )
    before = sum(entry["size"] for entry in receipt["source"]["files"].values()) / 1e6
    after = sum(entry["size"] for entry in receipt["target"]["files"].values()) / 1e6
    print(f"  {before:.1f} MB -> {after:.1f} MB, {len(receipt['target_tensors'])} tensors")
    said = "exact" if made["exact"] else "another function, as asked"
    print(
        f"  {said}: on {found['tokens']} random tokens logits differ by {found['largest_logit_difference']:.2g} "
        f"at most (the largest is {found['largest_logit']:.2g})"
    )
    print(f"  the router's gradient at step 0 is {made['router']['gradient_at_step_0']}")
    if receipt["notes"]:
        print(shown(receipt["notes"]))
    print(f"what became of every tensor: {shown(target / 'receipt.json')}")
