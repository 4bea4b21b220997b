"""From rows to files in the run directory, once; a resumed run never reads the sources again.

data/tokenizer/            the tokenizer with its chat template: what the tuned model will be asked through
data/train.npy, …          the rows that are learnt (`text/row_file.py`); data/valid.npy, …  those held out
data/data.json             written last: what was prepared, and the SHA-256 of each file
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from manyhands.checkpoint.sidecars import write_beside
from manyhands.config import RunConfig
from manyhands.config.rows import RowsConfig
from manyhands.errors import ConfigError, DataError
from manyhands.files import PREPARED, TRAIN_TOKENS, VALID_TOKENS
from manyhands.text import Tokenizer
from manyhands.text.cut import Cut
from manyhands.text.formats import memory_for_text
from manyhands.text.plain import plain_template
from manyhands.text.row import ChatRow, Form, PreferenceRow, Row, digest_of, named
from manyhands.text.row_file import RowFile, beside, write_rows
from manyhands.text.rows import read_rows
from manyhands.text.split import hold_out
from manyhands.text.targets import Example, Targets
from manyhands.train.data import SAY_SECONDS, RunData, finish_prepared, prepare_data, read_prepared

TOKENIZER_FILES = "tokenizer"


@dataclass(frozen=True, slots=True)
class RowData(RunData):
    """What a tuning trains and validates on. `train` and `valid` are the rows' tokens, one row behind the other."""

    train_rows: RowFile
    """With `rows.dpo_beta` each better answer and, behind it, the worse."""
    valid_rows: RowFile
    train_reference: npt.NDArray[np.float64] | None = None
    """[R]: the rows' log-likelihoods by the model that preferences start from (`preferences.py`)."""
    valid_reference: npt.NDArray[np.float64] | None = None


def prepare(
    directory: Path, run: RunConfig, say: Callable[[str], None], ready_made: Callable[[], Tokenizer] | None = None
) -> RunData:
    """`prepare_rows` for a run that learns from rows, `prepare_data` for the others."""
    return (prepare_data if run.rows is None else prepare_rows)(directory, run, say, ready_made)


def prepare_rows(
    directory: Path, run: RunConfig, say: Callable[[str], None], ready_made: Callable[[], Tokenizer] | None = None
) -> RowData:
    """Read, split, tokenise and store the rows under `directory`, or open what is already there.

    The tokenizer is `data.tokenizer`'s, else `ready_made`: the checkpoint's that is tuned.

    Raises `DataError` naming the row that is wrong, and for files that are not what was prepared; `ConfigError` for a
    tokenizer that does not fit the model's vocabulary, or none; `CheckpointError` for a chat template that fails.
    """
    done, home = directory / PREPARED, directory / TOKENIZER_FILES
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = tokenizer_of(run, ready_made)
        train, valid, told = _examples(
            run, Targets(tokenizer, rows_config(run).turns, rows_config(run).append_stop), say
        )
        home.mkdir(exist_ok=True)
        write_beside(home, tokenizer)
        for name, examples in ((TRAIN_TOKENS, train), (VALID_TOKENS, valid)):
            write_rows(directory / name, examples, tokenizer.vocab_size)
        finish_prepared(done, {}, _files(directory), rows=told)
    _, digests = read_prepared(done, _files(directory), say)
    train_rows, valid_rows = (
        RowFile.open(directory / name, run.model.vocab_size) for name in (TRAIN_TOKENS, VALID_TOKENS)
    )
    tokenizer = Tokenizer.from_directory(home)
    return RowData(tokenizer, home, train_rows.tokens, valid_rows.tokens, {}, digests, train_rows, valid_rows)


def rows_config(run: RunConfig) -> RowsConfig:
    """What the run says of its rows; the defaults where it says nothing."""
    return run.rows or RowsConfig()


def tokenizer_of(run: RunConfig, ready_made: Callable[[], Tokenizer] | None) -> Tokenizer:
    """The tokenizer that a tuning cuts its rows with, with the chat template that `rows.chat_template` says.

    Raises `ConfigError` if there is none, or it does not fit; for a template that cannot be read.
    """
    if run.data.tokenizer is not None:
        tokenizer = Tokenizer.from_file(run.data.tokenizer)
    elif ready_made is not None:
        tokenizer = ready_made()
    else:
        raise ConfigError("a tuning starts from a checkpoint (start), or names its data.tokenizer")
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model has room for {run.model.vocab_size}"
        )
    chosen = rows_config(run).chat_template
    if chosen is None:
        return tokenizer
    if chosen != "plain":
        try:
            return tokenizer.with_chat_template(Path(os.path.expanduser(chosen)).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"rows.chat_template = {chosen!r}: cannot be read: {why}; or say plain") from None
    if tokenizer.eos_token_id is None:
        raise ConfigError("rows.chat_template = 'plain': the tokenizer has no end of text to end an answer with")
    return tokenizer.with_chat_template(plain_template(tokenizer.inner.id_to_token(tokenizer.eos_token_id)))


