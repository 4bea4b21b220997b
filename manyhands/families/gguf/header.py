"""The header of a GGUF file, checked whole before a byte of data is touched.

    4 bytes      "GGUF"
    uint32       version: 2 or 3, little-endian
    uint64 × 2   how many tensors, how many keys
    keys         name, type, value; a value may be an array of numbers or of strings
    tensors      name, rank, dimensions (the innermost first), type, offset from the start of the data
    padding      to `general.alignment` (32 if it is not given)
    data         the tensors in the order of the header, each padded to the alignment

A string is a uint64 and that many bytes of UTF-8. Every count and length is compared with the bytes that are left
before anything is made from it; one file costs at most some 150 MB. Source: `ggml/src/gguf.cpp` of llama.cpp.
"""

import math
import os
import reprlib
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from manyhands.errors import CheckpointError
from manyhands.families.gguf.types import TYPES, BlockType

_HEADER_LIMIT = 128 << 20  # bytes; a vocabulary of 260,000 with its tokenizer.json takes 50 MB
_MOST_KEYS, _MOST_TENSORS, _MOST_ITEMS = 1 << 14, 1 << 17, 1 << 21
_LONGEST_KEY, _LONGEST_NAME = 256, 63  # GGML_MAX_NAME has room for 63
_LARGEST = 1 << 48  # values in a tensor
_READ = 1 << 20
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY, _UINT32 = 7, 8, 9, 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it."""

    path: Path
    """The file it lies in."""
    type: BlockType
    shape: tuple[int, ...]
    """The outermost dimension first, as everywhere here; the file has it the other way round."""
    start: int
    """Offset in the file, bytes."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What one file says of itself."""

    path: Path
    metadata: Mapping[str, Any]
    """int, float, bool, str, or a list of one of them."""
    tensors: Mapping[str, TensorInfo]

    @property
    def arch(self) -> str:
        """`general.architecture`. Raises `CheckpointError` if it is missing."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path}: general.architecture is missing, or not a string")
        return value


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Read and check the header of one file. Raises `CheckpointError` naming the file and the key or tensor."""
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise CheckpointError(f"{str(path)!r}: cannot be read") from None


