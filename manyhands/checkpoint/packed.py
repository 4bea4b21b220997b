"""A quantised model as a directory of our own: packed records beside plain tensors, all of it mapped.

config.json         {"model_type": "manyhands", "version": 1, "model": {…}, "packed": {"version": 1, "experts":
                    {"format": "int4", "group_size": 32}, "linear": {"format": "int8", "group_size": 0}}}
model.safetensors   layers.3.mlp.experts.records        uint8 [E, record_bytes]
                    layers.3.self_attn.q_proj.record    uint8 [record_bytes]
                    …and, behind all records, the tensors that are not packed

The file's `__metadata__` repeats the section `packed`, since records of one format can be as long as those of another.
The file's header is padded with spaces so that the data begins on a 4096-byte page; a record is whole pages, so every
record begins on one, of the file and of its map. What a record holds follows from `config.json` alone.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyhands import strict_json
from manyhands.checkpoint.safetensors.shards import MAX_SHARD_SIZE, Value, write_shards
from manyhands.checkpoint.tensors import NAMES, Header, Stored, TensorSource
from manyhands.config import ModelConfig, PackedConfig
from manyhands.config.activation import GATED
from manyhands.config.shapes import Shape, tensor_shapes
from manyhands.errors import CheckpointError, ConfigError
from manyhands.families.manyhands import MANYHANDS
from manyhands.files import CONFIG
from manyhands.layers.packed_linear import RecordLinear
from manyhands.moe.packed import RecordExperts
from manyhands.quant import Layout, expert_layout, linear_layout
from manyhands.quant.panels import integers
from manyhands.quant.record import PAGE, PANEL
from manyhands.quant.rounding import SCALES

METADATA = "manyhands.packed"


@dataclass(frozen=True, slots=True)
class Record:
    """One uint8 tensor of the file and what it stands for."""

    name: str
    module: str
    """Where in the model it belongs."""
    layout: Layout
    num_experts: int | None
    """None: a linear layer."""
    sections: Mapping[str, str]
    """Our tensor -> the section of the record that holds it."""

    @property
    def shape(self) -> Shape:
        """Of the uint8 tensor."""
        size = self.layout.record_bytes
        return (size,) if self.num_experts is None else (self.num_experts, size)


def records_of(config: ModelConfig, packed: PackedConfig) -> Iterator[Record]:
    """Every record of a model, in its order. Raises `ConfigError` for sizes that no record has."""
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if packed.experts is not None and leaf == "down_proj" and module.endswith(".mlp.experts"):
            assert config.moe is not None
            E, D, F = shape
            activation, bias = config.moe.hidden_act, config.moe.expert_bias
            gated, p = activation in GATED, packed.experts
            layout = expert_layout(D, F, activation, p.format, p.group_size, gated=gated, bias=bias)
            up = f"{module}.{'gate_up_proj' if gated else 'up_proj'}"
            sections = {up: "up", name: "down"}
            if bias:
                sections |= {f"{up}_bias": "up_bias", f"{name}_bias": "down_bias"}
            yield Record(f"{module}.records", module, layout, E, sections)
        elif packed.linear is not None and leaf == "weight" and is_packable(name):
            bias, p = f"{module}.bias" in shapes, packed.linear
            outputs, inputs = shape
            layout = linear_layout(outputs, inputs, p.format, p.group_size, bias=bias)
            sections = {name: "weight"} | ({f"{module}.bias": "bias"} if bias else {})
            yield Record(f"{module}.record", module, layout, None, sections)


def is_packable(name: str) -> bool:
    """Whether our tensor is the weight of a linear layer that `packed.linear` speaks of."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return name == "lm_head.weight" or ("_proj" in module and module != "kv_b_proj")


def read_records(files: TensorSource, config: ModelConfig, packed: PackedConfig) -> dict[str, Record]:
    """The records of a checkpoint, each there, of the right dtype and size, and on a page; by name.

    Raises `CheckpointError` naming the tensor.
    """
    found = {}
    try:
        for record in records_of(config, packed):
            stored = files.stored.get(record.name)
            if stored is None:
                raise CheckpointError(f"{files.name}: tensor {record.name!r} is missing, which {CONFIG} calls for")
            _check(files, record, stored)
            found[record.name] = record
    except ConfigError as error:
        raise CheckpointError(f"{files.directory / CONFIG}: {error}") from None
    if not found:
        raise CheckpointError(f"{files.directory / CONFIG}: packed says that nothing is packed")
    _check_metadata(files, packed)
    for record in found.values():
        _check_bytes(files, record)
    return found


