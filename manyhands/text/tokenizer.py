"""Text to token ids and back: byte-level BPE, in the `tokenizer.json` format everybody reads.

    tokenizer = Tokenizer.train((document.text for document in documents), vocab_size=4096)
    ids = tokenizer.encode("def f(x):\n    return x\n")
    tokenizer.decode(ids)  # the same text, for any text

V = vocabulary size.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from manyhands.errors import CheckpointError, DataError
from manyhands.files import writing
from manyhands.text.pieces import PIECES
from manyhands.text.stream import StreamDecoder
from manyhands.text.vocabulary import bytes_of_tokens

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "</s>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<eos>")
"""What common model families call the token that ends a document, the document's end before the chat turn's."""
MIN_VOCAB_SIZE = 257
"""256 bytes and the end of text."""
_ENOUGH_CHARACTERS = 6_000_000
"""Text a vocabulary is learned from. Half of the standard library gives the bytes per token of all of it to 1 %."""


class Tokenizer:
    """A Hugging Face `tokenizers.Tokenizer` that treats what it is given as plain text.

    No token is added in front or behind, nothing is truncated or padded, and a document that contains the words
    `<|endoftext|>` is encoded as those letters, not as the special token.
    """

    def __init__(self, inner: Any) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # i.e. as ordinary text
        vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        self.inner = inner
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        """V: one more than the largest id, so that an embedding of V rows covers every id."""
        self.eos_token_id: int | None = next((vocabulary[name] for name in _END_NAMES if name in vocabulary), None)
        """Ends a document; None if the vocabulary has no token with a usual name for it."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn a byte-level BPE of at most `vocab_size` tokens (fewer if the text is too small for more).

        Deterministic. Of much text every n-th is used, about 6 million characters in all. Each of the 256 bytes
        is a token, so any text can be encoded; `<|endoftext|>` is id 0.
        Raises `DataError` for `vocab_size` < 257 or text that UTF-8 cannot hold.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise DataError(f"a byte-level vocabulary needs at least {MIN_VOCAB_SIZE} tokens, not {vocab_size}")
        texts = list(texts)
        stride = -(-sum(map(len, texts)) // _ENOUGH_CHARACTERS) or 1
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        try:
            inner.train_from_iterator(texts[::stride], trainer)
        except UnicodeEncodeError as error:
            raise DataError(_surrogate(error)) from None
        return cls(inner)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json`. Raises `CheckpointError` if it is missing or is not one."""
        path = Path(path)
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except Exception as error:  # tokenizers raises nothing narrower
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: not a tokenizer.json: {reason}") from None

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, atomically. Raises `StorageError` if the disk refuses."""
        with writing(path) as file:
            file.write(self.inner.to_str(pretty=True).encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added. Raises `DataError` for half a surrogate pair, which is not text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores. Raises `DataError` as `encode` does."""
        try:
            return [encoding.ids for encoding in self.inner.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:
            for text in texts:
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise DataError(_surrogate(error)) from None
            raise

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens by their names; bytes that are not UTF-8 become U+FFFD.

        An id the vocabulary does not have (a model's padded rows) has no text.
        """
        return str(self.inner.decode(ids, skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that `token_id` stands for; a part of a character, often. Empty for an id it does not have."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """`[V]`, bytes of text behind each id; 0 for special tokens, which stand for none.

        The denominator of bits per byte for any set of target tokens: `byte_lengths[targets].sum()`.
        """
        special = {id_ for id_, token in self.inner.get_added_tokens_decoder().items() if token.special}
        lengths = [0 if id_ in special else len(piece) for id_, piece in enumerate(self._bytes)]
        return np.asarray(lengths, dtype=np.int64)

    @cached_property
    def _bytes(self) -> list[bytes]:
        return bytes_of_tokens(self.inner, self.vocab_size)

    def stream_decoder(self) -> StreamDecoder:
        """Text piece by piece while ids arrive, never half a character."""
        return StreamDecoder(self.token_bytes)


def _surrogate(error: UnicodeEncodeError) -> str:
    return f"the text holds half a surrogate pair at character {error.start}, which UTF-8 cannot encode"
