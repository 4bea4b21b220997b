"""Safetensors files, read by memory map. Headers are checked whole before a byte of data is touched.

The library's own reader does not say which tensor is wrong, nor lets go of pages it has read; this one does both, so
that loading a model takes little more memory than the model.

    8 bytes     length N of the header, little-endian
    N bytes     JSON: {"name": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]}, …, "__metadata__": {…}}
    the rest    the tensors' bytes, row-major, in the order of their offsets
"""

import mmap
import os
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.quantized import Header
from manyhands.errors import CheckpointError
from manyhands.files import within
from manyhands.strict_json import parse_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_LIMIT = 16 << 20  # the format allows 100 MB, which as Python's objects would be gigabytes
_INDEX_LIMIT = 32 << 20  # Kimi K2.5's 207,000 tensors take 26 MB
_WIDE_LIMIT = 4 << 20  # text that is not ASCII takes up to four times its bytes
_MARKS_LIMIT = 3 << 17  # commas and brackets: 49,000 tensors in one file, 390,000 in an index
_NAME_LIMIT = 512
_MAP_NORESERVE = 0x4000  # Linux: a private map of a file larger than memory is not counted against it

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in one file."""

    file: str
    header: Header
    start: int
    """Offset in the file, bytes."""
    size: int
    """Bytes."""


class TensorFiles:
    """The tensors of a checkpoint directory: `model.safetensors`, or the shards that its index names.

    Raises `CheckpointError`, naming file and tensor, for anything that is missing, malformed or not inside.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stored: dict[str, Stored] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        """`__metadata__` of each file."""
        self._maps: dict[str, mmap.mmap] = {}
        weight_map = _weight_map(directory)
        if weight_map is None and not os.path.lexists(directory / SINGLE):
            raise _no_weights(directory)
        if weight_map is not None and SINGLE not in weight_map.values() and os.path.lexists(directory / SINGLE):
            raise CheckpointError(f"{directory}: holds both {SINGLE} and {INDEX}; remove the one that is not the model")
        self.name = directory / (SINGLE if weight_map is None else INDEX)
        """The file that answers for all."""
        for name in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
            self._add(name)
        if weight_map is not None:
            self._compare(weight_map)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TensorFiles":
        """Itself: a copy of a model reads the same files, which never change; its weights are tensors of its own."""
        return self

    @property
    def headers(self) -> dict[str, Header]:
        """Dtype and shape of every tensor."""
        return {name: stored.header for name, stored in self.stored.items()}

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


def read_header(path: Path, file: str = "") -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of one safetensors file, and its metadata. Checks that they fill it exactly, without overlap."""
    _inside(path)
    try:
        with open(path, "rb") as opened:
            length = os.fstat(opened.fileno()).st_size
            first = opened.read(8)
            if len(first) < 8:
                raise CheckpointError(f"{path}: not a safetensors file: it has {length} bytes")
            size = int.from_bytes(first, "little")
            if size > min(_HEADER_LIMIT, length - 8):
                kind = "a pickle, which can run any code and is not read" if _is_pickle(first) else "or truncated"
                raise CheckpointError(f"{path}: not a safetensors file, {kind}: a header of {size} bytes")
            data = opened.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    stored: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for name, entry in _parse(data, f"{path}: the header").items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
                raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
            metadata = entry
            continue
        stored[name] = _entry(path, file, name, entry, 8 + size)
    _check_offsets(path, stored, 8 + size, length)
    return stored, metadata


def _parse(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object that is a description: no name twice, or longer than names are, and not so much as to fill memory.

    `where` begins the message of an error.
    """

    wide = len(data) > _WIDE_LIMIT and (not data.isascii() or b"\\u" in data)
    if wide or sum(map(data.count, (b",", b"[", b"{"))) > _MARKS_LIMIT:
        raise CheckpointError(f"{where}: more values, or wider letters, than any model needs")
    values = parse_object(data, where, CheckpointError)
    _check_names(values, where)
    return values


def _check_names(value: Any, where: str) -> None:
    """Refuse a name longer than names are, at any depth."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if max(map(len, value), default=0) > _NAME_LIMIT:
                name = max(value, key=len)
                raise CheckpointError(f"{where}: {reprlib.repr(name)}: a name of {len(name)} characters")
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def _entry(path: Path, file: str, name: str, entry: Any, base: int) -> Stored:
    def bad(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {problem}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("the header must give dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"dtype {reprlib.repr(dtype)} is unknown; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise bad(f"shape {reprlib.repr(shape)} makes no sense")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n < 1 << 63 for n in offsets)
    ):
        raise bad(f"data_offsets {reprlib.repr(offsets)} make no sense")
    size = DTYPES[dtype].itemsize
    for n in shape:
        size *= n
    start, end = offsets
    if end - start != size:
        raise bad(f"{dtype} {shape} takes {size} bytes, data_offsets give it {end - start}")
    return Stored(file or path.name, Header(dtype, tuple(shape)), base + start, size)


def _check_offsets(path: Path, stored: Mapping[str, Stored], base: int, length: int) -> None:
    position, in_order = base, sorted(stored.items(), key=lambda item: (item[1].start, item[1].size))
    for name, s in in_order:
        if s.start + s.size > length:
            raise CheckpointError(
                f"{path}: tensor {name!r} ends at byte {s.start + s.size} of a file of {length}; truncated"
            )
    for name, s in in_order:
        if s.start != position:
            problem = "overlaps the tensor before it" if s.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name!r} {problem}")
        position = s.start + s.size
    if position != length:
        raise CheckpointError(f"{path}: {length - position} bytes after the last tensor; damaged")


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


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes."""
    _inside(path)
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too long for a description")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return _parse(data, str(path))


def _inside(path: Path) -> None:
    """Refuse a link that leads out of its directory."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise CheckpointError(f"{path}: {'does not exist' if missing else 'cannot be read'}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    if not within(path):
        raise CheckpointError(f"{path}: a symbolic link out of the checkpoint, which is not followed")


def _is_pickle(first: bytes) -> bool:
    """Whether a file begins as torch.save writes it (a zip), or as a bare pickle."""
    return first.startswith(b"PK\x03\x04") or (first[0] == 0x80 and 2 <= first[1] <= 5)


def _no_weights(directory: Path) -> CheckpointError:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return CheckpointError(f"{directory}: cannot be read: {error.strerror}")
    for name in names:
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
            return CheckpointError(
                f"{directory}: there is no {SINGLE}, and {name!r} is a pickle, which can run any code and is never "
                "read; save the model as safetensors where it comes from"
            )
    shard = next((name for name in names if name.endswith(".safetensors")), None)
    more = "" if shard is None else f", and no {INDEX} that says what is in {shard!r}"
    return CheckpointError(f"{directory / SINGLE}: does not exist{more}")
