"""From sources to token files in the run directory, once; a resumed run never reads the sources again.

`data.json` is written last and says what was prepared: the SHA-256 of each file, and what compressors reach. A run
whose files are no longer those is refused, because it would go on with other tokens.
"""

import bz2
import hashlib
import json
import lzma
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyhands import strict_json
from manyhands.config import RunConfig
from manyhands.errors import ConfigError, DataError
from manyhands.files import PREPARED, TOKENIZER, TRAIN_TOKENS, VALID_DOCUMENTS, VALID_TOKENS, write_atomic
from manyhands.text import Document, TokenFile, Tokenizer, read_documents, split_documents, write_tokens
from manyhands.trace import documents
from manyhands.trace.documents import Documents

MIN_BYTES = 1024
FILES = (TOKENIZER, TRAIN_TOKENS, VALID_TOKENS)
SAY_SECONDS = 10.0
"""Between two lines that say how far it is."""
_COMPRESS_AT_MOST = 4_000_000  # bytes: xz -9e takes about a second per megabyte


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run trains and validates on."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    train: TokenFile
    valid: TokenFile
    compressors: dict[str, float]
    """Bits per byte general compressors reach on the validation text."""
    sha256: dict[str, str]
    """Of each of `FILES`."""
    documents: Documents | None = field(default=None, kw_only=True)
    """Of the validation text, if its losses are kept one by one."""


def prepare_data(
    directory: Path, run: RunConfig, say: Callable[[str], None], ready_made: Callable[[], Tokenizer] | None = None
) -> RunData:
    """Read, split, tokenise and store the text under `directory`, or open what is already there.

    Without `data.tokenizer` the text is cut by `ready_made`, a checkpoint's tokenizer, or else by one made of it.

    Raises `DataError` for text that cannot be read or is too little, and for files that are not what was prepared;
    `ConfigError` for a tokenizer that does not fit the model's vocabulary.
    """
    tokenizer_path = directory / TOKENIZER
    done = directory / PREPARED
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        train, valid = _documents(run, say)
        total = sum(document.num_bytes for document in [*train, *valid])
        if total < MIN_BYTES:
            raise DataError(f"{', '.join(run.data.sources)}: {total} bytes of text are too few; {MIN_BYTES} are needed")
        count = len(train) + len(valid)
        say(f"read {count:,} documents, {total / 1e6:.1f} MB ({len(valid):,} for validation)")
        tokenizer = _tokenizer(run, train, say, ready_made)
        tokenizer.save(tokenizer_path)
        if Tokenizer.from_file(tokenizer_path).eos_token_id != tokenizer.eos_token_id:
            raise DataError(
                f"{_named(run)}: its end of text is named beside tokenizer.json alone, "
                "which is all that a run keeps: a model would never stop; "
                "name one of tokenizer.json's tokens <|endoftext|> or </s>"
            )
        write_tokens(
            directory / TRAIN_TOKENS, train, tokenizer, _progress(sum(len(document.text) for document in train), say)
        )
        write_tokens(directory / VALID_TOKENS, valid, tokenizer)
        if len(valid) <= documents.MOST:
            Documents.of([document.text for document in valid]).save(directory / VALID_DOCUMENTS)
        finish_prepared(done, compressors(valid), FILES)
    reached, digests = read_prepared(done, FILES, say)
    tokenizer = Tokenizer.from_file(tokenizer_path)
    vocab = run.model.vocab_size
    valid_tokens = TokenFile.open(directory / VALID_TOKENS, vocab)
    return RunData(
        tokenizer,
        tokenizer_path,
        TokenFile.open(directory / TRAIN_TOKENS, vocab),
        valid_tokens,
        reached,
        digests,
        documents=_valid_documents(directory / VALID_DOCUMENTS, valid_tokens, say),
    )


def _valid_documents(path: Path, valid: TokenFile, say: Callable[[str], None]) -> Documents | None:
    """Which documents the validation text has; None for a run that was prepared before that was kept."""
    if not path.is_file():
        return None
    found, info = Documents.open(path), valid.info
    if len(found.bytes_X) != info.num_documents or found.bytes_X.sum() != info.num_bytes:
        say(f"{path}: not the documents of this validation text; losses are not kept by document")
        return None
    return found


