"""What receipts are made of: hashes of tensors and of files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.source import Source
from manyhands.checkpoint.tensors import Header
from manyhands.files import CONFIG

RECEIPT = "receipt.json"


def describe(header: Header, sha256: str) -> dict[str, Any]:
    """A tensor's entry."""
    return {"dtype": header.dtype, "shape": list(header.shape), "sha256": sha256}


def tensor_sha256(tensor: Tensor) -> str:
    """Of the bytes as a file holds them."""
    if not tensor.numel():
        return hashlib.sha256().hexdigest()
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def describe_source(source: Source) -> dict[str, Any]:
    """A checkpoint: its family, its files, the unknown fields that were read past."""
    names = {CONFIG, *(stored.file for stored in source.files.stored.values())}
    files = hash_files(source.directory, [source.directory / name for name in names])
    return {"model_type": source.family.model_type, "files": files, "ignored_fields": list(source.ignored)}


def hash_files(directory: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """Size and SHA-256 by the path relative to `directory`."""
    found = {}
    for path in sorted(paths):
        if path.is_file():
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(directory))] = {"size": path.stat().st_size, "sha256": sha256}
    return found
