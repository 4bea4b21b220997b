"""What receipts are made of: hashes of tensors and of files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.source import Source
from manyhands.checkpoint.tensors import Header, TensorSource
from manyhands.files import CONFIG

RECEIPT = "receipt.json"
_AT_A_TIME = 1 << 26


def describe(header: Header, sha256: str) -> dict[str, Any]:
    """A tensor's entry."""
    return {"dtype": header.dtype, "shape": list(header.shape), "sha256": sha256}


def tensor_sha256(tensor: Tensor) -> str:
    """Of the bytes as a file holds them."""
    if not tensor.numel():
        return hashlib.sha256().hexdigest()
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def stored_sha256(files: TensorSource, name: str) -> str:
    """Of a stored tensor, read some rows at a time; its pages are let go."""
    tensor, digest = files.tensor(name), hashlib.sha256()
    if tensor.nbytes <= _AT_A_TIME or tensor.shape[0] < 2:
        files_digest = tensor_sha256(tensor)
        files.release(name)
        return files_digest
    rows = max(1, tensor.shape[0] * _AT_A_TIME // tensor.nbytes)
    for start in range(0, tensor.shape[0], rows):
        digest.update(tensor[start : start + rows].contiguous().view(-1).view(torch.uint8).numpy().data)
        files.release(name, before=min(start + rows, tensor.shape[0]))
    return digest.hexdigest()


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
