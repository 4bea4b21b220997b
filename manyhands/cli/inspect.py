"""`manyhands inspect`: what a model's experts specialise in, as one page that opens offline."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyhands.cli.loudness import LOG
from manyhands.cli.options import IgnoreField
from manyhands.cli.progress import Loading, bar
from manyhands.errors import UserError

if TYPE_CHECKING:
    from manyhands.inspect.observed import Observed
    from manyhands.inspect.texts import Sequences
    from manyhands.text import Tokenizer

PAGE = Path("inspect.html")


def inspect(
    subject: Annotated[
        str, typer.Argument(help="A checkpoint, a run, a name on the Hugging Face hub; or a recorded trace.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text for the model: a treebank (.conllu), file, folder, glob, stdlib or hf:NAME. "
            "Repeatable: each is a domain."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model, or trace, of the same tokens, to compare with.")
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Also how each of a run's checkpoints agrees with its last.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of a trace: the model, or the folder, whose tokenizer.json spells its tokens.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help=f"The page. Default: {PAGE}; with --json none.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each --data, or of the trace.")] = 50_000,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Default: as trained, for a run; else at most 512.")
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="The field of .jsonl and .parquet rows that holds the text.")
    ] = "text",
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="In place of the page: experts ranked by how much the loss rises with each of them off. "
            "One pass over the text for each expert.",
        ),
    ] = False,
    random_routers: Annotated[
        int, typer.Option(min=0, max=20, help="Routers with random weights that stand beside the model's.")
    ] = 3,
    draws: Annotated[int, typer.Option(min=10, max=10_000, help="Bootstrap draws behind each interval.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn: texts, shuffles, random routers.")] = 0,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print every figure as JSON.")] = False,
) -> None:
    """What a model's experts specialise in, each figure beside what chance and a random router show.

    Load, co-activation, overlap from token to token, predictability, vocabulary; parts of speech with a treebank in
    CoNLL-U; domains with two or more --data. One HTML file that loads nothing from elsewhere.

    A random router sorts tokens by id as well as a trained one: what it shows is not learned. It needs the model; of a
    trace alone only the shuffled null is there.
    """
    from manyhands.files import check_replaceable
    from manyhands.inspect.recorded import is_trace

    if ablate:
        from manyhands.cli.ablate import rank

        for flag, given in {
            "--against": against, "--checkpoints": checkpoints, "--tokenizer": tokenizer, "--out": out
        }.items():  # fmt: skip
            if given:
                raise UserError(f"{flag} says nothing with --ablate; leave it out")
        if not data or is_trace(subject):
            raise UserError("--ablate measures a model's loss on a text: give a model, and --data TEXT")
        rank(subject, data, max_tokens, sequence_length, text_field, seed, tuple(ignore_field or ()), json_output)
        return
    page = out or (None if json_output else PAGE)
    if page is not None:
        check_replaceable(page, b"manyhands inspect")
    ignore = tuple(ignore_field or ())
    asked = _Asked(data or [], max_tokens, sequence_length, text_field, random_routers, seed, ignore)
    if is_trace(subject):
        for flag, given in (("--data", bool(data)), ("--checkpoints", checkpoints)):
            if given:
                raise UserError(f"{flag} is for a model; {subject} is a trace, which has its own texts")
        seen, spell, other = _of_trace(subject, tokenizer, against, asked)
        runs: list[tuple[str, Observed]] = []
    else:
        if tokenizer is not None:
            raise UserError("--tokenizer is for a trace; a model has its own")
        if not data:
            raise UserError("give --data TEXT: a model routes some text: a treebank (.conllu), a file, stdlib")
        seen, spell, other, runs = _of_model(subject, against, checkpoints, asked)

    from manyhands.cli.inspect_report import report

    compared = None if against is None or other is None else (against, other)
    report(subject, seen, spell, compared, runs, page, draws, seed, json_output)


class _Asked:
    """What the flags say of reading."""

    def __init__(
        self, data: list[str], max_tokens: int, length: int | None, field: str, routers: int, seed: int,
        ignore: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.data, self.max_tokens, self.length, self.field = data, max_tokens, length, field
        self.routers, self.seed, self.ignore = routers, seed, ignore


def _of_trace(
    subject: str, tokenizer: Path | None, against: str | None, asked: _Asked
) -> "tuple[Observed, Tokenizer | None, Observed | None]":
    from manyhands.inspect.recorded import from_trace, is_trace
    from manyhands.trace.recording import Trace

    trace = Trace.open(subject)
    spell = None if tokenizer is None else _tokenizer(tokenizer, trace.manifest.tokenizer_sha256)
    other = None
    if against is not None:
        if not is_trace(against):
            raise UserError(f"--against {against}: not a trace; a trace is compared with a trace of the same tokens")
        other = from_trace(Trace.open(against), asked.max_tokens)
    return from_trace(trace, asked.max_tokens), spell, other


def _tokenizer(path: Path, sha256: str | None) -> "Tokenizer":
    import hashlib

    from manyhands.checkpoint.find import find
    from manyhands.files import TOKENIZER
    from manyhands.text import Tokenizer

    directory = find(path)
    if sha256 is not None and (directory / TOKENIZER).is_file():
        found = hashlib.sha256((directory / TOKENIZER).read_bytes()).hexdigest()
        if found != sha256:
            raise UserError(f"--tokenizer {path}: not the tokenizer the trace was recorded with (its SHA-256 differs)")
    return Tokenizer.from_directory(directory)


def _of_model(
    subject: str, against: str | None, checkpoints: bool, asked: _Asked
) -> "tuple[Observed, Tokenizer, Observed | None, list[tuple[str, Observed]]]":
    from manyhands.checkpoint.model import load, only_decoder
    from manyhands.checkpoint.runs import RunDirectory
    from manyhands.generate.evaluate import trained_length
    from manyhands.inspect.texts import read_sequences
    from manyhands.inspect.watch import check_inspectable

    steps = RunDirectory(subject).checkpoints() if checkpoints else []
    if checkpoints and len(steps) < 2:
        raise UserError(
            f"--checkpoints: {subject} is not a run with two checkpoints or more; train with train.save_every and "
            "train.keep_checkpoints"
        )
    with Loading(subject) as reading:
        loaded, tokenizer = load(subject, ignore_fields=asked.ignore)
    model = only_decoder(loaded, "inspect")
    check_inspectable(model)
    reading.said(model)
    front = tuple(tokenizer.front_ids)
    room = model.config.max_position_embeddings - len(front)
    length = min(asked.length or trained_length(subject) or 512, room)
    read = read_sequences(asked.data, tokenizer, length, asked.max_tokens, asked.field, asked.seed)
    seen = _observe(model, read, front, asked.routers, asked, subject)
    seen.about["aligned"] = read.aligned
    other = None
    if against is not None:
        with Loading(against) as reading:
            compared, theirs = load(against, ignore_fields=asked.ignore)
        if theirs.inner.to_str() != tokenizer.inner.to_str():
            raise UserError(f"--against {against}: its tokenizer is not {subject}'s, so their tokens are not the same")
        reading.said(compared)
        other = _observe(compared, read, front, 0, asked, against)
        del compared
    runs = []
    for step, path in steps:
        each, _ = load(path)
        runs.append((str(step), _observe(each, read, front, 0, asked, f"step {step}")))
    return seen, tokenizer, other, runs


def _observe(
    model: Any, read: "Sequences", front: tuple[int, ...], routers: int, asked: _Asked, name: str
) -> "Observed":
    from manyhands.inspect.watch import observe

    if not sys.stderr.isatty():
        LOG.info("reading with %s", name)
    with bar(f"reading with {name[-40:]}") as update:
        total = len(read.token_ids)
        return observe(model, read, front, routers, asked.seed, lambda done: update(done, total))
