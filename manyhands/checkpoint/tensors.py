"""Stored tensors by name, whatever file format they lie in: what every reader gives, and what everything else reads.

A dtype has one name here, in messages and in receipts, whichever way a format spells it. A stored tensor may have one
that torch has not (a block format): then `tensor` gives its bytes, and `logical` says how they are decoded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

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
"""What a weight may be, once decoded."""


@dataclass(frozen=True, slots=True)
class Header:
    """Dtype, by its name here, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in one file."""

    file: str
    """Its name in the directory."""
    header: Header
    start: int
    """Offset in the file, bytes."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Logical:
    """A tensor as the model's code names it, whatever it is stored as.

    `header` is the decoded tensor's; `parts` are the stored tensors it is made of. `decode(parts, out)` takes these in
    that order, as stored, and writes into `out`: any float dtype and strides, needing about 10 MB besides. It raises
    `CheckpointError` if a part that holds a shape holds another. None: the tensor is stored as it is.
    """

    header: Header
    parts: tuple[str, ...]
    decode: Callable[[Sequence[Tensor], Tensor], None] | None
    by_rows: bool = False
    """A stack [E, K, N] whose parts [E, N, …] may be cut as `out` is: by experts, and by its last dimension."""
    entry: Callable[[Sequence[Tensor], int, Tensor], None] | None = None
    """Of a stack [E, …]: `entry(parts, e, out)` decodes entry e alone into `out` […]. None: only all can be decoded."""


def cut(decode: Callable[[Sequence[Tensor], Tensor], None]) -> Callable[[Sequence[Tensor], int, Tensor], None]:
    """An `entry` for stacks whose parts are stacks too, in the same order."""

    def entry(parts: Sequence[Tensor], e: int, out: Tensor) -> None:
        decode([part[e : e + 1] for part in parts], out[None])

    return entry


class TensorSource(Protocol):
    """The tensors of one checkpoint. Opening it read and checked every header, and nothing else.

    Every error is a `CheckpointError` that names file and tensor.
    """

    @property
    def directory(self) -> Path:
        """Where the files are."""
        ...

    @property
    def name(self) -> Path:
        """The file that answers for all, in messages."""
        ...

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Every tensor, by name."""
        ...

    def logical(self) -> Mapping[str, Logical]:
        """Every tensor as it is once decoded, as far as the files themselves say how: `as_stored`, in most formats."""
        ...

    @property
    def metadata(self) -> Mapping[str, Mapping[str, str]]:
        """What each file says of itself."""
        ...

    def where(self, name: str) -> str:
        """`FILE: tensor 'NAME'`, as messages begin."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored, on the CPU; nothing of it needs to be read before it is used."""
        ...

    def release(self, name: str, before: int | None = None) -> None:
        """Let go of the memory a tensor was read into, or its first `before` entries along dimension 0.

        It can be read again; changes to it may be lost.
        """
        ...


def as_stored(headers: Mapping[str, Header]) -> dict[str, Logical]:
    """Tensors that are what the model's code names, each by itself."""
    return {name: Logical(header, (name,), None) for name, header in headers.items()}


def headers_of(source: TensorSource) -> dict[str, Header]:
    """Dtype and shape of every tensor."""
    return {name: stored.header for name, stored in source.stored.items()}
