"""From sources to token files in the run directory, once; a resumed run never reads the sources again."""

import bz2
import json
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manyhands.config import RunConfig
from manyhands.errors import ConfigError, DataError
from manyhands.files import write_atomic
from manyhands.text import Document, TokenFile, Tokenizer, read_documents, split_documents, write_tokens

MIN_BYTES = 1024
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


def prepare_data(directory: Path, run: RunConfig, say: Callable[[str], None]) -> RunData:
    """Read, split, tokenise and store the text under `directory`, or open what is already there.

    Raises `DataError` for text that cannot be read or is too little, `ConfigError` for a tokenizer that does not
    fit the model's vocabulary.
    """
    tokenizer_path = directory / "tokenizer.json"
    done = directory / "data.json"
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        documents = read_documents(run.data.sources, run.data.text_field)
        train, valid = split_documents(documents, run.data.valid_fraction, run.data.seed)
        total = sum(document.num_bytes for document in documents)
        if total < MIN_BYTES:
            raise DataError(f"{', '.join(run.data.sources)}: {total} bytes of text are too few; {MIN_BYTES} are needed")
        say(f"read {len(documents):,} documents, {total / 1e6:.1f} MB ({len(valid):,} for validation)")
        tokenizer = _tokenizer(run, train, say)
        tokenizer.save(tokenizer_path)
        write_tokens(directory / "train.npy", train, tokenizer)
        write_tokens(directory / "valid.npy", valid, tokenizer)
        write_atomic(done, json.dumps({"compressors": compressors(valid)}))
    tokenizer = Tokenizer.from_file(tokenizer_path)
    vocab = run.model.vocab_size
    return RunData(
        tokenizer,
        tokenizer_path,
        TokenFile.open(directory / "train.npy", vocab),
        TokenFile.open(directory / "valid.npy", vocab),
        json.loads(done.read_text(encoding="utf-8"))["compressors"],
    )


def _tokenizer(run: RunConfig, train: list[Document], say: Callable[[str], None]) -> Tokenizer:
    vocab = run.model.vocab_size
    if run.data.tokenizer is None:
        say(f"training a byte-level BPE of {vocab:,} tokens")
        tokenizer = Tokenizer.train((document.text for document in train), vocab)
    else:
        tokenizer = Tokenizer.from_file(run.data.tokenizer)
    if tokenizer.vocab_size > vocab:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size = {vocab} has room for fewer; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    return tokenizer


def compressors(valid: list[Document]) -> dict[str, float]:
    """Bits per byte of the strongest settings of three compressors on the validation text (its first 4 MB)."""
    text = b"".join(document.text.encode() for document in valid)[:_COMPRESS_AT_MOST]
    sizes = {
        "zlib -9": len(zlib.compress(text, 9)),
        "bz2 -9": len(bz2.compress(text, 9)),
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8.0 * size / len(text) for name, size in sizes.items()}
