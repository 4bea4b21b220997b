"""The texts that are looked at, cut into tokens: treebanks with their parts of speech, and any other data.

Each source (`--data`) is a domain. Its documents are cut into sequences; of a source with few documents every
sequence is a text of its own, so that intervals have something to draw from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from manyhands.errors import DataError
from manyhands.inspect.conllu import UPOS, Tagged, align, read_conllu
from manyhands.inspect.observed import Ints
from manyhands.text import Document, Tokenizer, read_documents

ENOUGH_TEXTS = 30
_DRAWN = 4
"""Times the tokens asked for are cut, before sequences are drawn from them."""


@dataclass(frozen=True)
class Sequences:
    """Token sequences, one behind the other. T tokens."""

    token_ids: Ints
    """[T]"""
    sequence: Ints
    """[T], from 0."""
    text: Ints
    """[T], from 0."""
    domain: Ints
    """[T]: index into `domains`."""
    domains: tuple[str, ...]
    tag: Ints | None
    """[T]: index into `UPOS`, -1 for none; None without a treebank."""
    aligned: float | None
    """Of the treebank's tokens, the share that lies in one word."""


def read_sequences(
    sources: Sequence[str], tokenizer: Tokenizer, length: int, max_tokens: int, text_field: str = "text", seed: int = 0
) -> Sequences:
    """Up to `max_tokens` tokens of each source, in sequences of at most `length`.

    Of more text, whole sequences are drawn at random, so that the beginning does not stand for all. Raises
    `DataError` for a source that cannot be read, that is given twice, or has fewer than two tokens.
    """
    names = _names(sources)
    parts: list[tuple[list[int], Ints | None, int, int]] = []  # ids, tags, text, domain
    texts = 0
    for domain, source in enumerate(sources):
        rng = np.random.default_rng([seed, domain])
        pieces = _pieces(_tokens(source, tokenizer, text_field, _DRAWN * max_tokens, rng), length)
        order, room = [], max_tokens
        for number in rng.permutation(len(pieces)):
            if len(pieces[number][0]) <= room:
                order.append(int(number))
                room -= len(pieces[number][0])
        if not order:
            raise DataError(f"{source}: not one sequence of {length} tokens in it fits in --max-tokens {max_tokens}")
        owners = sorted({pieces[number][2] for number in order})
        alone = len(owners) < ENOUGH_TEXTS
        for i, number in enumerate(sorted(order)):
            ids, tags, document = pieces[number]
            parts.append((ids, tags, texts + (i if alone else owners.index(document)), domain))
        texts = parts[-1][2] + 1
    sizes = [len(ids) for ids, *_ in parts]
    tag = None
    if any(tags is not None for _, tags, *_ in parts):
        tag = np.concatenate([np.full(len(ids), -1) if tags is None else tags for ids, tags, *_ in parts])
    tagged = [tags for _, tags, *_ in parts if tags is not None]
    return Sequences(
        token_ids=np.concatenate([np.asarray(ids, np.int64) for ids, *_ in parts]),
        sequence=np.repeat(np.arange(len(parts)), sizes),
        text=np.repeat([text for *_, text, _ in parts], sizes),
        domain=np.repeat([domain for *_, domain in parts], sizes),
        domains=names,
        tag=tag,
        aligned=float((np.concatenate(tagged) >= 0).mean()) if tagged else None,
    )


def _names(sources: Sequence[str]) -> tuple[str, ...]:
    names = [Path(source).stem or source for source in sources]
    names = [source if names.count(name) > 1 else name for name, source in zip(names, sources, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"--data {twice[0]} is given twice")
    return tuple(names)


def _tokens(
    source: str, tokenizer: Tokenizer, text_field: str, enough: int, rng: np.random.Generator
) -> list[tuple[list[int], Ints | None]]:
    """Of each document its token ids, and of a treebank's their tags; of many documents some, drawn at random."""
    documents: Sequence[Tagged | Document]
    documents = read_conllu(source) if source.lower().endswith(".conllu") else read_documents([source], text_field)
    found: list[tuple[list[int], Ints | None]] = []
    tokens = 0
    for number in rng.permutation(len(documents)):
        document = documents[number]
        if isinstance(document, Tagged):
            found.append(_tagged(document, tokenizer))
        else:
            found.append((tokenizer.encode(document.text), None))
        tokens += len(found[-1][0])
        if tokens >= enough:
            break
    return found


def _tagged(text: Tagged, tokenizer: Tokenizer) -> tuple[list[int], Ints]:
    ids = tokenizer.encode(text.text)
    return ids, align(text, spans(text.text, ids, tokenizer))


def spans(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Each token's first character of `text` and the one behind its last.

    From the tokens' bytes where they spell the text (byte-level vocabularies), which also places the parts of one
    character; else (a SentencePiece vocabulary puts a space in front) as the `tokenizers` library says.
    """
    data = text.encode()
    if b"".join(tokenizer.token_bytes(i) for i in ids) == data:
        ends = list(accumulate(len(tokenizer.token_bytes(i)) for i in ids))
        # The character that each byte is of; a token's last byte may be the middle of one.
        of_byte = np.cumsum([(byte & 0xC0) != 0x80 for byte in data]) - 1
        return [(int(of_byte[a]), int(of_byte[b - 1]) + 1) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]
    encoding = tokenizer.inner.encode(text, add_special_tokens=False)
    if list(encoding.ids) != list(ids):
        raise DataError("the tokenizer gives no place in the text for its tokens; parts of speech cannot be aligned")
    return [(int(begin), int(end)) for begin, end in encoding.offsets]


def _pieces(
    documents: Sequence[tuple[list[int], Ints | None]], length: int
) -> list[tuple[list[int], Ints | None, int]]:
    """Ids, tags and the document's number of every sequence."""
    return [
        (ids[at : at + length], None if tags is None else tags[at : at + length], number)
        for number, (ids, tags) in enumerate(documents)
        for at in range(0, len(ids), length)
    ]


__all__ = ["UPOS", "Sequences", "read_sequences", "spans"]
