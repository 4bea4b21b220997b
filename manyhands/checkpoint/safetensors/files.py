"""A directory of safetensors, read by memory map.

The library's own reader does not say which tensor is wrong, nor lets go of pages it has read; this one does both, so
that loading a model takes little more memory than the model. A map lives as long as a tensor that was taken from it.
"""

import mmap
import os
import reprlib
from pathlib import Path

import torch
from torch import Tensor

from manyhands.checkpoint.descriptions import read_json
from manyhands.checkpoint.safetensors.header import read_header
from manyhands.checkpoint.tensors import DTYPES, Logical, Stored, as_stored, headers_of
from manyhands.errors import CheckpointError
from manyhands.files import INDEX, WEIGHTS

_INDEX_LIMIT = 32 << 20  # Kimi K2.5's 207,000 tensors take 26 MB
_MAP_NORESERVE = 0x4000  # Linux: a private map of a file larger than memory is not counted against it


class TensorFiles:
    """A `TensorSource`: the tensors of `model.safetensors`, or of the shards that an index names.

    Raises `CheckpointError`, naming file and tensor, for anything that is missing, malformed or not inside.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stored: dict[str, Stored] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        """`__metadata__` of each file."""
        self._maps: dict[str, mmap.mmap] = {}
        weight_map = _weight_map(directory)
        if weight_map is None and not os.path.lexists(directory / WEIGHTS):
            raise _no_weights(directory)
        if weight_map is not None and WEIGHTS not in weight_map.values() and os.path.lexists(directory / WEIGHTS):
            raise CheckpointError(
                f"{directory}: holds both {WEIGHTS} and {INDEX}; remove the one that is not the model"
            )
        self.name = directory / (WEIGHTS if weight_map is None else INDEX)
        """The file that answers for all."""
        names = [WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
        if missing := [name for name in names if not os.path.lexists(directory / name)]:
            raise CheckpointError(
                f"{directory / missing[0]}: does not exist; {len(missing)} of the {len(names)} files with the weights "
                "are missing; fetch the rest of the model, or all of it again"
            )
        for name in names:
            self._add(name)
        if weight_map is not None:
            self._compare(weight_map)

    def logical(self) -> dict[str, Logical]:
        """Each as it is stored: what is quantised, a `config.json` says."""
        return as_stored(headers_of(self))

    def where(self, name: str) -> str:
        """`FILE: tensor 'NAME'`, as errors begin."""
        return f"{self.directory / self.stored[name].file}: tensor {name!r}"

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped: nothing is read until it is used; a change is never written back."""
        stored = self.stored[name]
        dtype = DTYPES[stored.header.dtype]
        if not stored.size:
            return torch.empty(stored.header.shape, dtype=dtype)
        raw = torch.frombuffer(self._map(stored.file), dtype=torch.uint8, count=stored.size, offset=stored.start)
        return raw.view(dtype).view(stored.header.shape)

    def release(self, name: str, before: int | None = None) -> None:
        """Let go of the pages that a tensor occupied, or its first `before` entries along dimension 0.

        Its values can be read again; changes to it are lost.
        """
        stored = self.stored[name]
        size = stored.size if before is None else stored.size * before // stored.header.shape[0]
        if size:
            start = stored.start - stored.start % mmap.PAGESIZE
            self._map(stored.file).madvise(mmap.MADV_DONTNEED, start, stored.start + size - start)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            try:
                with open(self.directory / file, "rb") as opened:
                    self._maps[file] = mmap.mmap(opened.fileno(), 0, flags=flags, prot=protection)
            except (OSError, ValueError) as error:  # no address space for it, or it was changed since it was checked
                raise CheckpointError(f"{self.directory / file}: cannot be mapped: {error}") from None
        return self._maps[file]

    def _add(self, file: str) -> None:
        path = self.directory / file
        stored_here, self.metadata[file] = read_header(path, file)
        for name, stored in stored_here.items():
            if name in self.stored:
                raise CheckpointError(f"{path}: tensor {name!r} is also in {self.stored[name].file}")
            self.stored[name] = stored

    def _compare(self, weight_map: dict[str, str]) -> None:
        index = self.directory / INDEX
        for name, file in weight_map.items():
            if name not in self.stored or self.stored[name].file != file:
                raise CheckpointError(f"{index}: tensor {name!r} is not in {file!r}")
        if extra := self.stored.keys() - weight_map.keys():
            name = min(extra)
            raise CheckpointError(f"{self.where(name)} is not in {INDEX}")


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor -> file, from the index; None where there is only one file."""
    path = directory / INDEX
    if not os.path.lexists(path):
        return None
    values = read_json(path, _INDEX_LIMIT)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' is missing or is not an object")
    for name, file in weight_map.items():
        named = isinstance(file, str) and file.endswith(".safetensors") and file.isprintable() and len(file) < 256
        if not named or file != os.path.basename(file):
            raise CheckpointError(
                f"{path}: tensor {name!r} is said to be in {reprlib.repr(file)}; expected the name of a .safetensors "
                "file beside the index"
            )
    return weight_map


def _no_weights(directory: Path) -> CheckpointError:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return CheckpointError(f"{directory}: cannot be read: {error.strerror}")
    for name in names:
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
            return CheckpointError(
                f"{directory}: there is no {WEIGHTS}, and {name!r} is a pickle, which can run any code and is never "
                "read; save the model as safetensors where it comes from"
            )
    shard = next((name for name in names if name.endswith(".safetensors")), None)
    more = "" if shard is None else f", and no {INDEX} that says what is in {shard!r}"
    return CheckpointError(f"{directory / WEIGHTS}: does not exist{more}")
