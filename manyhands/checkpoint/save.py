"""A model as a directory that everybody reads: `config.json`, safetensors under the family's names, the tokenizer."""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.assemble import their_tensor
from manyhands.checkpoint.match import header_of
from manyhands.checkpoint.origin import Origin
from manyhands.checkpoint.safetensors.shards import MAX_SHARD_SIZE, write_shards
from manyhands.checkpoint.sidecars import token_ids, write_beside
from manyhands.checkpoint.source import Source, reopen
from manyhands.checkpoint.tensors import DTYPES, NAMES, Header
from manyhands.config import BuiltConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.families import Family, Piece, export_config, text_fields
from manyhands.families.base import Json
from manyhands.families.harmless import HARMLESS, TRAINING_ONLY
from manyhands.files import CONFIG
from manyhands.text import Tokenizer

_log = logging.getLogger(__name__)
_NOT_CARRIED = {"quantization_config", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map"}


def target_pieces(family: Family, config: BuiltConfig, kept: Collection[str] = ()) -> dict[str, list[Piece]]:
    """The family's tensor names, in the order of the model, each with the pieces of ours that it holds.

    `kept` are names that the files have anyway, from where the model came from.
    """
    found: dict[str, list[Piece]] = {}
    for piece in family.pieces(config):
        found.setdefault(piece.theirs, []).append(piece)
    return found | {name: found[other] for name, other in family.besides(config).items() if name not in kept}


def target_headers(
    config: BuiltConfig, targets: Mapping[str, list[Piece]], dtype_of: Callable[[str, str], torch.dtype]
) -> dict[str, Header]:
    """Dtype and shape of every tensor of the family's file. `dtype_of(theirs, ours)` decides the dtype."""
    shapes = tensor_shapes(config)
    headers = {}
    for theirs, pieces in targets.items():
        dtype = dtype_of(theirs, pieces[0].ours)
        headers[theirs] = header_of(shapes, pieces, NAMES[dtype])
    return headers


def dtype_rule(family: Family, model_dtype: torch.dtype, origin: Origin | None) -> Callable[[str, str], torch.dtype]:
    """One dtype for all, but what is float32 by nature (a selection bias), or was in the files the model came from."""
    apart: set[str] = set()
    if origin is not None and origin.family is family:
        apart = {name for name, dtype in origin.dtypes.items() if dtype == "F32" and origin.main_dtype != "F32"}

    def rule(theirs: str, ours: str) -> torch.dtype:
        return torch.float32 if theirs in apart or ours.endswith(family.saved_float32) else model_dtype

    def as_stored(theirs: str, ours: str) -> torch.dtype:
        assert origin is not None
        stored = origin.dtypes.get(theirs, "")
        return DTYPES[stored] if stored in DTYPES else rule(theirs, ours)

    same = origin is not None and origin.family is family and NAMES[model_dtype] == origin.main_dtype
    return as_stored if same else rule


def target_config(
    family: Family, config: BuiltConfig, dtype: torch.dtype, origin: Origin | None, tokenizer: Tokenizer | None
) -> Json:
    """`config.json`: the family's fields, over the harmless ones of the model's origin."""
    fields = export_config(family, config)
    if family.model_type == "manyhands":
        return fields
    name = str(dtype).removeprefix("torch.")
    if origin is None or origin.family.model_type == "manyhands":
        ids: Json = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        ids |= family.token_ids
        return {**fields, **ids, **token_ids(tokenizer, {}), "dtype": name}
    carried = {
        key: value
        for key, value in text_fields(origin.family, origin.values).items()
        if (key in HARMLESS | TRAINING_ONLY or key in family.kept_fields) and key not in _NOT_CARRIED
    }
    if origin.family is not family:
        carried = {**family.token_ids, **{key: value for key, value in carried.items() if key.endswith("_token_id")}}
    if family.text_field is None:
        return {**carried, **fields, **_kept_fields(family, carried), "dtype": name}
    inner = {**carried, **fields[family.text_field], **_kept_fields(family, carried), "dtype": name}
    outer = origin.values if origin.family is family else fields
    outer = {key: value for key, value in outer.items() if key not in _NOT_CARRIED}
    return {**outer, "dtype": name, family.text_field: inner}


def _kept_fields(family: Family, carried: Json) -> Json:
    return {key: carried[key] for key in family.kept_fields if key in carried}


def write_directory(
    directory: Path,
    family: Family,
    config: BuiltConfig,
    ours: Mapping[str, Tensor],
    *,
    origin: Origin | None = None,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Fill an existing directory; use it inside `building`, which makes it complete or absent.

    `ours` holds every tensor of the model by name; `dtype` None keeps that of the embedding. Raises `ConfigError`,
    before anything is written, if the family cannot say what the model is.
    """
    model_dtype = ours["embed_tokens.weight"].dtype if dtype is None else dtype
    values: dict[str, Any] = target_config(family, config, model_dtype, origin, tokenizer)
    kept = origin.kept if origin is not None and origin.family is family else ()
    pieces = target_pieces(family, config, kept)
    headers = target_headers(config, pieces, dtype_rule(family, model_dtype, origin))
    source: Source | None = None
    if origin is not None and kept:
        source = reopen(origin)
        headers |= {name: source.logical[name].header for name in source.kept}

    def value(name: str) -> Tensor:
        if name in pieces:
            return their_tensor(headers[name], pieces[name], ours)
        assert source is not None
        return source.value(name)

    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_shards(directory, headers, value, max_shard_size)
    write_rest(directory, tokenizer, origin)


def write_rest(directory: Path, tokenizer: Tokenizer | None, origin: Origin | None) -> None:
    """The tokenizer, and what else lies where the model came from, if that still is what it was."""
    if origin is None:
        write_beside(directory, tokenizer)
        return
    if lost := origin.lost():
        _log.warning("%s; what lay there beside the weights is not copied", lost)
    write_beside(directory, tokenizer, None if lost else origin.path, origin.values)
