"""The header of a safetensors file, checked whole before a byte of data is touched.

8 bytes     length N of the header, little-endian
N bytes     JSON: {"name": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]}, …, "__metadata__": {…}}
the rest    the tensors' bytes, row-major, in the order of their offsets
"""

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhands.checkpoint.descriptions import check_inside, parse_description
from manyhands.checkpoint.tensors import DTYPES, Header, Stored
from manyhands.errors import CheckpointError

_LIMIT = 16 << 20  # the format allows 100 MB, which as Python's objects would be gigabytes
SPELLED = {name: name for name in DTYPES}
"""The format's name of a dtype, by ours: the same, for all that both have."""
_OURS = {theirs: ours for ours, theirs in SPELLED.items()}


def read_header(path: Path, file: str = "") -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of one safetensors file, and its metadata. Checks that they fill it exactly, without overlap."""
    check_inside(path)
    try:
        with open(path, "rb") as opened:
            length = os.fstat(opened.fileno()).st_size
            first = opened.read(8)
            if len(first) < 8:
                raise CheckpointError(f"{path}: not a safetensors file: it has {length} bytes")
            size = int.from_bytes(first, "little")
            if size > min(_LIMIT, length - 8):
                kind = "a pickle, which can run any code and is not read" if _is_pickle(first) else "or truncated"
                raise CheckpointError(f"{path}: not a safetensors file, {kind}: a header of {size} bytes")
            data = opened.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    stored: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for name, entry in parse_description(data, f"{path}: the header").items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
                raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
            metadata = entry
            continue
        stored[name] = _entry(path, file, name, entry, 8 + size)
    _check_offsets(path, stored, 8 + size, length)
    return stored, metadata


def _entry(path: Path, file: str, name: str, entry: Any, base: int) -> Stored:
    def bad(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {problem}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("the header must give dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _OURS:
        raise bad(f"dtype {reprlib.repr(dtype)} is unknown; known: {', '.join(_OURS)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise bad(f"shape {reprlib.repr(shape)} makes no sense")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n < 1 << 63 for n in offsets)
    ):
        raise bad(f"data_offsets {reprlib.repr(offsets)} make no sense")
    size = DTYPES[_OURS[dtype]].itemsize
    for n in shape:
        size *= n
    start, end = offsets
    if end - start != size:
        raise bad(f"{dtype} {shape} takes {size} bytes, data_offsets give it {end - start}")
    return Stored(file or path.name, Header(_OURS[dtype], tuple(shape)), base + start, size)


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


def _is_pickle(first: bytes) -> bool:
    """Whether a file begins as torch.save writes it (a zip), or as a bare pickle."""
    return first.startswith(b"PK\x03\x04") or (first[0] == 0x80 and 2 <= first[1] <= 5)
