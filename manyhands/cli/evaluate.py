"""`manyhands eval`: perplexity, bits per byte and expert load on a text; or tasks of lm-eval."""

from pathlib import Path
from typing import Annotated

import typer

from manyhands.cli.options import TRACE_LIMIT, Adapter, IgnoreField, TraceDirectory, TraceLimit, Which
from manyhands.cli.progress import Loading, bar
from manyhands.cli.recorded import check_trace, recording
from manyhands.cli.size import size
from manyhands.defaults import EVAL_LENGTH
from manyhands.errors import UserError


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run, a GGUF file, or a name on the hub.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text: file, folder, glob, stdlib or hf:NAME. Repeatable. Default: a run's own validation text."
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of .jsonl and .parquet rows that holds the text.")
    ] = "text",
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help=f"Default: as trained, for a run; else the model's, for text at most {EVAL_LENGTH}."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Only the beginning of the text.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-eval, in place of --data: names, with commas. Repeatable.")
    ] = None,
    task_dir: Annotated[Path | None, typer.Option(help="A folder with YAML files of more tasks.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in front of each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Questions as messages, examples as turns.")
    ] = False,
    add_bos: Annotated[
        bool | None,
        typer.Option(
            "--add-bos/--no-add-bos", help="The beginning-of-text token in front. Default: as the tokenizer does it."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the results and every answer.")] = None,
    trace: TraceDirectory = None,
    trace_limit: TraceLimit = TRACE_LIMIT,
    which: Which = None,
    adapter: Adapter = None,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """How well a model predicts a text, and how evenly its experts work on it; or how it does tasks of lm-eval.

    The text is read as in training: documents one after the other, the model's beginning-of-text token (if it has one)
    in front of each, the end-of-text token behind. The beginning is given, not predicted.

    With --tasks, lm-eval (pip install 'manyhands[eval]') asks, and each question is answered as it would be alone.
    """
    from manyhands.checkpoint.runs import checkpoint_of

    checkpoint = checkpoint_of(checkpoint, which)
    names = [name.strip() for listed in tasks or [] for name in listed.split(",") if name.strip()]
    own = None if data or tasks is not None else _own_text(checkpoint)
    _check_flags(
        bool(data) or own is not None,
        tasks is not None and bool(names),
        {"--max-batches": max_batches is not None, "--trace": trace is not None},
        {
            "--task-dir": task_dir is not None,
            "--num-fewshot": num_fewshot is not None,
            "--limit": limit is not None,
            "--apply-chat-template": apply_chat_template,
            "--add-bos": add_bos is not None,
            "--output": output is not None,
        },
    )
    if names:
        from manyhands.cli.tasks import answer_tasks

        how = {"num_fewshot": num_fewshot, "limit": limit, "task_dir": task_dir, "chat": apply_chat_template}
        answering = {"max_length": sequence_length, "batch_size": batch_size, "add_bos": add_bos}
        answer_tasks(checkpoint, names, how, answering, output, ignore_field or (), json_output, adapter)
        return
    sizes = sequence_length, batch_size, max_batches
    limit = size("--trace-limit", trace_limit)
    check_trace(trace)
    _measure_text(checkpoint, own or data or [], text_field, sizes, trace, limit, ignore_field, json_output, adapter)


def _own_text(run: Path) -> Path | None:
    """The validation tokens that this run prepared; None for what is no run, or has none."""
    from manyhands.files import RUN, VALID_TOKENS

    tokens = run / "data" / VALID_TOKENS
    return tokens if (run / RUN).is_file() and tokens.is_file() else None


def _check_flags(data: bool, tasks: bool, of_data: dict[str, bool], of_tasks: dict[str, bool]) -> None:
    """Raises `UserError` unless the one or the other is asked for, with its own flags."""
    if data == tasks:
        both = "not both" if data else "one of them"
        raise UserError(
            f"give --data TEXT for perplexity and load (a run has its own), or --tasks NAMES of lm-eval: {both}"
        )
    asked, others = ("--tasks", of_data) if tasks else ("--data", of_tasks)
    for flag, given in others.items():
        if given:
            raise UserError(f"{flag} says nothing with {asked}; leave it out")


def _measure_text(
    checkpoint: Path,
    data: list[str] | Path,
    text_field: str,
    sizes: tuple[int | None, int, int | None],
    trace: Path | None,
    trace_limit: int | None,
    ignore_field: list[str] | None,
    json_output: bool,
    adapter: Path | None,
) -> None:
    """`sizes` are the sequence length, the batch size and the most batches; a path is a run's own tokens."""
    from manyhands.text import TokenFile, read_documents

    documents = [] if isinstance(data, Path) else read_documents(data, text_field)

    import json
    from dataclasses import asdict

    import numpy as np

    from manyhands.checkpoint.model import load, only_language_model
    from manyhands.config.kinds import longest_sequence
    from manyhands.generate.evaluate import evaluate as measure
    from manyhands.generate.evaluate import trained_length
    from manyhands.terminal import shown
    from manyhands.text import encode_documents, evaluation_batches

    sequence_length, batch_size, max_batches = sizes
    with Loading(checkpoint) as read:
        loaded, tokenizer = load(checkpoint, ignore_fields=ignore_field or (), adapter=adapter)
    model = only_language_model(loaded, "eval")
    read.said(loaded)
    if isinstance(data, Path):
        file = TokenFile.open(data, loaded.config.vocab_size)
        ids, num_documents, said = file.ids, file.info.num_documents, [str(data)]
    else:
        characters = sum(len(document.text) for document in documents)
        with bar("tokenizing") as update:
            ids = encode_documents(documents, tokenizer, lambda done: update(done, characters))
        num_documents, said = len(documents), data
    longest = longest_sequence(model.config) or EVAL_LENGTH
    length = sequence_length or trained_length(checkpoint) or min(EVAL_LENGTH, longest)
    targets = ids[1:] if max_batches is None else ids[1 : 1 + max_batches * batch_size * length]
    num_bytes = int(np.asarray(tokenizer.byte_lengths())[targets].sum())
    if isinstance(data, Path) and max_batches is None:  # as the run counts them: with the first token's, which is given
        num_bytes = file.info.num_bytes
    front = tokenizer.front_ids
    batches = evaluation_batches(ids, length, batch_size, max_batches)
    given = front[0] if front else None
    with recording(model, tokenizer, trace, trace_limit, "eval") as recorder, bar("evaluating") as update:
        result = measure(
            model, batches, num_bytes, given=given, trace=recorder, progress=lambda done: update(done, len(targets))
        )
    front_text = tokenizer.decode(front) if front else None
    if json_output:
        about = {
            "model": str(checkpoint),
            "data": said,
            "documents": num_documents,
            "bytes": num_bytes,
            "sequence_length": length,
            "in_front_of_each_document": front_text,
        }
        figures = asdict(result)
        figures.pop("documents")  # how many there are is said below
        print(json.dumps({**figures, **about}))
        return
    if isinstance(data, Path):
        print("the run's own validation text")
    if front_text is not None:
        print(f"{shown(front_text)} in front of each document")
    print(
        f"{result.tokens:,} tokens, {num_bytes:,} bytes in {num_documents:,} documents, sequences of {length:,} tokens"
    )
    print(f"perplexity {result.perplexity:.3f}, bits per byte {result.bits_per_byte:.4f}, loss {result.loss:.4f}")
    for layer, load_of in result.load.items():
        print(
            f"layer {layer}: MaxVio {load_of.max_vio:.2f}, entropy {load_of.entropy:.3f}, dead experts "
            f"{load_of.dead}, dropped {load_of.dropped:.1%}, mean top-1 weight {load_of.top1_weight:.2f}"
        )
