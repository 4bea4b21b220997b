"""Short texts in many languages and what they are in English, from what a machine has or a person fetched.

    DIR     Debian's translated package descriptions (`Translation-de`, …), as apt keeps its lists
    *.whl   the wheel of a program with catalogues: Django's has 98 languages
    DIR     any directory of catalogues, LANG/LC_MESSAGES/*.mo: /usr/share/locale, say

Languages are named as the files name them: `de`, `pt_BR`.
"""

import bz2
import gzip
import hashlib
import lzma
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from manyhands.errors import DataError

SYSTEM = Path("/usr/share/locale")
_TRANSLATION = re.compile(r"Translation-(?P<language>[A-Za-z]{2,3}(?:(?:_|%5[fF])[A-Za-z]+)?)(?P<packed>\.\w+)?$")
_OPEN: dict[str | None, Callable[..., Any]] = {None: open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MO, _MO_SWAPPED = 0x950412DE, 0xDE120495
_MOST = 1 << 28
"""Bytes of one file, unpacked."""


@dataclass(frozen=True, slots=True, order=True)
class Translation:
    """One text."""

    language: str
    text: str
    english: str

    @property
    def held_out(self) -> bool:
        """One English text in twenty, in whatever language: what is tested has never been written in training."""
        return int(hashlib.sha256(self.english.encode()).hexdigest()[:8], 16) % 20 == 0


def read_translations(path: Path | None) -> list[Translation]:
    """All there are, each once, sorted. None: this machine's own catalogues.

    Raises `DataError` saying what was looked for where there are none.
    """
    where = SYSTEM if path is None else path
    if not where.exists():
        raise DataError(f"{where}: does not exist; {_WANTED}")
    if where.is_file():
        found = _wheel(where)
    elif any(_TRANSLATION.search(file.name) for file in where.iterdir()):
        found = _debian(where)
    else:
        found = _catalogues(where)
    kept = {t for t in found if t.text and t.english and t.text != t.english and not t.language.startswith("en")}
    if not kept:
        raise DataError(f"{where}: no translations; {_WANTED}")
    return sorted(kept)


_WANTED = (
    "--data is a directory of Debian's Translation-* lists (apt-get update -o Dir::State::lists=DIR "
    "-o Dir::Cache=DIR2 -o Acquire::GzipIndexes=false -o Acquire::Languages=de,fr,it,…,en, with DIR/partial there), "
    "a wheel with catalogues such as Django's (pip download --no-deps django), or a directory of LANG/LC_MESSAGES/*.mo"
)


def made_up_translations(english: int, languages: int, seed: int) -> list[Translation]:
    """Sentences of a small grammar, each in some of so many made-up languages, whose words are spelled anew and whose
    order is turned round in every second one. The first language has all of them, every next one half as many.
    """
    draw = random.Random(seed)
    words = ["".join(draw.choices("abdegiklmnoprstu", k=draw.randint(2, 5))) for _ in range(60)]
    sentences = sorted({" ".join(draw.choices(words, k=draw.randint(3, 6))) for _ in range(english)})
    found = []
    for number in range(languages):
        spelled = {word: "".join(draw.choices("abdegiklmnoprstu", k=draw.randint(2, 5))) for word in words}
        for sentence in draw.sample(sentences, max(1, len(sentences) >> number)):
            order = sentence.split()[:: -1 if number % 2 else 1]
            found.append(Translation(f"made-up-{number}", " ".join(spelled[word] for word in order), sentence))
    return sorted(found)


def _debian(directory: Path) -> Iterator[Translation]:
    """Short descriptions of packages, joined to the English ones by the sum that both name."""
    english: dict[str, str] = {}
    others: list[tuple[str, Path]] = []
    for file in sorted(directory.iterdir()):
        if (match := _TRANSLATION.search(file.name)) is None:
            continue
        if match["packed"] not in _OPEN:
            raise DataError(
                f"{file}: {match['packed']} is not read here; fetch the lists with -o Acquire::GzipIndexes=false"
            )
        language = re.sub("%5[fF]", "_", match["language"])
        if language == "en":
            english |= {name: text for name, _, text in _descriptions(file)}
        else:
            others.append((language, file))
    if not english:
        raise DataError(f"{directory}: no Translation-en among the lists; add en to Acquire::Languages")
    for language, file in others:
        for name, tag, text in _descriptions(file):
            if tag == language and name in english:
                yield Translation(language, text, english[name])


def _descriptions(file: Path) -> Iterator[tuple[str, str, str]]:
    """(sum, language, first line) of every paragraph that has them."""
    name = ""
    for line in _text(file).split("\n"):
        field, _, value = line.partition(": ")
        if not line:
            name = ""
        elif field == "Description-md5":
            name = value.strip()
        elif field.startswith("Description-") and name:
            yield name, field.removeprefix("Description-"), value.strip()


def _text(file: Path) -> str:
    packed = file.suffix if file.suffix in _OPEN else None
    try:
        with _OPEN[packed](file, "rb") as stream:
            data: bytes = stream.read(_MOST + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if len(data) > _MOST:
        raise DataError(f"{file}: more than {_MOST:,} bytes")
    return data.decode("utf-8", "replace")


def _wheel(path: Path) -> Iterator[Translation]:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".mo") and entry.file_size <= _MOST:
                    yield from _catalogue(_language(PurePosixPath(entry.filename)), archive.read(entry))
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: is no wheel: {error}") from None


def _catalogues(directory: Path) -> Iterator[Translation]:
    for file in sorted(directory.rglob("*.mo")):
        try:
            if file.stat().st_size <= _MOST:
                yield from _catalogue(_language(PurePosixPath(file.as_posix())), file.read_bytes())
        except OSError:  # what one may not read is not there
            continue


def _language(path: PurePosixPath) -> str:
    """Of …/LANG/LC_MESSAGES/*.mo; empty for another place."""
    return path.parts[-3] if len(path.parts) >= 3 and path.parts[-2] == "LC_MESSAGES" else ""


def _catalogue(language: str, data: bytes) -> Iterator[Translation]:
    """One .mo file (GNU gettext): singulars, without their contexts. What is no such file, or not UTF-8, has none."""
    if not language:
        return
    for key, value in _entries(data):
        try:
            english, text = (part.split(b"\0")[0].decode() for part in (key.rpartition(b"\x04")[2], value))
        except UnicodeDecodeError:
            continue
        yield Translation(language, text.strip(), english.strip())


def _entries(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(message, translation), by the two tables of lengths and places that the head points to."""
    if len(data) < 20:
        return
    magic = struct.unpack_from("<I", data)[0]
    if magic not in (_MO, _MO_SWAPPED):
        return
    order = "<" if magic == _MO else ">"
    count, keys, values = struct.unpack_from(f"{order}3I", data, 8)
    for i in range(count):
        parts = []
        for table in (keys, values):
            if table + 8 * i + 8 > len(data):
                return
            length, place = struct.unpack_from(f"{order}2I", data, table + 8 * i)
            if place + length > len(data):
                return
            parts.append(data[place : place + length])
        yield parts[0], parts[1]