def _check_metadata(files: TensorSource, packed: PackedConfig) -> None:
    """Each file says itself what its records are; older ones do not."""
    for file, metadata in files.metadata.items():
        if METADATA not in metadata:
            continue
        try:
            written = PackedConfig.model_validate(strict_json.loads(metadata[METADATA]))
        except ValueError:
            raise CheckpointError(f"{files.directory / file}: __metadata__: {METADATA} cannot be read") from None
        for name in ("experts", "linear"):
            here, there = getattr(written, name), getattr(packed, name)
            if None not in (here, there) and here != there:
                raise CheckpointError(f"{files.directory / file}: {name} are packed as {here}; {CONFIG} says {there}")


def _check(files: TensorSource, record: Record, stored: Stored) -> None:
    where, layout = files.where(record.name), record.layout
    if stored.header.dtype != "U8":
        raise CheckpointError(f"{where} is {stored.header.dtype}; a packed record is U8")
    if stored.header.shape != record.shape:
        group = f" in groups of {layout.group_size}" if layout.group_size else ""
        raise CheckpointError(
            f"{where} has shape {list(stored.header.shape)}; {layout.format}{group}, as {CONFIG} says, takes "
            f"{list(record.shape)}"
        )
    if stored.start % PAGE:
        raise CheckpointError(f"{where} begins at byte {stored.start}, which is not on a {PAGE}-byte page")


def _check_bytes(files: TensorSource, record: Record) -> None:
    layout, where = record.layout, files.where(record.name)
    records = files.tensor(record.name)
    E = record.num_experts or 1
    some = {0, E // 2, E - 1}  # each costs a few pages of reading
    if all(_fits(records.view(E, -1)[e], layout) for e in some):
        return
    group = f" in groups of {layout.group_size}" if layout.group_size else ""
    raise CheckpointError(
        f"{where} holds bytes where {layout.format}{group}, as {CONFIG} says, has none: it was packed in another format"
    )


def _fits(record: Tensor, layout: Layout) -> bool:
    """Whether a record's bytes can be of a layout: none between sections, and no weight whose scale is zero.

    Of the weights the last panel is looked at, where records of another group size have no scales.
    """
    end = 0
    for start, size in sorted(layout.sections.values()):
        if bool(record[end:start].any()):
            return False
        end = start + size
    if bool(record[end:].any()):
        return False
    name, scales = ("down", "down_scales") if layout.kind == "experts" else ("weight", "scales")
    if scales not in layout.sections:
        return True
    matrix = layout.matrices[-1]
    last = replace(matrix, outputs=PANEL, parts=1)
    start, size = layout.sections[name]
    weights = record[start + size - last.weight_bytes : start + size]
    start, size = layout.sections[scales]
    units = record[start + size - last.scale_bytes : start + size]
    zero = units.view(SCALES[matrix.format]).view(-1, PANEL).T == 0  # [16, G]
    q = integers(weights, last).view(PANEL, matrix.groups, -1)
    return not bool((q.any(-1) & zero).any())


def hold_records(model: nn.Module, records: Mapping[str, Record], implementation: str) -> None:
    """Put record modules in the places of the layers that they stand for; their contents are still to be loaded.

    The one place where storage reaches into a network: everything else here is names, layouts and bytes.
    """
    for record in records.values():
        parent, _, leaf = record.module.rpartition(".")
        module: nn.Module
        if record.num_experts is None:
            module = RecordLinear(record.layout, implementation)
        else:
            module = RecordExperts(record.layout, record.num_experts, implementation)
        setattr(model.get_submodule(parent), leaf, module)


def write_packed(
    directory: Path,
    config: ModelConfig,
    packed: PackedConfig,
    dtype_of: Callable[[str], torch.dtype],
    value: Value,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Fill an existing directory; use it inside `building`. `value` is asked for every record in the order of the
    model, then for every tensor that is not packed; `dtype_of` says what the latter are."""
    headers = packed_headers(config, packed, dtype_of)
    fields: dict[str, Any] = {**MANYHANDS.write(config), "model_type": "manyhands", "packed": packed.model_dump()}
    (directory / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    write_shards(directory, headers, value, max_shard_size, align=PAGE, metadata={METADATA: packed.model_dump_json()})


def packed_headers(
    config: ModelConfig, packed: PackedConfig, dtype_of: Callable[[str], torch.dtype]
) -> dict[str, Header]:
    """Every tensor of the file, the records first. A record in between would not begin on a page."""
    records = list(records_of(config, packed))
    inside = {name for record in records for name in record.sections}
    headers = {record.name: Header("U8", record.shape) for record in records}
    assert all(math.prod(header.shape) % PAGE == 0 for header in headers.values())
    plain = {name: shape for name, shape in tensor_shapes(config).items() if name not in inside}
    return headers | {name: Header(NAMES[dtype_of(name)], shape) for name, shape in plain.items()}
