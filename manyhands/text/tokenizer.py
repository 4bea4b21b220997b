"""Text to token ids and back: byte-level BPE, in the `tokenizer.json` format everybody reads.

    tokenizer = Tokenizer.train((document.text for document in documents), vocab_size=4096)
    ids = tokenizer.encode("def f(x):\n    return x\n")
    tokenizer.decode(ids)  # the same text, for any text

V = vocabulary size.
"""

import copy
import itertools
import json
import logging
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from manyhands.errors import CheckpointError, DataError
from manyhands.files import TOKENIZER, write_atomic, writing
from manyhands.text import disarm
from manyhands.text.chat import ChatTemplate, Message
from manyhands.text.marks import has_blocks, read_marks, touching, without_marks
from manyhands.text.padded import Padding, Side, Tensors, padded
from manyhands.text.pretokenizers import RULES, Pre, pre_tokenizer
from manyhands.text.stream import StreamDecoder
from manyhands.text.tokenizer_files import TEMPLATE, TOKENIZER_CONFIG, TokenizerFiles, read_tokenizer_files
from manyhands.text.vet import vet
from manyhands.text.vocabulary import bytes_of_tokens

if TYPE_CHECKING:
    from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
_DEEPSEEK = "<｜end▁of▁sentence｜>"
_log = logging.getLogger(__name__)
_END_NAMES = (END_OF_TEXT, "</s>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<eos>", _DEEPSEEK, "[EOS]")
"""What common model families call the token that ends a document, the document's end before the chat turn's."""
MIN_VOCAB_SIZE = 257
"""256 bytes and the end of text."""
T5_TOKENS = ("<pad>", "</s>")
"""Ids 0 and 1 of a vocabulary with sentinels: padding, which also begins what a decoder writes, and the end of text."""
_NOT_HERE = {
    "continue_final_message": False,
    "max_length": None,
    "padding": False,
    "processor_kwargs": None,
    "return_assistant_tokens_mask": False,
    "return_dict": False,
    "return_tensors": None,
    "sanitize_control_tokens": True,
    "tokenizer_kwargs": None,
    "truncation": False,
}
"""Arguments of transformers' `apply_chat_template` that are not for the template, at the value that is so here."""
_ENOUGH_CHARACTERS = 6_000_000
"""Text a vocabulary is learned from. Half of the standard library gives the bytes per token of all of it to 1 %."""


