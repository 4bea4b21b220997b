"""A changed checkpoint as a directory that transformers loads, with a receipt of what became of every tensor."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from manyhands.checkpoint.convert import Conversion, Progress, write_conversion
from manyhands.checkpoint.files import building
from manyhands.checkpoint.receipt import RECEIPT
from manyhands.checkpoint.safetensors.shards import MAX_SHARD_SIZE
from manyhands.checkpoint.source import Source
from manyhands.families import family_named
from manyhands.tune.derived import Change, Computed, computed_name, derived


def plan(
    source: Source,
    config: Any,
    changes: Mapping[str, Change],
    to: str,
    dtype: torch.dtype | None = None,
    *,
    drop_extras: bool = False,
) -> Conversion:
    """What would be written, from headers alone. Raises `ConfigError` for what family `to` cannot say, and
    `CheckpointError` for tensors that would be left over."""
    changed = derived(source, config, changes)
    return Conversion(changed, family_named(to, "--to"), dtype, drop_extras=drop_extras)


def write(
    target: str | Path,
    conversion: Conversion,
    changes: Mapping[str, Change],
    how: str,
    finish: Callable[[Path], dict[str, Any]],
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write and return the receipt. `how` says what became of a tensor that others are computed from.

    `finish` is given the directory when all tensors are in it, before it appears; what it returns goes into the
    receipt, and what it raises leaves nothing behind. Raises `UserError` for a target that may not be written and
    `StorageError` if the disk refuses.
    """
    source = conversion.source
    reads = {computed_name(n): list(c.reads) for n, c in changes.items() if isinstance(c, Computed)}
    used = {part for theirs in reads.values() for name in theirs for part in source.logical[name].parts}
    with building(target, overwrite=overwrite, sources=[source.path]) as partial:
        receipt = write_conversion(partial, conversion, max_shard_size=max_shard_size, progress=progress)
        for entry in receipt["target_tensors"].values():
            entry["from"] = list(dict.fromkeys(n for name in entry["from"] for n in reads.get(name, [name])))
        for part, fate in receipt["source_tensors"].items():
            if part in used and fate["became"]:
                fate["how"] = how
        receipt |= finish(partial)
        (partial / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt
