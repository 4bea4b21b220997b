"""Writing safetensors, tensor by tensor or in parts of one: never more than that in memory beside the model."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from manyhands.checkpoint.safetensors.header import SPELLED
from manyhands.checkpoint.tensors import DTYPES, Header
from manyhands.defaults import MAX_SHARD_SIZE as MAX_SHARD_SIZE
from manyhands.errors import ConfigError
from manyhands.files import INDEX, WEIGHTS

Value = Callable[[str], Tensor | Iterator[Tensor]]
"""A tensor's content by name: whole, or in parts whose bytes follow one another."""


def header_size(header: Header) -> int:
    """Bytes of the tensor's data."""
    size = DTYPES[header.dtype].itemsize
    for n in header.shape:
        size *= n
    return size


def write_shards(
    directory: Path,
    headers: Mapping[str, Header],
    value: Value,
    max_shard_size: int = MAX_SHARD_SIZE,
    align: int = 8,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors into `model.safetensors`, or into shards with an index, as transformers names them.

    `value` makes a tensor of the given dtype and shape, or parts that together have as many bytes; it is called once
    per name, in the order of `headers`.
    The data of each file begins at a multiple of `align` bytes; `metadata` goes into each header.
    """
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size = {max_shard_size}: at least 1 byte")
    shards = _split(headers, max_shard_size)
    if len(shards) == 1:
        _write(directory / WEIGHTS, shards[0], headers, value, align, metadata or {})
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(directory / file, names, headers, value, align, metadata or {})
        weight_map |= dict.fromkeys(names, file)
    total = sum(header_size(header) for header in headers.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, headers: Mapping[str, Header], value: Value) -> None:
    """Write one file, byte for byte as the library's `save_file` does: wide types first, then by name."""
    in_order = sorted(headers, key=lambda name: (-DTYPES[headers[name].dtype].itemsize, name))
    _write(path, in_order, headers, value, 8, None)


def _split(headers: Mapping[str, Header], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, header in headers.items():
        size = header_size(header)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write(
    path: Path,
    names: Iterable[str],
    headers: Mapping[str, Header],
    value: Value,
    align: int,
    metadata: Mapping[str, str] | None,
) -> None:
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    names = list(names)
    for name in names:
        size = header_size(headers[name])
        header = headers[name]
        entries[name] = {
            "dtype": SPELLED[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)  # the format allows spaces at the end of the header
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            given, header, written = value(name), headers[name], 0
            if isinstance(given, Tensor):
                assert given.dtype == DTYPES[header.dtype] and tuple(given.shape) == header.shape, name
                given = iter((given,))
            for part in given:
                if part.numel():
                    written += file.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)
            assert written == header_size(header), name
