"""The tensors of a GGUF file, or of the series `NAME-00001-of-0000N.gguf`, read by memory map."""

import mmap
from pathlib import Path

import torch
from torch import Tensor

from manyhands.checkpoint.tensors import DTYPES, Header, Logical, Stored, as_stored, headers_of
from manyhands.errors import CheckpointError
from manyhands.families.gguf.series import gguf_in, is_gguf, read_series

_MAP_NORESERVE = 0x4000  # Linux: a private map of a file larger than memory is not counted against it


class GgufFiles:
    """A `TensorSource`. What the tensors stand for, `logical.py` says.

    `tensor` gives a tensor in a number format of GGML's as its bytes, uint8 [..., bytes of a row].
    Raises `CheckpointError`, naming file and tensor, for anything that is missing, malformed or not inside.
    """

    def __init__(self, path: Path) -> None:
        self.name = path
        self.directory = path.parent
        self.header, parts = read_series(path)
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


__all__ = ["GgufFiles", "gguf_in", "is_gguf"]
