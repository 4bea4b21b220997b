"""From what a person means by a path to an opened checkpoint, every byte of it verified where that can be."""

import logging
from collections.abc import Collection
from pathlib import Path

from manyhands.checkpoint.adapters.fields import CONFIG as ADAPTER
from manyhands.checkpoint.gguf.files import gguf_in, is_gguf
from manyhands.checkpoint.gguf.open import open_gguf
from manyhands.checkpoint.hub import download, is_hub_name
from manyhands.checkpoint.manifest import MANIFEST, read_manifest, verify
from manyhands.checkpoint.runs import is_named, resolve_checkpoint
from manyhands.checkpoint.source import Source, open_source
from manyhands.errors import CheckpointError
from manyhands.files import CONFIG, RUN, TOKENIZER, TUNED
from manyhands.text.tokenizer_files import TIKTOKEN

_log = logging.getLogger(__name__)


def open_checkpoint(path: str | Path, ignore_fields: Collection[str] = ()) -> Source:
    """The checkpoint at `find(path)`, opened. Raises `CheckpointError` as `find` and `open_source` do."""
    return open_found(find(path), ignore_fields)


def open_directory(directory: str | Path, ignore_fields: Collection[str] = ()) -> Source:
    """The checkpoint in that very directory, verified and opened. Raises `CheckpointError`."""
    directory = Path(directory)
    if is_gguf(directory):
        return open_found(directory, ignore_fields)
    if (directory / MANIFEST).is_file() or not (directory / CONFIG).is_file():
        verify(directory)
    return open_found(directory, ignore_fields)


def find(path: str | Path) -> Path:
    """The verified directory or the GGUF file a person means by `path`; a hub name that is no path here is downloaded.

    A directory without a `config.json` that holds one model in GGUF stands for that.

    Raises `CheckpointError` saying what is there and what was expected.
    """
    directory = fetched(path)
    if is_gguf(directory):
        return directory
    if (directory / ADAPTER).is_file() and not (directory / CONFIG).is_file():
        raise CheckpointError(f"{path}: an adapter, and no whole model; give its base model, and --adapter {path}")
    if directory != Path(path):
        return _of_the_hub(directory, path)
    if (directory / CONFIG).is_file() and not (directory / MANIFEST).exists():
        return directory  # somebody else's: there is nothing to verify it by
    ours = (directory / MANIFEST).exists() or (directory / RUN).exists()
    if not ours and (file := gguf_in(directory)) is not None:
        return file
    found = resolve_checkpoint(path)  # verifies every byte
    if found != directory:
        _log.debug("%s: takes %s", path, found)
    return found


def fetched(path: str | Path) -> Path:
    """The path itself; of a name on the hub that is no path here, where it was downloaded to.

    Raises `CheckpointError` as `download` does.
    """
    directory = Path(path)
    here = directory.exists() or is_gguf(directory) or is_named(directory) or not is_hub_name(str(path))
    return directory if here else download(str(path))


def _of_the_hub(snapshot: Path, name: str | Path) -> Path:
    """A model of config.json and safetensors, or the one in GGUF."""
    if (snapshot / CONFIG).is_file():
        return snapshot
    if (file := gguf_in(snapshot)) is not None:
        return file
    raise CheckpointError(f"{name}: no {CONFIG} there; if it holds files in GGUF, say of which type: {name}:Q4_K_M")


def open_found(directory: Path, ignore_fields: Collection[str] = ()) -> Source:
    """A verified directory or a GGUF file, opened.

    Where there is a manifest it must list every file that is read: those it verified.

    Raises `CheckpointError` naming what is missing or does not fit.
    """
    if is_gguf(directory):
        return open_gguf(directory, ignore_fields)
    if (directory / TUNED).is_file():
        raise CheckpointError(
            f"{directory} holds what tuning changed of a model, and no whole one: manyhands convert makes one of it"
        )
    source = open_source(directory, ignore_fields)
    if not (directory / MANIFEST).is_file():
        if source.family.model_type == "manyhands":
            raise CheckpointError(f"{directory}: no {MANIFEST}; an incomplete checkpoint")
        return source
    names = {CONFIG, source.files.name.name, *(stored.file for stored in source.files.stored.values())}
    names |= {name for name in (TOKENIZER, TIKTOKEN) if (directory / name).exists()}
    if missing := names - read_manifest(directory).files.keys():
        raise CheckpointError(f"{directory}: its manifest does not list {min(missing)!r}, which nobody verified")
    return source
