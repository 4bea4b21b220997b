"""A checkpoint as its family describes it: which stored tensor becomes which part of which of ours.

Everything is decided from `config.json` and the tensors' headers: what is missing, left over, of the wrong shape or
dtype is an error before any weight is read or any memory is allocated.
"""

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from manyhands.checkpoint.packed import Record, packed_tensors, read_records
from manyhands.checkpoint.quantized import Header, Logical, logical_tensors
from manyhands.checkpoint.safetensors.files import DTYPES, FLOATS, TensorFiles, read_json
from manyhands.config import ModelConfig, PackedConfig
from manyhands.config.shapes import Shape, tensor_shapes
from manyhands.errors import CheckpointError, ConfigError
from manyhands.families import Family, Piece, UnknownField, read_config, text_fields
from manyhands.families.base import Index, Json
from manyhands.families.manyhands import packed_section

CONFIG = "config.json"
_CONFIG_LIMIT = 1 << 20
_log = logging.getLogger(__name__)
_TIED = ("lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight")


@dataclass(frozen=True, slots=True)
class Source:
    """An opened checkpoint directory. Nothing of its weights has been read."""

    directory: Path
    family: Family
    values: Json
    """`config.json` as it stands."""
    config: ModelConfig
    files: TensorFiles
    logical: Mapping[str, Logical]
    """The tensors by the names the family uses, whatever they are stored as."""
    pieces: Mapping[str, list[Piece]]
    """Our tensor -> the pieces it is made of."""
    kept: tuple[str, ...]
    """Logical tensors that the model does not compute with and a round trip keeps."""
    dropped: tuple[str, ...]
    """Logical tensors that are recomputed, or stored twice."""
    packed: PackedConfig | None = None
    """Of a quantised model of our own."""
    records: Mapping[str, Record] = field(default_factory=dict)
    """Its records, by their names in the files; `logical` has what they stand for."""
    ignored: tuple[str, ...] = ()
    """The unknown fields of `config.json` that were read past, as asked."""

    def value(self, theirs: str, out: Tensor | None = None) -> Tensor:
        """A logical tensor: mapped as it is stored, or decoded (into `out` if given)."""
        logical = self.logical[theirs]
        parts = [self.files.tensor(part) for part in logical.parts]
        if logical.decode is None:
            return parts[0]
        if out is None:
            out = parts[0].new_empty(logical.header.shape, dtype=DTYPES[logical.header.dtype])
        logical.decode(parts, out)
        return out

    def release(self, theirs: str) -> None:
        """Let go of the pages a logical tensor was read from."""
        for part in self.logical[theirs].parts:
            self.files.release(part)


def open_source(directory: str | Path, ignore_fields: Collection[str] = ()) -> Source:
    """Read `config.json` and every header of a checkpoint directory, and match them.

    `ignore_fields` names unknown fields of `config.json` to read past; which they were is logged in a line.
    Raises `CheckpointError` naming the file and the field or tensor that is wrong.
    """
    directory = Path(directory)
    path = directory / CONFIG
    values = read_json(path, _CONFIG_LIMIT)
    try:
        family, config = read_config(values, str(path), ignore_fields)
    except UnknownField as error:
        flag = error.name if error.name.isprintable() else repr(error.name)
        remedy = f"if it changes nothing: --ignore-field {flag}, in Python ignore_fields=[{error.name!r}]"
        raise CheckpointError(f"{error}; {remedy}") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except RecursionError:  # lists in lists, which are compared or shown
        raise CheckpointError(f"{path}: too deeply nested") from None
    ignored = tuple(sorted(set(ignore_fields)))
    if ignored:
        _log.warning("%s: ignored, as asked: %s", path, ", ".join(ignored))
    files = TensorFiles(directory)
    text = text_fields(family, values)
    quantization = text.get("quantization_config") or values.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config: expected an object")
    packed = packed_section(values) if family.model_type == "manyhands" else None
    records: dict[str, Record] = {}
    if packed is None:
        logical = logical_tensors(files.headers, quantization, str(path))
    else:
        records = read_records(files, config, packed)
        logical = packed_tensors(files.headers, records, str(files.name))
    float32 = family.saved_float32 if family.model_type == "manyhands" else ()
    pieces = _match(files, family.pieces(config), tensor_shapes(config), logical, float32)
    used = {piece.theirs for of_one in pieces.values() for piece in of_one}
    kept_prefixes, kept, dropped = family.kept(text), [], []
    for name in logical:
        if name in used:
            continue
        if kept_prefixes and name.startswith(kept_prefixes):
            kept.append(name)
        elif name.endswith(family.dropped) or (config.tie_word_embeddings and name in _TIED):
            dropped.append(name)
        else:
            raise CheckpointError(
                f"{files.where(logical[name].parts[0])} is not one of this model's, as {CONFIG} describes it"
            )
    return Source(
        directory,
        family,
        values,
        config,
        files,
        logical,
        pieces,
        tuple(kept),
        tuple(dropped),
        packed,
        records,
        ignored,
    )