def _documents(run: RunConfig, say: Callable[[str], None]) -> tuple[list[Document], list[Document]]:
    """What is trained on, and what is not. Raises `DataError` for a text that is to be both."""
    documents = read_documents(run.data.sources, run.data.text_field, say)
    if not run.data.valid:
        return split_documents(documents, run.data.valid_fraction, run.data.seed)
    valid = read_documents(run.data.valid, run.data.text_field, say)
    trained = {document.text: document.name for document in documents}
    for document in valid:
        if (name := trained.get(document.text)) is not None:
            raise DataError(f"data.valid: {document.name} is trained on too, as {name} of data.sources: leave one out")
    return documents, valid


def _progress(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Says every ten seconds how much is tokenised."""
    said = time.monotonic()

    def progress(done: int) -> None:
        nonlocal said
        if done < total and time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            say(f"tokenised {done / 1e6:,.0f} of {total / 1e6:,.0f} million characters")

    return progress


def finish_prepared(done: Path, reached: dict[str, float], files: Sequence[str], **more: Any) -> None:
    """Write `data.json`: from now on `files` beside it are the run's. `more` is what a person may want to know."""
    write_atomic(done, json.dumps({"compressors": reached, "sha256": _digests(done.parent, files), **more}))


def _digests(directory: Path, files: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of each file."""
    digests = {}
    for name in files:
        try:
            with open(directory / name, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{directory / name}: cannot be read: {error.strerror}") from None
    return digests


def read_prepared(
    done: Path, files: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, str]]:
    """What compressors reach, and the digests of unchanged files, from `data.json`. An older one is given digests.

    Raises `DataError` for a file that is not what was prepared.
    """
    again = "put back what was there, or start a new run"
    try:
        with open(done, "rb") as file:
            values = strict_json.loads(file.read(1 << 20))
        reached = {str(name): float(value) for name, value in values["compressors"].items()}
        written = values.get("sha256")
        if written is not None and set(written) != set(files):
            raise ValueError("sha256 names other files")
    except OSError as error:
        raise DataError(f"{done}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{done}: damaged: it does not say what was prepared; {again}") from None
    digests = _digests(done.parent, files)
    if written is None:
        say(f"{done.parent}: prepared before files were hashed; what is there now is taken as right")
        finish_prepared(done, reached, files)
    elif changed := [name for name in files if digests[name] != written[name]]:
        raise DataError(f"{done.parent / changed[0]}: not what was prepared for this run: its SHA-256 differs; {again}")
    return reached, digests


def _named(run: RunConfig) -> str:
    return f"data.tokenizer={run.data.tokenizer}" if run.data.tokenizer or not run.start else f"start={run.start}"


def _tokenizer(
    run: RunConfig, train: list[Document], say: Callable[[str], None], ready_made: Callable[[], Tokenizer] | None
) -> Tokenizer:
    vocab = run.model.vocab_size
    if run.data.tokenizer is None and ready_made is not None:
        tokenizer = ready_made()
    elif run.data.tokenizer is None:
        say(f"training a byte-level BPE of {vocab:,} tokens")
        sentinels = run.spans.sentinels if run.model.kind == "encoder_decoder" else 0
        tokenizer = Tokenizer.train((document.text for document in train), vocab, run.tokenizer.pre, sentinels)
    else:
        tokenizer = Tokenizer.from_file(run.data.tokenizer)
    if tokenizer.vocab_size > vocab:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size = {vocab} has room for fewer; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


_XZ = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
"""With a dictionary as long as the text: 9 alone asks for 64 MB of it and ten times that in memory."""


def compressors(valid: list[Document]) -> dict[str, float]:
    """Bits per byte of the strongest settings of three compressors on the validation text (its first 4 MB)."""
    text = b"".join(document.text.encode() for document in valid)[:_COMPRESS_AT_MOST]
    sizes = {
        "zlib -9": len(zlib.compress(text, 9)),
        "bz2 -9": len(bz2.compress(text, 9)),
        "xz -9e": len(lzma.compress(text, filters=[_XZ | {"dict_size": max(len(text), 4096)}])),
    }
    return {name: 8.0 * size / len(text) for name, size in sizes.items()}
