"""Treebanks in CoNLL-U: texts whose words have a part of speech, and which token belongs to which word.

Format: https://universaldependencies.org/format.html. Read: FORM, UPOS, SpaceAfter=No, `# text`, `# newdoc`,
`# newpar`; multiword tokens (`3-4 don't`) when their words spell them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manyhands.errors import DataError
from manyhands.inspect.observed import Ints

UPOS = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM"),
    *("PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
)
MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Tagged:
    """A text and its words: where each begins and ends in it (characters), and its index into `UPOS`."""

    name: str
    text: str
    words: tuple[tuple[int, int, int], ...]


def read_conllu(path: str | Path) -> list[Tagged]:
    """The documents of a treebank; its sentences, if it marks no documents.

    Raises `DataError` naming the line that is not CoNLL-U.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes; a treebank may have {MOST_BYTES:,}")
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; CoNLL-U is") from None
    texts: list[Tagged] = []
    open_text, open_words, name = "", list[tuple[int, int, int]](), ""
    documents = any(line.startswith("# newdoc") for line in lines)
    for comments, rows in _sentences(lines, path):
        new = not documents or any(line.startswith("# newdoc") for line in comments)
        if new and open_text:
            texts.append(Tagged(name, open_text, tuple(open_words)))
        if new:
            open_text, open_words, name = "", [], f"{path.name}#{len(texts) + 1}"
        text, words = _words(comments, rows, path)
        if open_text:
            open_text += "\n\n" if any(line.startswith("# newpar") for line in comments) else " "
        open_words += [(begin + len(open_text), end + len(open_text), tag) for begin, end, tag in words]
        open_text += text
    if open_text:
        texts.append(Tagged(name, open_text, tuple(open_words)))
    if not any(text.words for text in texts):
        raise DataError(f"{path}: no word with a part of speech in it; expected CoNLL-U")
    return texts


_Row = tuple[int, list[str]]  # the line's number and its fields


def _sentences(lines: Sequence[str], path: Path) -> Iterator[tuple[list[str], list[_Row]]]:
    comments: list[str] = []
    rows: list[_Row] = []
    for number, line in enumerate([*lines, ""], 1):
        line = line.rstrip("\r")
        if line.startswith("#"):
            comments.append(line)
        elif line.strip():
            fields = line.split("\t")
            if len(fields) != 10:
                raise DataError(f"{path}: line {number} has {len(fields)} fields with tabs between; CoNLL-U has 10")
            rows.append((number, fields))
        elif rows:
            yield comments, rows
            comments, rows = [], []


def _words(comments: list[str], rows: list[_Row], path: Path) -> tuple[str, list[tuple[int, int, int]]]:
    """The sentence as a text, and its words in it."""
    units = _units(rows, path)
    stated = next((line.partition("=")[2].strip() for line in comments if line.startswith("# text =")), None)
    text = "".join(form + gap for form, gap, _ in units).strip() if stated is None else stated
    found: list[tuple[int, int, int]] = []
    at = 0
    for form, _, parts in units:
        begin = text.find(form, at)
        if begin < 0:
            raise DataError(f"{path}: line {rows[0][0]}: the sentence's text does not hold its word {form[:40]!r}")
        at = begin + len(form)
        if "".join(part for part, _ in parts) == form:
            for part, tag in parts:
                found.append((begin, begin + len(part), tag))
                begin += len(part)
    return text, found


def _units(rows: list[_Row], path: Path) -> list[tuple[str, str, list[tuple[str, int]]]]:
    """What is written between spaces or without one: its form, the gap behind it, and its words with their tags."""
    units: list[tuple[str, str, list[tuple[str, int]]]] = []
    last = 0  # the last word that a multiword token in front spans
    for number, fields in rows:
        place, form, tag = fields[0], fields[1], fields[3]
        gap = "" if "SpaceAfter=No" in fields[9].split("|") else " "
        first, dash, end = place.partition("-")
        if "." in place:  # a word that is not written
            continue
        if not first.isdecimal() or (dash and not end.isdecimal()):
            raise DataError(f"{path}: line {number}: {place[:40]!r} is not the number of a word")
        if dash:
            units.append((form, gap, []))
            last = int(end)
            continue
        if tag not in UPOS and tag != "_":
            raise DataError(f"{path}: line {number}: {tag[:40]!r} is not a universal part of speech")
        word = (form, UPOS.index(tag) if tag in UPOS else -1)
        if int(place) <= last and units:
            units[-1][2].append(word)
        else:
            units.append((form, gap, [word]))
    return units


def align(text: Tagged, spans: Sequence[tuple[int, int]]) -> Ints:
    """[tokens]: the tag of the word that a token lies in, white space aside; -1 for one that lies in none or in two.

    spans   each token's first character, and the one behind its last.
    """
    owner = np.full(len(text.text) + 1, -1, np.int64)
    for number, (begin, end, _) in enumerate(text.words):
        owner[begin:end] = number
    tags = np.full(len(spans), -1, np.int64)
    for i, (begin, end) in enumerate(spans):
        words = {int(owner[c]) for c in range(begin, end) if not text.text[c].isspace()}
        if len(words) == 1 and (word := words.pop()) >= 0:
            tags[i] = text.words[word][2]
    return tags
