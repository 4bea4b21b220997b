"""`manyhands eval`: perplexity, bits per byte and expert load on a text."""

from pathlib import Path
from typing import Annotated

import typer

from manyhands.cli.options import IgnoreField
from manyhands.defaults import EVAL_LENGTH


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run, or a name on the Hugging Face hub.")],
    data: Annotated[list[str], typer.Option(help="Text: file, folder, glob, stdlib or hf:NAME. Repeatable.")],
    text_field: Annotated[
        str, typer.Option(help="The field of .jsonl and .parquet rows that holds the text.")
    ] = "text",
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help=f"Default: as trained, for a run; else the model's, at most {EVAL_LENGTH}."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Only the beginning of the text.")] = None,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """How well a model predicts a text, and how evenly its experts work on it.

    The text is read as in training: documents one after the other, the model's beginning-of-text token (if it has one)
    in front of each, the end-of-text token behind. The beginning is given, not predicted.
    """
    from manyhands.text import read_documents

    documents = read_documents(data, text_field)

    import json
    from dataclasses import asdict

    import numpy as np

    from manyhands.checkpoint.model import load
    from manyhands.generate.evaluate import evaluate as measure
    from manyhands.generate.evaluate import trained_length
    from manyhands.terminal import shown
    from manyhands.text import encode_documents, evaluation_batches

    model, tokenizer = load(checkpoint, ignore_fields=ignore_field or ())
    ids = encode_documents(documents, tokenizer)
    length = sequence_length or trained_length(checkpoint) or min(EVAL_LENGTH, model.config.max_position_embeddings)
    targets = ids[1:] if max_batches is None else ids[1 : 1 + max_batches * batch_size * length]
    num_bytes = int(np.asarray(tokenizer.byte_lengths())[targets].sum())
    front = tokenizer.front_ids
    batches = evaluation_batches(ids, length, batch_size, max_batches)
    result = measure(model, batches, num_bytes, given=front[0] if front else None)
    front_text = tokenizer.decode(front) if front else None
    if json_output:
        about = {
            "model": str(checkpoint),
            "data": list(data),
            "documents": len(documents),
            "bytes": num_bytes,
            "sequence_length": length,
            "in_front_of_each_document": front_text,
        }
        print(json.dumps({**asdict(result), **about}))
        return
    if front_text is not None:
        print(f"{shown(front_text)} in front of each document")
    print(
        f"{result.tokens:,} tokens, {num_bytes:,} bytes in {len(documents):,} documents, sequences of {length:,} tokens"
    )
    print(f"perplexity {result.perplexity:.3f}, bits per byte {result.bits_per_byte:.4f}, loss {result.loss:.4f}")
    for layer, load_of in result.load.items():
        print(
            f"layer {layer}: MaxVio {load_of.max_vio:.2f}, entropy {load_of.entropy:.3f}, dead experts "
            f"{load_of.dead}, dropped {load_of.dropped:.1%}, mean top-1 weight {load_of.top1_weight:.2f}"
        )