def _match(
    files: TensorFiles,
    pieces: Iterable[Piece],
    shapes: Mapping[str, Shape],
    logical: Mapping[str, Logical],
    float32: tuple[str, ...],
) -> dict[str, list[Piece]]:
    """Pieces by our name, each checked. Stops at the first that is missing: a hostile config may name millions."""
    found: dict[str, list[Piece]] = {name: [] for name in shapes}
    covered = dict.fromkeys(logical, 0)
    for piece in pieces:
        stored = logical.get(piece.theirs)
        if stored is None:
            raise CheckpointError(f"{files.name}: tensor {piece.theirs!r} is missing, which {CONFIG} calls for")
        where = files.where(stored.parts[0])
        allowed = ("F32",) if float32 and piece.ours.endswith(float32) else FLOATS
        if stored.header.dtype not in allowed:
            raise CheckpointError(f"{where} is {stored.header.dtype}; expected {' or '.join(allowed)}")
        theirs = indexed_shape(stored.header.shape, piece.theirs_index)
        if theirs is not None and piece.transpose:
            theirs = (*theirs[:-2], theirs[-1], theirs[-2])
        ours = indexed_shape(shapes[piece.ours], piece.ours_index)
        assert ours is not None, piece
        if theirs != ours:
            shape, part = list(stored.header.shape), "" if not piece.theirs_index else " for a part of it"
            right = list(ours if not piece.transpose else (*ours[:-2], ours[-1], ours[-2]))
            raise CheckpointError(f"{where} has shape {shape}; {CONFIG} says {right}{part}")
        found[piece.ours].append(piece)
        covered[piece.theirs] += math.prod(ours)
    for name, of_one in found.items():
        whole = sum(math.prod(indexed_shape(shapes[name], piece.ours_index) or ()) for piece in of_one)
        assert whole == math.prod(shapes[name]), f"the family's pieces do not make up {name}"
    for name, count in covered.items():
        if count and count != math.prod(logical[name].header.shape):
            shape = list(logical[name].header.shape)
            raise CheckpointError(f"{files.where(logical[name].parts[0])} has shape {shape}; {CONFIG} uses part of it")
    return found


def indexed_shape(shape: Shape, index: Index) -> Shape | None:
    """The shape of `tensor[index]`; None where the index does not fit."""
    if len(index) > len(shape):
        return None
    result: list[int] = []
    for n, i in zip(shape, index, strict=False):
        if isinstance(i, slice):
            if i.stop is not None and i.stop > n:
                return None
            result.append(len(range(*i.indices(n))))
        elif i >= n:
            return None
    return (*result, *shape[len(index) :])


def header_of(piece_shapes: Mapping[str, Shape], pieces: Iterable[Piece], dtype: str) -> Header:
    """The header of one of their tensors, from all the pieces of ours that it holds."""
    extents: list[int] = []
    for piece in pieces:
        ours = indexed_shape(piece_shapes[piece.ours], piece.ours_index)
        assert ours is not None
        left = list((*ours[:-2], ours[-1], ours[-2]) if piece.transpose else ours)
        own: list[int] = []
        for i in piece.theirs_index:
            if isinstance(i, slice):
                own.append((i.start or 0) + (i.step or 1) * (left.pop(0) - 1) + 1)
            else:
                own.append(i + 1)
        own += left
        extents = [max(a, b) for a, b in zip(extents, own, strict=True)] if extents else own
    return Header(dtype, tuple(extents))