class _Reader:
    """Takes the header from the front of a file, a megabyte at a time."""

    def __init__(self, path: Path, file: BinaryIO, length: int) -> None:
        self.path, self.file, self.length = path, file, length
        self.buffer = b""
        self.base = 0
        """Offset of the buffer in the file."""
        self.at = 0
        """Where reading goes on, in the buffer."""
        self.items = 0
        """Of all arrays so far."""

    @property
    def position(self) -> int:
        return self.base + self.at

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")

    def need(self, count: int, what: str) -> None:
        """Have the next `count` bytes in the buffer."""
        if self.at + count <= len(self.buffer):
            return
        if count > self.length - self.position:
            raise self.error(f"truncated: {what} needs {count} bytes, {self.length - self.position} are left")
        if self.position + count > _HEADER_LIMIT:
            raise self.error(f"a header of more than {_HEADER_LIMIT >> 20} MB, at {what}; no model needs that")
        rest = self.buffer[self.at :]
        self.base, self.at = self.position, 0
        self.buffer = rest + self.file.read(max(count - len(rest), _READ))
        if len(self.buffer) < count:
            raise self.error("became shorter while it was read")

    def take(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.buffer, self.at)
        self.at += size
        return value

    def string(self, what: str, longest: int = _HEADER_LIMIT) -> str:
        size = self.take("Q", what)
        if size > longest:
            raise self.error(f"{what} is {size} bytes long; at most {longest} make sense")
        self.need(size, what)
        data = self.buffer[self.at : self.at + size]
        self.at += size
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def header(self) -> GgufHeader:
        if self.length < 24:
            raise self.error(f"not a GGUF file: it has {self.length} bytes")
        self.need(4, "the magic")
        magic, self.at = self.buffer[:4], 4
        if magic != b"GGUF":
            raise self.error(f"not a GGUF file: it begins with {magic!r}")
        version = self.take("I", "the version")
        if version not in (2, 3):
            if version & 0xFFFF == 0 and version:
                raise self.error("a big-endian GGUF file, which is not read; convert it with gguf_convert_endian.py")
            raise self.error(f"GGUF version {version}; 2 and 3 are read")
        tensors, keys = self.take("Q", "the number of tensors"), self.take("Q", "the number of keys")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise self.error(f"{tensors} tensors and {keys} keys; at most {_MOST_TENSORS} and {_MOST_KEYS} make sense")
        metadata: dict[str, Any] = {}
        for number in range(keys):
            key = self.name(f"the name of key {number}", _LONGEST_KEY)
            if key in metadata:
                raise self.error(f"key {key!r} is given twice")
            metadata[key] = self.value(key)
        infos = [self.info(number) for number in range(tensors)]
        return GgufHeader(self.path, metadata, self.placed(infos, self.alignment(metadata)))

    def name(self, what: str, longest: int) -> str:
        name = self.string(what, longest)
        if not name or not name.isprintable():
            raise self.error(f"{what} is {reprlib.repr(name)}, which is no name")
        return name

    def value(self, key: str) -> Any:
        where = f"key {key!r}"
        kind = self.take("I", where)
        if kind == _STRING:
            value: Any = self.string(where)
        elif kind == _ARRAY:
            value = self.array(where)
        elif kind in _NUMBERS:
            value = self.numbers(kind, 1, where)[0]
        else:
            raise self.error(f"{where} has the type {kind}, which GGUF does not have")
        if key == "general.alignment" and kind != _UINT32:
            raise self.error(f"{where} must be a uint32")
        return value

    def array(self, where: str) -> list[Any]:
        kind, count = self.take("I", where), self.take("Q", where)
        if kind == _ARRAY:
            raise self.error(f"{where} is an array of arrays, which GGUF does not have")
        if kind != _STRING and kind not in _NUMBERS:
            raise self.error(f"{where} is an array of the type {kind}, which GGUF does not have")
        least = 8 if kind == _STRING else struct.calcsize("<" + _NUMBERS[kind])
        if count * least > self.length - self.position:
            raise self.error(f"truncated: {where} has {count} entries; {self.length - self.position} bytes are left")
        self.items += count
        if self.items > _MOST_ITEMS:
            raise self.error(f"{where}: more than {_MOST_ITEMS} entries in arrays; no model needs that")
        if kind == _STRING:
            return [self.string(where) for _ in range(count)]
        return self.numbers(kind, count, where)

    def numbers(self, kind: int, count: int, where: str) -> list[Any]:
        code = "B" if kind == _BOOL else _NUMBERS[kind]
        form = f"<{count}{code}"
        size = struct.calcsize(form)
        self.need(size, where)
        values = list(struct.unpack_from(form, self.buffer, self.at))
        self.at += size
        if kind == _BOOL:
            if any(value > 1 for value in values):
                raise self.error(f"{where} holds a bool that is neither 0 nor 1")
            return [bool(value) for value in values]
        return values

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        assert isinstance(value, int)
        if value == 0 or value & (value - 1) or value > 1 << 20:
            raise self.error(f"general.alignment = {value}: expected a power of two, at most {1 << 20}")
        return value

    def info(self, number: int) -> tuple[str, BlockType, tuple[int, ...], int]:
        """Name, type, shape and offset of one tensor."""
        name = self.name(f"the name of tensor {number}", _LONGEST_NAME)
        where = f"tensor {name!r}"
        rank = self.take("I", where)
        if not 1 <= rank <= 4:
            raise self.error(f"{where} has {rank} dimensions; GGUF allows 1 to 4")
        dims = [self.take("Q", where) for _ in range(rank)]
        number_of_type, offset = self.take("I", where), self.take("Q", where)
        if any(n == 0 for n in dims) or any(n >= _LARGEST for n in dims) or math.prod(dims) >= _LARGEST:
            raise self.error(f"{where} has the dimensions {dims}, which make no sense")
        if number_of_type not in TYPES:
            raise self.error(f"{where} has the type {number_of_type}, which is not known")
        block = TYPES[number_of_type]
        if dims[0] % block.values:
            raise self.error(f"{where} has rows of {dims[0]}; {block.name} comes in blocks of {block.values}")
        return name, block, tuple(reversed(dims)), offset

    def placed(self, infos: list[tuple[str, BlockType, tuple[int, ...], int]], alignment: int) -> dict[str, TensorInfo]:
        """Every tensor with its place: one after another in the order of the header, none outside the file."""
        base = _padded(self.position, alignment)
        expected, end = 0, base
        found: dict[str, TensorInfo] = {}
        for name, block, shape, offset in infos:
            if name in found:
                raise self.error(f"tensor {name!r} is there twice")
            if offset != expected:
                raise self.error(
                    f"tensor {name!r} begins at {offset} of the data; {expected} is where the one before it ends"
                )
            size = math.prod(shape) // block.values * block.size
            end = base + offset + size
            if end > self.length:
                what = f"tensor {name!r} {list(shape)} {block.name}"
                raise self.error(f"truncated: {what} ends at byte {end}, the file at {self.length}")
            found[name] = TensorInfo(self.path, block, shape, base + offset, size)
            expected += _padded(size, alignment)
        if found and self.length > _padded(end, alignment):
            raise self.error(f"{self.length - end} bytes after the last tensor; damaged")
        return found


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
