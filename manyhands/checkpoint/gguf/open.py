"""A GGUF file as an opened checkpoint: `load`, `convert`, `quantize`, `generate` read it like any other."""

import logging
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from manyhands.checkpoint.gguf.files import GgufFiles
from manyhands.checkpoint.gguf.logical import logical_tensors
from manyhands.checkpoint.match import match
from manyhands.checkpoint.source import Source, left_over
from manyhands.config.decoder import as_decoder
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import CheckpointError, ConfigError
from manyhands.families import read_config
from manyhands.families.gguf import config_fields, pieces

_log = logging.getLogger(__name__)
_TOKENS = {f"tokenizer.ggml.{name}_token_id": f"{ours}_token_id" for name, ours in (("bos", "bos"), ("eos", "eos"))}


def open_gguf(path: str | Path, ignore_fields: Collection[str] = ()) -> Source:
    """Read and match every header. `path` is a file, or the first of `NAME-00001-of-0000N.gguf`.

    `ignore_fields` names unknown keys of the architecture (`llama.boost`) to read past.
    Raises `CheckpointError` naming the file and the key or tensor that is wrong.
    """
    path = Path(path)
    files = GgufFiles(path)
    arch, values = config_fields(files.header, ignore_fields)
    for key, name in _TOKENS.items():
        if type(token := files.header.metadata.get(key)) is int:
            values[name] = token
    try:
        family, found = read_config(values, str(path))
        config = as_decoder(found, "GGUF")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    # Its tensors are named as GGUF names them; whoever saves the model asks for the family by its name.
    family = replace(family, pieces=partial(pieces, arch=arch), kept=lambda _: (), kept_fields=())
    logical = logical_tensors(files, arch, config)
    placed = match(files, family.pieces(config), tensor_shapes(config), logical, (), said="its metadata")
    left_over(files, family, config, {}, logical, placed, said="its metadata describes it")
    if ignore_fields:
        _log.warning("%s: ignored, as asked: %s", path, ", ".join(sorted(ignore_fields)))
    return Source(
        directory=files.directory,
        family=family,
        values=values,
        config=config,
        files=files,
        open_files=partial(GgufFiles, path),
        logical=logical,
        pieces=placed,
        kept=(),
        dropped=(),
        ignored=tuple(sorted(set(ignore_fields))),
        file=path,
    )
