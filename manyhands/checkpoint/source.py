"""A checkpoint as its family describes it: which stored tensor becomes which part of which of ours.

Everything is decided from `config.json` and the tensors' headers: what is missing, left over, of the wrong shape or
dtype is an error before any weight is read or any memory is allocated.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from manyhands.checkpoint.descriptions import read_json
from manyhands.checkpoint.match import match
from manyhands.checkpoint.origin import Origin, stamp
from manyhands.checkpoint.packed import Record, read_records
from manyhands.checkpoint.quantized import logical_tensors
from manyhands.checkpoint.safetensors.files import TensorFiles
from manyhands.checkpoint.tensors import DTYPES, Logical, TensorSource, headers_of
from manyhands.checkpoint.unpacked import packed_tensors
from manyhands.config import BuiltConfig, ModelConfig, PackedConfig
from manyhands.config.decoder import as_decoder
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import CheckpointError, ConfigError
from manyhands.families import Family, Piece, UnknownField, read_config, text_fields
from manyhands.families.base import Json
from manyhands.families.manyhands import packed_section
from manyhands.files import CONFIG

_CONFIG_LIMIT = 1 << 20
_log = logging.getLogger(__name__)
_TIED = ("lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight")


@dataclass(frozen=True, slots=True)
class Source:
    """An opened checkpoint. Nothing of its weights has been read. It keeps its files open: it is not to be kept."""

    directory: Path
    family: Family
    values: Json
    """`config.json` as it stands."""
    config: BuiltConfig
    files: TensorSource
    open_files: Callable[[], TensorSource]
    """What opened `files`."""
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
    file: Path | None = None
    """The one file that is the whole checkpoint (GGUF), if it is one."""

    @property
    def path(self) -> Path:
        """What was opened: a directory, or a file."""
        return self.file or self.directory

    def decoder(self, what: str) -> ModelConfig:
        """Its description, for `what` is done with decoders alone (packing). Raises `ConfigError` for another kind."""
        return as_decoder(self.config, what)

    @property
    def origin(self) -> Origin:
        """What outlives it."""
        embedding = self.pieces["embed_tokens.weight"][0].theirs
        files = (CONFIG, self.files.name.name, *(stored.file for stored in self.files.stored.values()))
        return Origin(
            directory=self.directory,
            path=self.path,
            family=self.family,
            values=self.values,
            kept=self.kept,
            dtypes={name: logical.header.dtype for name, logical in self.logical.items()},
            main_dtype=self.logical[embedding].header.dtype,
            packed=self.packed,
            records=self.records,
            ignored=self.ignored,
            open_files=self.open_files,
            stamps={file: stamp(self.directory / file) for file in dict.fromkeys(files)},
        )

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
    values = read_json(directory / CONFIG, _CONFIG_LIMIT)
    source = source_of(values, directory / CONFIG, partial(TensorFiles, directory), ignore_fields)
    if source.ignored:
        _log.warning("%s: ignored, as asked: %s", directory / CONFIG, ", ".join(source.ignored))
    return source


def reopen(origin: Origin) -> Source:
    """What a model came from, once more. Raises `CheckpointError` if a file has gone or is not what it was."""
    if lost := origin.lost():
        raise CheckpointError(lost)
    return source_of(origin.values, origin.directory / CONFIG, origin.open_files, origin.ignored)


def source_of(
    values: Json, path: Path, open_files: Callable[[], TensorSource], ignore_fields: Collection[str] = ()
) -> Source:
    """A checkpoint from the fields of a `config.json`, which stand in the file at `path`, and its tensors.

    The tensors' files are opened when the fields have been understood.
    """
    family, config = _described(values, path, ignore_fields)
    files = open_files()
    text = text_fields(family, values)
    quantization = text.get("quantization_config") or values.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config: expected an object")
    ours = family.model_type == "manyhands"
    packed = packed_section(values) if ours else None
    records: dict[str, Record] = {}
    logical: Mapping[str, Logical]
    if packed is None and quantization is None:
        logical = files.logical()
    elif packed is None:
        logical = logical_tensors(headers_of(files), quantization, str(path))
    else:
        records = read_records(files, as_decoder(config, "packing"), packed)
        logical = packed_tensors(headers_of(files), records, str(files.name))
    float32 = family.saved_float32 if ours else ()
    pieces = match(files, family.pieces(config), tensor_shapes(config), logical, float32)
    kept, dropped = left_over(files, family, config, text, logical, pieces)
    ignored = tuple(sorted(set(ignore_fields)))
    return Source(
        directory=files.directory,
        family=family,
        values=values,
        config=config,
        files=files,
        open_files=open_files,
        logical=logical,
        pieces=pieces,
        kept=kept,
        dropped=dropped,
        packed=packed,
        records=records,
        ignored=ignored,
    )


def _described(values: Json, path: Path, ignore_fields: Collection[str]) -> tuple[Family, BuiltConfig]:
    """The family and the model that a `config.json` describes."""
    try:
        return read_config(values, str(path), ignore_fields)
    except UnknownField as error:
        flag = error.name if error.name.isprintable() else repr(error.name)
        remedy = f"if it changes nothing: --ignore-field {flag}, in Python ignore_fields=[{error.name!r}]"
        raise CheckpointError(f"{error}; {remedy}") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except RecursionError:  # lists in lists, which are compared or shown
        raise CheckpointError(f"{path}: too deeply nested") from None


def stored_twice(family: Family, config: BuiltConfig) -> dict[str, str]:
    """Tensors that may lie in the files once more than the model has them: the name, and the other one's."""
    embedding = next(piece.theirs for piece in family.pieces(config) if piece.ours == "embed_tokens.weight")
    tied = dict.fromkeys(_TIED, embedding) if config.tie_word_embeddings else {}
    return tied | dict(family.copies)


def left_over(
    files: TensorSource,
    family: Family,
    config: BuiltConfig,
    text: Json,
    logical: Mapping[str, Logical],
    pieces: Mapping[str, list[Piece]],
    said: str = f"{CONFIG} describes it",
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tensors that the model is not made of: those that a round trip keeps, and those that are recomputed."""
    used = {piece.theirs for of_one in pieces.values() for piece in of_one}
    prefixes, twice = family.kept(text), stored_twice(family, config)
    kept: list[str] = []
    dropped: list[str] = []
    for name in logical:
        if name in used:
            continue
        if prefixes and name.startswith(prefixes):
            kept.append(name)
        elif name.endswith(family.dropped) or name in twice:
            dropped.append(name)
        else:
            raise CheckpointError(f"{files.where(logical[name].parts[0])} is not one of this model's, as {said}")
    return tuple(kept), tuple(dropped)
