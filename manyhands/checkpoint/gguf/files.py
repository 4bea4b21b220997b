"""The tensors of a GGUF file, or of the series `NAME-00001-of-0000N.gguf`, read by memory map."""

import mmap
import re
from pathlib import Path

import torch
from torch import Tensor

from manyhands.checkpoint.tensors import DTYPES, Header, Logical, Stored, as_stored, headers_of
from manyhands.config.base import short_repr
from manyhands.errors import CheckpointError
from manyhands.families.gguf import GgufHeader, TensorInfo, read_gguf_header

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_FILES = 1000
_MAP_NORESERVE = 0x4000  # Linux: a private map of a file larger than memory is not counted against it


class GgufFiles:
    """A `TensorSource`. What the tensors stand for, `logical.py` says.

    `tensor` gives a tensor in a number format of GGML's as its bytes, uint8 [..., bytes of a row].
    Raises `CheckpointError`, naming file and tensor, for anything that is missing, malformed or not inside.
    """

    def __init__(self, path: Path) -> None:
        self.name = path
        self.directory = path.parent
        self.header, parts = _series(path)
        """Of the first file, with the tensors of all of them."""
        self.stored: dict[str, Stored] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.stored:
                    raise CheckpointError(f"{part.path}: tensor {name!r} is also in {self.stored[name].file}")
                self.stored[name] = Stored(part.path.name, Header(info.type.name, info.shape), info.start, info.size)
        if not self.stored:
            raise CheckpointError(f"{path}: holds no tensors")
        self.metadata: dict[str, dict[str, str]] = {part.path.name: {} for part in parts}
        self._maps: dict[str, mmap.mmap] = {}

    def logical(self) -> dict[str, Logical]:
        """As they are stored."""
        return as_stored(headers_of(self))

    def where(self, name: str) -> str:
        """`FILE: tensor 'NAME'`, as errors begin."""
        return f"{self.directory / self.stored[name].file}: tensor {name!r}"

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped: nothing is read until it is used; a change is never written back."""
        stored = self.stored[name]
        *rows, _ = stored.header.shape
        raw = torch.frombuffer(self._map(stored.file), dtype=torch.uint8, count=stored.size, offset=stored.start)
        if stored.header.dtype in DTYPES:
            return raw.view(DTYPES[stored.header.dtype]).view(stored.header.shape)
        return raw.view(*rows, -1)

    def release(self, name: str, before: int | None = None) -> None:
        """Let go of the pages that a tensor occupied, or its first `before` entries along dimension 0."""
        stored = self.stored[name]
        size = stored.size if before is None else stored.size * before // stored.header.shape[0]
        if size:
            start = stored.start - stored.start % mmap.PAGESIZE
            self._map(stored.file).madvise(mmap.MADV_DONTNEED, start, stored.start + size - start)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            needed = max(stored.start + stored.size for stored in self.stored.values() if stored.file == file)
            try:
                with open(self.directory / file, "rb") as opened:
                    self._maps[file] = mmap.mmap(opened.fileno(), 0, flags=flags, prot=protection)
            except (OSError, ValueError) as error:  # no address space for it, or it was changed since it was checked
                raise CheckpointError(f"{self.directory / file}: cannot be mapped: {error}") from None
            if len(self._maps[file]) < needed:
                raise CheckpointError(f"{self.directory / file}: became shorter since it was checked")
        return self._maps[file]


def _series(path: Path) -> tuple[GgufHeader, list[GgufHeader]]:
    """The header of `path` with the tensors of all files of its series, and each file's own."""
    first = read_gguf_header(path)
    count, number = (first.metadata.get(f"split.{key}", usual) for key, usual in (("count", 1), ("no", 0)))
    if type(count) is not int or type(number) is not int or not 0 <= number < max(count, 1) <= _MOST_FILES:
        raise CheckpointError(
            f"{path}: split.no = {short_repr(number)} of split.count = {short_repr(count)} makes no sense"
        )
    if count <= 1:
        return first, [first]
    match = _SPLIT.fullmatch(path.name)
    if match is None or (int(match["number"]), int(match["count"])) != (number + 1, count):
        expected = f"…-{number + 1:05}-of-{count:05}.gguf"
        raise CheckpointError(f"{path}: file {number + 1} of {count}; expected the name {expected}")
    names = [f"{match['stem']}-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    if number:
        raise CheckpointError(f"{path}: file {number + 1} of {count}; give the first one, {names[0]}")
    parts = [first]
    for n, name in enumerate(names[1:], 1):
        part = read_gguf_header(path.parent / name)
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (n, count):
            raise CheckpointError(f"{part.path}: does not say that it is file {n + 1} of {count}")
        parts.append(part)
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        tensors |= part.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{path}: split.tensors.count = {short_repr(total)}; the {count} files hold {len(tensors)}"
        )
    return GgufHeader(path, first.metadata, tensors), parts


def is_gguf(path: str | Path) -> bool:
    """Whether `path` names a GGUF file, by its ending."""
    return str(path).endswith(".gguf") and not Path(path).is_dir()


def gguf_in(directory: Path) -> Path | None:
    """The model in GGUF that a directory holds instead of a checkpoint; None if there is none.

    Raises `CheckpointError` if there are several.
    """
    if not directory.is_dir():
        return None
    names = sorted(path.name for path in directory.glob("*.gguf"))
    firsts = [name for name in names if (match := _SPLIT.fullmatch(name)) is None or int(match["number"]) == 1]
    if len(firsts) > 1:
        raise CheckpointError(
            f"{directory}: holds {len(firsts)} models in GGUF; name one of them, as {firsts[0][:80]!r}"
        )
    return directory / firsts[0] if firsts else None