class Tokenizer:
    """A Hugging Face `tokenizers.Tokenizer` that treats what it is given as plain text unless told otherwise.

    No token is added in front or behind, nothing is truncated or padded, and a document that contains the words
    `<|endoftext|>` is encoded as those letters, not as the special token. Threads may share one.
    """

    def __init__(self, inner: Any, files: TokenizerFiles | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        files = files or TokenizerFiles()
        vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
        # Named, but an ordinary token in tokenizer.json: transformers makes it special, and so changes what is encoded.
        if late := [name for name in files.named_tokens.values() if name in vocabulary and name not in special]:
            inner.add_special_tokens(late)
        inner.encode_special_tokens = True  # i.e. as ordinary text
        self.inner = inner
        self.files = files
        """What `from_directory` read; empty for a tokenizer from elsewhere."""
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        """V: one more than the largest id, so that an embedding of V rows covers every id."""
        self.bos_token: str | None = files.named_tokens.get("bos_token")
        self.eos_token: str | None = files.named_tokens.get("eos_token")
        """As the files name them. A chat model's `eos_token` often ends a turn, and is another token than the one of
        `eos_token_id`, which ends a document; both are in `eos_token_ids`."""
        self.chat_template: str | None = files.chat_template
        usual = [name for name in _END_NAMES if name in special] or [name for name in _END_NAMES if name in vocabulary]
        end = next(iter([*usual, *([self.eos_token] if self.eos_token in vocabulary else [])]), None)
        self.eos_token_id: int | None = None if end is None else vocabulary[end]
        """Ends a document; None if the vocabulary has no token with a usual name for it, and no file names one."""
        ends = {self.eos_token_id, vocabulary.get(self.eos_token or "")}
        self.eos_token_ids: frozenset[int] = files.end_ids | {token_id for token_id in ends if token_id is not None}
        """Each of them ends an answer: the document's end, `eos_token`, and those in generation_config.json, or in
        config.json where that has none."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pre: Pre | None = None, sentinels: int = 0) -> Self:
        """Learn a byte-level BPE of at most `vocab_size` tokens (fewer if the text is too small for more).

        `pre` names a published rule for where it may not merge (`pretokenizers.py`); None is `pieces.py`.
        Deterministic. Of much text every n-th is used, about 6 million characters in all. Each of the 256 bytes
        is a token, so any text can be encoded; `<|endoftext|>` is id 0.

        With `sentinels` it has so many for span corruption (`spans.py`), laid out as T5's: `<pad>` is id 0, `</s>` ends
        a text and is id 1, and the last ids are the sentinels, `<extra_id_0>` the very last.

        Raises `DataError` for a `vocab_size` without room for that and the bytes, or text that UTF-8 cannot hold.
        """
        least = smallest_vocabulary(sentinels)
        if vocab_size < least:
            more = f" with {sentinels} sentinels" if sentinels else ""
            raise DataError(f"a byte-level vocabulary{more} needs at least {least} tokens, not {vocab_size}")
        texts = list(texts)
        stride = -(-sum(map(len, texts)) // _ENOUGH_CHARACTERS) or 1
        inner = tokenizers.Tokenizer(models.BPE(ignore_merges=pre is not None and RULES[pre].ignore_merges))
        inner.pre_tokenizer = pre_tokenizer(pre)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - sentinels,
            special_tokens=list(T5_TOKENS) if sentinels else [END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        try:
            inner.train_from_iterator(texts[::stride], trainer)
        except UnicodeEncodeError as error:
            raise DataError(_surrogate(error)) from None
        if sentinels:
            inner.add_special_tokens([f"<extra_id_{number}>" for number in reversed(range(sentinels))])
        return cls(inner)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `tokenizer.json`, or the directory it lies in. Raises `CheckpointError` if it is missing or wrong."""
        path = Path(path)
        if path.is_dir():
            return cls.from_directory(path)
        try:
            return cls(_parse(path, path.read_bytes()))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Read `tokenizer.json` and what lies beside it (`tokenizer_files.py`): chat template, special tokens.

        Kimi's `tiktoken.model` is read where there is no `tokenizer.json`. Where `eos_token` and `eos_token_id` of the
        files disagree, a line is logged; each ends an answer.

        Raises `CheckpointError` naming the file and the field that is missing or wrong.
        """
        files = read_tokenizer_files(path)
        tokenizer = cls.from_files(files, Path(path) / TOKENIZER)
        tokenizer._say_ends(path)
        return tokenizer

    @classmethod
    def from_files(cls, files: TokenizerFiles, where: str | Path) -> Self:
        """The tokenizer that `files` hold. `where` begins a message. Raises `CheckpointError` if it is damaged."""
        return cls(_parse(where, files.content[TOKENIZER]), files)

    def _say_ends(self, path: str | Path) -> None:
        """Log a line if the token that is named as the end is not one of the ids that are."""
        named = self.inner.token_to_id(self.eos_token or "")
        ids = self.files.end_ids or ({self.eos_token_id} if self.eos_token_id is not None else set())
        if named is None or named in ids or not ids:
            return
        others = ", ".join(f"{i} ({repr(self.inner.id_to_token(i))[:40]})" for i in sorted(ids)[:6])
        stated = "eos_token_id" if self.files.end_ids else "the end of a text"
        said = f"eos_token is {self.eos_token!r} ({named}), {stated} is {others}; each of them ends an answer"
        _log.warning("%s: %s", path, said)

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, atomically. Raises `StorageError` if the disk refuses."""
        with writing(path) as file:
            file.write(self.inner.to_str(pretty=True).encode("utf-8"))

    def save_directory(self, path: str | Path) -> None:
        """Write the files that `from_directory`, and transformers' `AutoTokenizer`, read this tokenizer from.

        Byte for byte the files it was read from, if it came from a directory, and a `tokenizer_config.json` that names
        the end of text where there was none. Each file is written atomically; a
        directory that must be complete or absent is the caller's. Raises `StorageError` if the disk refuses.
        """
        content, named = dict(self.files.content), dict(self.files.named_tokens)
        if self.eos_token_id is not None:
            named.setdefault("eos_token", self.inner.id_to_token(self.eos_token_id))
        if not content:
            content[TOKENIZER] = self.inner.to_str(pretty=True).encode()
            if self.chat_template is not None:
                content[TEMPLATE] = self.chat_template.encode()
        if TOKENIZER_CONFIG not in content:
            described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
            content[TOKENIZER_CONFIG] = (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode()
        for name, data in content.items():
            write_atomic(Path(path) / name, data)

    def with_chat_template(self, template: str) -> Self:
        """The same tokenizer with another chat template."""
        content = self.files.content and {**self.files.content, TEMPLATE: template.encode()}
        other = copy.copy(self)
        other.__dict__.pop("_template", None)  # the process of the old one
        other.files = replace(self.files, content=content, chat_template=template)
        other.chat_template = template
        return other

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`. Raises `DataError` for half a surrogate pair, which is not text.

        `add_special_tokens` adds what the model was trained to see around a text: `<s>` in front, for Llama and
        Mixtral; for many others, nothing. `parse_special` makes special tokens of their names in the text: for text of
        our own making only, never for a user's.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """Token ids of each text, on all cores. Arguments and errors are those of `encode`."""
        return [encoding.ids for encoding in self._encodings(texts, add_special_tokens, parse_special)]

    def _encodings(self, texts: Sequence[str], add_special_tokens: bool, parse_special: bool) -> list[Any]:
        inner = self._parsing if parse_special else self.inner
        try:
            encodings: list[Any] = inner.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return encodings
        except TypeError:
            for text in texts:
                _check_text(text)
            raise
        except BaseException as error:
            if not _is_panic(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"this tokenizer.json cannot encode the text: {reason}") from None

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: Padding = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        padding_side: Side | None = None,
        return_tensors: Tensors | None = None,
        split_special_tokens: bool = True,
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask` of one text or several, as transformers gives them: what a model takes.

            model(**tokenizer(["one", "another text"], padding=True, return_tensors="pt"))

        `padding`: True or "longest" to the longest, "max_length" to `max_length` tokens; with `pad_token`, or the end
        of text where there is none, on the side that tokenizer_config.json names (`padding_side`; else right).
        `truncation` leaves `max_length` tokens, those of `add_special_tokens` among them; None: if there is a
        `max_length` and no padding. `return_tensors`: "pt", "np";
        None gives lists, flat ones for one text. Other than there, a special token that is spelled out in a text stays
        letters, unless `split_special_tokens` is False. Raises `DataError` for what `encode` and `padded` refuse, and
        for `truncation` without a `max_length` that has room, or a `max_length` that would do nothing.
        """
        truncation = max_length is not None and padding in (False, "do_not_pad") if truncation is None else truncation
        if max_length is not None and not truncation and padding != "max_length":
            raise DataError("max_length does nothing without truncation=True or padding='max_length'")
        texts = [text] if isinstance(text, str) else list(text)
        if truncation:
            around = int(self.inner.num_special_tokens_to_add(False)) if add_special_tokens else 0
            if max_length is None or max_length < around:
                raise DataError(f"truncation needs max_length, {around} at least; it is {max_length}")
            encodings = self._encodings(texts, False, not split_special_tokens)
            for encoding in encodings:
                encoding.truncate(max_length - around)
            if add_special_tokens:
                encodings = [self.inner.post_process(encoding, None, True) for encoding in encodings]
        else:
            encodings = self._encodings(texts, add_special_tokens, not split_special_tokens)
        rows, side = [encoding.ids for encoding in encodings], padding_side or self.files.padding_side
        found = padded(rows, padding, max_length, self.pad_token_id, side, return_tensors)
        if isinstance(text, str) and return_tensors is None:
            return {name: values[0] for name, values in found.items()}
        return found

    @property
    def pad_token_id(self) -> int | None:
        """What shorter texts are filled up with: `pad_token`, else the end of text; no loss and no mask counts it."""
        named = self.inner.token_to_id(self.files.named_tokens.get("pad_token", ""))
        return self.eos_token_id if named is None else int(named)

    @cached_property
    def sentinel_ids(self) -> list[int]:
        """The ids of `<extra_id_0>`, `<extra_id_1>`, …: T5's, for span corruption; empty if there are none."""
        ids = (self.inner.token_to_id(f"<extra_id_{number}>") for number in itertools.count())
        return list(itertools.takewhile(lambda token_id: token_id is not None, ids))

    @cached_property
    def front_ids(self) -> list[int]:
        """What stands in front of every text that the model sees: `<s>` for Llama and Mixtral, nothing for many."""
        plain, around = self.encode("a"), self.encode("a", add_special_tokens=True)
        for at in range(len(around) - len(plain) + 1):
            if around[at : at + len(plain)] == plain:
                return around[:at]
        return []

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """`messages` in the model's chat template, as text.

        `variables` are `tools`, `documents` and the template's own switches.
        Raises `CheckpointError` if there is no template or it fails, `DataError` if it refuses the messages.
        """
        named = {"bos_token": None, "eos_token": None, **self.files.named_tokens}
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **{**named, **variables})

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """`render_chat` as token ids, special tokens and all: what the model is to continue.

        The ids of transformers' `apply_chat_template`, but for one trap: there, a special token that is spelled out in
        a message (`<|im_end|>`) becomes that token, so that whoever wrote the message can end the turn and speak as the
        system. Here it stays the letters it is written with, in any role, in tools, documents and `variables`. A word
        that a template builds a token from is not protected (`<|{{ role }}|>`): take roles from a list, not a user.
        Added tokens that are not special (`<think>`) are tokens, as there.

        Arguments mean what they mean there; `tokenize=False` gives the text. Raises what `render_chat` does, and
        `DataError` for those of transformers' arguments that are not here (`return_tensors`, `padding`, …).
        """
        for name, usual in _NOT_HERE.items():
            if variables.pop(name, usual) not in (usual, None):
                raise DataError(f"apply_chat_template: {name} is not supported: it returns a list of ids, or the text")
        if chat_template is not None:
            self = self.with_chat_template(chat_template)
        variables |= {"tools": tools, "documents": documents}
        if not tokenize:
            return self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode_chat(messages, add_generation_prompt, **variables)[0]

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        marked: bool = False,
        **variables: Any,
    ) -> tuple[list[int], list[bool] | None]:
        """Token ids as in `apply_chat_template`; and, if they are to be `marked`, which of them the model wrote.

        Those that touch the template's `{% generation %}` blocks, from the first of a block to its last. None where
        there are no blocks, or where the template looks into what it wrote there, so that it cannot be marked.
        """
        variables = {"add_generation_prompt": add_generation_prompt, **variables}
        marked = marked and has_blocks(self.chat_template or "")
        if marked:
            messages, variables = without_marks(messages), without_marks(variables)
        named = {"bos_token": None, "eos_token": None, **self.files.named_tokens}
        own = [name for name in named if name not in variables]
        rendered = {**named, **variables}
        text, origin = self._template.render_with_origin(messages, own=own, **rendered)
        _check_text(text)
        if not any(origin) and not marked:
            return self.encode(text, parse_special=True), None
        encoding = self._parsing.encode(text, add_special_tokens=False)
        origin = disarm.spells(origin, not disarm.holds([messages, list(variables.values())], self._special))
        pieces = disarm.spelled_out(encoding, text, origin, self._special_names, self.spell)
        ids = [token_id for piece in pieces for token_id in piece]
        if not marked:
            return ids, None
        found = read_marks(self._template.render_with_origin(messages, own=own, marked=True, **rendered)[0])
        if found is None or found[0] != text:
            return ids, None
        inside = touching(encoding.offsets, found[1])
        return ids, [flag for flag, piece in zip(inside, pieces, strict=True) for _ in piece]

    def spell(self, text: str) -> list[int]:
        """Token ids of `text` inside a text: without the space that SentencePiece puts in front of a whole one.

        Special tokens are the letters they are written with.
        """
        front, both = self.encode("\n"), self.encode("\n" + text)
        return both[len(front) :] if both[: len(front)] == front else self.encode(text)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise CheckpointError("this model has no chat template: it continues text, it was not made to answer")
        return ChatTemplate(self.chat_template)

    @property
    def special_ids(self) -> Set[int]:
        """Ids of the special tokens, which stand for no text."""
        return self._special_names.keys()

    @cached_property
    def _special_names(self) -> dict[int, str]:
        return {i: token.content for i, token in self.inner.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return disarm.pattern_of(self._special_names.values())

    @cached_property
    def _parsing(self) -> Any:
        """The same tokenizer with its eyes open for special tokens: a second one, because threads share them."""
        return tokenizers.Tokenizer.from_str(self.inner.to_str())

    def decode(self, ids: "Sequence[int] | npt.NDArray[np.integer] | Tensor", skip_special_tokens: bool = False) -> str:
        """The text of `ids` [N], special tokens by their names or left out; bytes that are not UTF-8 become U+FFFD.

        An id the vocabulary does not have (a model's padded rows) has no text.
        """
        return str(self.inner.decode(_plain(ids), skip_special_tokens=skip_special_tokens))

    def batch_decode(
        self, rows: "Sequence[Sequence[int]] | npt.NDArray[np.integer] | Tensor", skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each row of ids, as `model.generate` gives them."""
        return [self.decode(row, skip_special_tokens) for row in _plain(rows)]

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


def _plain(ids: Any) -> Any:
    """Numbers, of an array or a tensor too."""
    return ids.tolist() if hasattr(ids, "tolist") else ids


def smallest_vocabulary(sentinels: int = 0) -> int:
    """Tokens that `Tokenizer.train` needs room for."""
    return MIN_VOCAB_SIZE + (sentinels + len(T5_TOKENS) - 1 if sentinels else 0)


def _parse(path: str | Path, data: bytes) -> Any:
    try:
        vet(data)
        inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        inner.no_truncation()
        inner.no_padding()
        inner.encode("a")  # a post-processor that names tokens it does not have
        return inner
    except BaseException as error:  # tokenizers raises nothing narrower
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not a tokenizer.json: {reason}") from None


def _is_panic(error: BaseException) -> bool:
    """The tokenizers library's panics are no `Exception`."""
    return type(error).__name__ == "PanicException"


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(_surrogate(error)) from None


def _surrogate(error: UnicodeEncodeError) -> str:
    return f"the text holds half a surrogate pair at character {error.start}, which UTF-8 cannot encode"
