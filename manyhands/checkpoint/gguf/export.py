"""A checkpoint as one GGUF file that llama.cpp runs with the same mathematics.

    receipt = export("OLMoE-1B-7B", "olmoe.gguf", file_type="q8_0")

Nothing is written unless the model fits an architecture of llama.cpp exactly (`families/gguf/written.py`). The file
appears complete, in one rename. One of the model's tensors is in memory at a time.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from manyhands.checkpoint.assemble import our_tensor
from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.gguf.blocks import FTYPES, FileType, block_type, encoded
from manyhands.checkpoint.gguf.vocabulary import vocabulary
from manyhands.checkpoint.receipt import describe_source
from manyhands.checkpoint.sidecars import token_ids, tokenizer_of
from manyhands.checkpoint.source import Source
from manyhands.checkpoint.target import claim_file
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import UserError
from manyhands.families.gguf.archs import ARCHS
from manyhands.families.gguf.types import BlockType
from manyhands.families.gguf.written import Plan, Written, factors, first_fit, written_as
from manyhands.files import writing
from manyhands.terminal import shown
from manyhands.version import __version__

MARK = "manyhands.version"
"""The key by which this program knows its own files."""
_ALIGNMENT = 32
Progress = Callable[[str, int, int], None]
"""(tensor just written, how many are, of how many)."""


def export(
    source_path: str | Path,
    target_path: str | Path,
    *,
    file_type: FileType = "bf16",
    to: str | None = None,
    with_vocabulary: bool = True,
    overwrite: bool = False,
    ignore_fields: Collection[str] = (),
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `source_path` as the GGUF file `target_path` and return the receipt.

    `to` is a family with an architecture in llama.cpp (None: the source's own; for our own models, the first fit).
    `with_vocabulary=False` writes a file that takes token ids only. Weights that are quantised are decoded first.
    `tokenizer` names a directory whose tokenizer is taken in the place of the source's.

    Raises `ConfigError` naming what llama.cpp computes otherwise, `CheckpointError` for a tokenizer that GGUF cannot
    express, `UserError` for a target that may not be written or without the package `gguf`, `StorageError` if the disk
    refuses; nothing is written then.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise UserError("writing GGUF needs the package gguf: pip install 'manyhands[gguf]'") from None
    claim_file(target_path, MARK.encode(), overwrite=overwrite, sources=[source_path])
    source = open_checkpoint(source_path, ignore_fields)
    origin = source.path
    claim_file(target_path, MARK.encode(), overwrite=overwrite, sources=[origin])
    plan = _plan(source, to)
    found, unread = tokenizer_of(origin if tokenizer is None else Path(tokenizer))
    words: dict[str, Any] = {"tokenizer.ggml.model": "none"}
    if with_vocabulary:
        words = vocabulary(found, source.config.vocab_size, token_ids(found, source.values), unread)
    blocks = {name: block_type(name, t.shape, file_type) for name, t in plan.tensors.items()}
    writer = GGUFWriter(None, plan.arch.name)
    general: dict[str, Any] = {
        MARK: __version__,
        "general.name": origin.stem if source.file else origin.name,
        "general.type": "model",
    }
    general |= {"general.file_type": FTYPES[file_type], "general.quantization_version": 2}
    for key, value in (general | dict(plan.keys) | words).items():
        _add(writer, key, value)
    for name, tensor in plan.tensors.items():
        block = blocks[name]
        writer.add_tensor_info(name, tensor.shape, np.dtype("f4"), _size(tensor, block), raw_dtype=_number(block))
    entries: dict[str, Any] = {}
    with writing(target_path) as file:
        _write_header(writer, file)
        for name, value in _values(source, plan):
            written, block = plan.tensors[name], blocks[name]
            entries[name] = _write(file, value, block) | {"shape": list(written.shape), "from": written.ours}
            if progress is not None:
                progress(name, len(entries), len(plan.tensors))
    return {
        "manyhands": __version__,
        "source": describe_source(source),
        "target": {
            "file": str(target_path),
            "architecture": plan.arch.name,
            "type": file_type,
            "size": Path(target_path).stat().st_size,
            "vocabulary": {key: words.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")},
        },
        "tensors": entries,
        "left_out": [*source.kept, *source.dropped],
    }


def _plan(source: Source, to: str | None) -> Plan:
    if to is not None:
        return written_as(source.decoder("GGUF"), to)
    if source.family.model_type in ARCHS:
        return written_as(source.decoder("GGUF"), source.family.model_type)
    return first_fit(source.decoder("GGUF"))


def said(receipt: dict[str, Any]) -> str:
    """The receipt for people."""
    target, tensors = receipt["target"], receipt["tensors"]
    by_type: dict[str, list[float]] = {}
    for entry in tensors.values():
        by_type.setdefault(entry["type"], []).append(entry["relative_error"])
    words = target["vocabulary"]
    known = "token ids only" if words["model"] == "none" else f"vocabulary {words['model']}, {words['pre']}"
    lines = [
        f"{shown(receipt['source']['model_type'])} -> {target['architecture']}: {len(tensors)} tensors, "
        f"{target['size'] / 1e6:,.1f} MB written to {shown(target['file'])} ({known})"
    ]
    for name, errors in by_type.items():
        lost = f"rounded, {max(errors):.2g} of a tensor's norm at most" if max(errors) else "exact"
        lines.append(f"  {len(errors):>6} {name}: {lost}")
    if left := receipt["left_out"]:
        lines.append(f"left out, since the model does not compute with them: {shown(', '.join(left[:6]))}")
    return "\n".join(lines)


def _number(block: BlockType) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[block.name]


def _size(tensor: Written, block: BlockType) -> int:
    return math.prod(tensor.shape) // block.values * block.size


def _add(writer: Any, key: str, value: Any) -> None:
    """One key, in the type that llama.cpp reads it in: uint32, float32, bool, string, or a list."""
    if key == "general.architecture":  # the writer has it
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write_header(writer: Any, file: BinaryIO) -> None:
    """Through a file of the writer's own on the same name, which is closed before the data is written."""
    writer.write_header_to_file(Path(file.name))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    file.seek(0, 2)
    _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _write(file: BinaryIO, value: Tensor, block: BlockType) -> dict[str, Any]:
    """One tensor and its padding; its entry in the receipt."""
    digest, error, squares = hashlib.sha256(), 0.0, 0.0
    for data, lost, square in encoded(value, block):
        file.write(data)
        digest.update(data)
        error, squares = error + lost, squares + square
    _pad(file)
    relative = math.sqrt(error / squares) if squares else 0.0
    return {"type": block.name, "sha256": digest.hexdigest(), "relative_error": relative}


def _values(source: Source, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, in its order."""
    shapes = tensor_shapes(source.config)
    last = ("", torch.empty(0))
    for name, written in plan.tensors.items():
        if written.how == "factors":
            yield name, torch.tensor(factors(source.decoder("GGUF")))
            continue
        if last[0] != written.ours:  # kept: gate and up lie in one
            last = ("", torch.empty(0))
            last = (written.ours, our_tensor(source, written.ours, shapes[written.ours], None, torch.device("cpu")))
        yield name, _arranged(last[1].detach()[written.index], written, source)


def _arranged(tensor: Tensor, written: Written, source: Source) -> Tensor:
    a = source.decoder("GGUF").attention
    if written.how == "pairs":
        heads = a.kv_heads if ".k_proj." in written.ours else a.num_attention_heads
        halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).flatten(0, 2)
    if written.how in ("keys", "values"):
        both = tensor.view(a.num_attention_heads, -1, a.kv_lora_rank)  # [H, n + v, R]
        return both[:, : a.qk_nope_head_dim].transpose(1, 2) if written.how == "keys" else both[:, a.qk_nope_head_dim :]
    return tensor
