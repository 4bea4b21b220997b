"""Packing without a sample: expert by expert, and a matrix by some rows at a time, whatever the model's size.

Nothing is run, so nothing of a layer is held: an expert's weights are read, packed, written, and their pages let go.
The files are the same, byte for byte, as those of `layers.py` without calibration.

E experts, N outputs, K inputs.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from manyhands.checkpoint.assemble import is_whole, our_tensor, stored_dtype
from manyhands.checkpoint.experts import ExpertReader
from manyhands.checkpoint.packed import Record, records_of
from manyhands.checkpoint.source import Source
from manyhands.config import PackedConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import CheckpointError, ConfigError
from manyhands.kernels import ExpertWeights
from manyhands.quant import pack_experts
from manyhands.quant.packed import pack_bias
from manyhands.quant.panels import encode
from manyhands.quant.record import PANEL
from manyhands.quantize.figures import Figures, expert_error, relative, rounding_error
from manyhands.quantize.layers import CPU, Progress, kept_dtype

CHUNK_VALUES = 1 << 24
"""Weights of a matrix that are in hand at a time."""


class StreamQuantizer:
    """Gives the packed checkpoint's tensors in the order in which they are written, each in parts."""

    def __init__(self, source: Source, packed: PackedConfig, progress: Progress | None) -> None:
        self.source, self.progress = source, progress
        self.records = {record.name: record for record in records_of(source.decoder("packing"), packed)}
        self.shapes = tensor_shapes(source.config)
        self.figures = Figures()
        self._packed_count = 0

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor that is not packed."""
        return kept_dtype(self.source, name)

    def value(self, name: str) -> Iterator[Tensor]:
        """A tensor of the new file, in parts along its first dimension, or as bytes that follow one another."""
        record = self.records.get(name)
        if record is None:
            yield from self._rows(name, self.dtype_of(name))
            return
        try:
            yield from self._linear(record) if record.num_experts is None else self._experts(record)
        except ConfigError as error:
            raise CheckpointError(f"{self.source.path}: {next(iter(record.sections))}: {error}") from None
        self._packed_count += 1
        if self.progress is not None:
            self.progress(name, self._packed_count, len(self.records))

    def _experts(self, record: Record) -> Iterator[Tensor]:
        layout, ours = record.layout, {section: name for name, section in record.sections.items()}
        assert record.num_experts is not None and layout.activation is not None
        readers = {section: ExpertReader(self.source, name, self.shapes[name]) for section, name in ours.items()}
        squares = torch.zeros(2, 2, dtype=torch.float64)
        for e in range(record.num_experts):
            weights = {section: reader.read(e)[None] for section, reader in readers.items()}
            up_bias, down_bias = weights.get("up_bias"), weights.get("down_bias")
            one = ExpertWeights(weights["up"], weights["down"], up_bias, down_bias, layout.activation)
            try:
                packed = pack_experts(one, layout.format, layout.group_size or 32)
            except ConfigError as error:
                bad = (ours[section] for section, w in weights.items() if not bool(torch.isfinite(w).all()))
                name = next(bad, next(iter(record.sections)))
                raise CheckpointError(f"{self.source.path}: {name}: {error}") from None
            squares += expert_error(packed, 0, one.up[0], one.down[0])
            yield packed.records
            del weights, one, packed
            for reader in readers.values():
                reader.release(e)
        self.figures.relative_error[ours["up"]] = relative(squares[0])
        self.figures.relative_error[ours["down"]] = relative(squares[1])

    def _linear(self, record: Record) -> Iterator[Tensor]:
        """Panels as they are packed, then their scales, then the bias: the order of the sections in a record."""
        layout, ours = record.layout, {section: name for name, section in record.sections.items()}
        (matrix,) = layout.matrices
        content: dict[str, list[Tensor]] = {"scales": [], "bias": []}
        squares = torch.zeros(2, dtype=torch.float64)
        written = 0
        rows = max(1, CHUNK_VALUES // (PANEL * matrix.depth)) * PANEL
        for w_NK in self._rows(ours["weight"], None, rows):
            part = replace(matrix, outputs=len(w_NK))
            values, scales = encode(w_NK, part)
            squares += rounding_error(w_NK, values, scales, part)
            if scales is not None:
                content["scales"].append(scales)
            written += len(values)
            yield values
        if "bias" in ours:
            bias = our_tensor(self.source, ours["bias"], self.shapes[ours["bias"]], None, CPU)
            content["bias"].append(pack_bias(bias, matrix))
        for name, (start, _) in list(layout.sections.items())[1:]:
            yield torch.zeros(start - written, dtype=torch.uint8)
            written = start
            for part_bytes in content[name]:
                yield part_bytes
                written += len(part_bytes)
        yield torch.zeros(layout.record_bytes - written, dtype=torch.uint8)
        self.figures.relative_error[ours["weight"]] = relative(squares)

    def _rows(self, name: str, dtype: torch.dtype | None, rows: int | None = None) -> Iterator[Tensor]:
        """One of our tensors, some rows at a time; pages are let go behind them where it lies in a file."""
        shape = self.shapes[name]
        tensor = our_tensor(self.source, name, shape, dtype, CPU)
        if not shape or tensor.numel() <= CHUNK_VALUES:
            yield tensor
            return
        (stored, *_) = self.source.pieces[name]
        as_stored = tensor.dtype == stored_dtype(self.source, name)
        mapped = as_stored and is_whole(self.source, name) and not stored.theirs_index
        rows = rows or max(1, CHUNK_VALUES * shape[0] // tensor.numel())
        for start in range(0, shape[0], rows):
            yield tensor[start : start + rows]
            if mapped:
                (part,) = self.source.logical[stored.theirs].parts
                self.source.files.release(part, before=min(start + rows, shape[0]))
