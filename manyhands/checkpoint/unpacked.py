"""What packed records stand for: a model's tensors, each decoded when it is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from manyhands.checkpoint.packed import Record
from manyhands.checkpoint.tensors import DTYPES, Header, Logical
from manyhands.config.shapes import Shape
from manyhands.errors import CheckpointError
from manyhands.quant import Layout
from manyhands.quant.packed import unpack_bias
from manyhands.quant.panels import decode


def packed_tensors(stored: Mapping[str, Header], records: Mapping[str, Record], where: str = "") -> dict[str, Logical]:
    """The tensors of a packed checkpoint as they are after decoding, by our names: exact, so float32 or bfloat16.

    `where` begins the message of an error.
    """
    found = {name: Logical(header, (name,), None) for name, header in stored.items() if name not in records}
    for record in records.values():
        for name, (section, shape) in _tensors(record).items():
            if name in found:
                raise CheckpointError(f"{where}: tensor {name!r} is stored twice: as it is, and in {record.name!r}")
            dtype = "BF16" if record.layout.format == "bf16" and not section.endswith("bias") else "F32"
            unpack = partial(_unpack, layout=record.layout, section=section)
            found[name] = Logical(Header(dtype, shape), (record.name,), unpack)
    return found


def _tensors(record: Record) -> dict[str, tuple[str, Shape]]:
    """Our tensor -> its section and shape."""
    lead: Shape = () if record.num_experts is None else (record.num_experts,)
    found: dict[str, tuple[str, Shape]] = {}
    for name, section in record.sections.items():
        m = record.layout.matrices[1 if section.startswith("down") else 0]
        rows = m.parts * m.outputs
        found[name] = (section, (*lead, rows) if section.endswith("bias") else (*lead, rows, m.inputs))
    return found


def _unpack(parts: Sequence[Tensor], out: Tensor, *, layout: Layout, section: str) -> None:
    """One section of a record, or of each record of a stack."""
    (records,) = parts
    matrix = layout.matrices[1 if section.startswith("down") else 0]
    scales = "scales" if section == "weight" else f"{section}_scales"
    for record, target in zip(*((records[None], out[None]) if records.ndim == 1 else (records, out)), strict=True):
        content = {name: record[start : start + size] for name, (start, size) in layout.sections.items()}
        if section.endswith("bias"):
            target.copy_(unpack_bias(content[section], matrix))
        else:
            target.copy_(decode(content[section], content.get(scales), matrix))


class Unpacked(Mapping[str, Tensor]):
    """A model's tensors by our names, from its state; one that lies in a record is decoded when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor], records: Mapping[str, Record]) -> None:
        self._state, self._records = state, records
        self._logical = packed_tensors({}, records)
        self._last: tuple[str, Tensor] | None = None
        self._names = [name for name in state if name not in records] + list(self._logical)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._logical:
            return self._state[name]
        if self._last is None or self._last[0] != name:  # kept: a family asks for it expert by expert
            self._last = None
            logical = self._logical[name]
            assert logical.decode is not None
            out = torch.empty(logical.header.shape, dtype=DTYPES[logical.header.dtype])
            logical.decode([self._state[part].cpu() for part in logical.parts], out)
            self._last = (name, out)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