def examples_of(
    run: RunConfig, sources: Sequence[str], targets: Targets, say: Callable[[str], None]
) -> Iterator[tuple[Row, list[Example]]]:
    """The rows of `sources`, and what of them is learnt: one example of each, two of a preference.

    Raises what `read_rows` and `Targets.example` do, and `ConfigError` for preferences without `rows.dpo_beta`, for
    other rows with it, and for conversations without a template.
    """
    rows = rows_config(run)
    form: Form | None = None if rows.columns == "auto" else rows.columns
    for row in read_rows(sources, run.data.text_field, form, say):
        preference = isinstance(row, PreferenceRow)
        if preference is (rows.dpo_beta is None):
            said = (
                "are learnt by DPO: say rows.dpo_beta=0.1" if preference else "have nothing rejected: no rows.dpo_beta"
            )
            raise ConfigError(f"{row.where}: rows of {named(row.form)} {said}")
        parts = (row.chosen, row.rejected) if isinstance(row, PreferenceRow) else (row,)
        if targets.tokenizer.chat_template is None and any(isinstance(part, ChatRow) for part in parts):
            raise ConfigError(
                "the model has no chat template, and these are conversations: say rows.chat_template=plain, or a file"
            )
        yield row, targets.examples(row)


def cut_of(run: RunConfig) -> Cut:
    """The room of a row: a sequence's, of which the two answers of a preference share one."""
    places = run.train.sequence_length if rows_config(run).dpo_beta is None else run.train.sequence_length // 2
    return Cut(places + 1)


def _examples(
    run: RunConfig, targets: Targets, say: Callable[[str], None]
) -> tuple[list[Example], list[Example], dict[str, object]]:
    """What is trained on, what is held out, and what to write down about them."""
    cut = cut_of(run)
    given = list(_kept(run, run.data.sources, targets, cut, say))
    if run.data.valid:
        valid = list(_kept(run, run.data.valid, targets, cut, say))
        known = {digest for digest, _ in valid}
        train = [item for item in given if item[0] not in known]
        if len(train) < len(given):
            say(f"left out {len(given) - len(train):,} rows that are held out too (data.valid)")
    else:
        sizes = [sum(int(example.learnt.sum()) for example in examples) for _, examples in given]
        held = hold_out([digest for digest, _ in given], sizes, run.data.valid_fraction, run.data.seed)
        train, valid = ([item for item, out in zip(given, held, strict=True) if out is side] for side in (False, True))
    sides = [[example for _, examples in side for example in examples] for side in (train, valid)]
    for name, examples in zip(("to train on", "held out"), sides, strict=True):
        if not examples:
            raise DataError(f"{', '.join(run.data.sources)}: no row is left {name}")
    if cut.cut:
        say(f"{cut.cut:,} rows are longer than train.sequence_length = {run.train.sequence_length}, and were cut")
    if cut.lost:
        shown = ", ".join(cut.lost[:3]) + (", …" if len(cut.lost) > 3 else "")
        say(f"left out {len(cut.lost):,} rows with nothing to learn before the cut ({shown})")
    counts = [(len(side), *_sums(examples)) for side, examples in zip((train, valid), sides, strict=True)]
    for name, (rows, tokens, learnt) in zip(("to train on", "held out"), counts, strict=True):
        say(f"{rows:,} rows {name}: {tokens:,} tokens, of which {learnt:,} ({learnt / tokens:.0%}) are learnt")
    names = ("rows", "tokens", "targets")
    told: dict[str, object] = {
        "sources": list(run.data.sources),
        "valid_sources": list(run.data.valid),
        "sha256": hashlib.sha256(b"".join(digest for digest, _ in given)).hexdigest(),
        "cut": cut.cut,
        "left_out": len(cut.lost),
        **{side: dict(zip(names, count, strict=True)) for side, count in zip(("train", "valid"), counts, strict=True)},
    }
    return sides[0], sides[1], told


def _kept(
    run: RunConfig, sources: Sequence[str], targets: Targets, cut: Cut, say: Callable[[str], None]
) -> Iterator[tuple[bytes, list[Example]]]:
    """The digest of each row, and its pieces. Raises `DataError` for more than half of the memory holds."""
    room = most = memory_for_text()
    said = time.monotonic()
    for number, (row, examples) in enumerate(examples_of(run, sources, targets, say), start=1):
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            say(f"read {number:,} rows")
        pieces = cut.fit(row, examples)
        room -= sum(piece.ids.nbytes + piece.learnt.nbytes for piece in pieces) + 200
        if room < 0:
            raise DataError(f"{row.where}: up to here the rows take more than half of the memory ({most >> 20:,} MiB)")
        if pieces:
            yield digest_of(row), pieces


def _sums(examples: Sequence[Example]) -> tuple[int, int]:
    return sum(len(example.ids) for example in examples), sum(int(example.learnt.sum()) for example in examples)


def _files(directory: Path) -> list[str]:
    """What is hashed, by its path under `directory`."""
    rows = [path.name for name in (TRAIN_TOKENS, VALID_TOKENS) for path in (Path(name), *beside(Path(name)))]
    return [*rows, *sorted(f"{TOKENIZER_FILES}/{path.name}" for path in (directory / TOKENIZER_FILES).glob("*"))]
