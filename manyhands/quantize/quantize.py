"""From any checkpoint to packed records, layer by layer or expert by expert, with a receipt.

Two models run side by side on the sample, one layer at a time: the original, and what has been written so far. Each
layer is read, run, watched (with calibration), packed, run again as packed and let go; so peak memory is about one
layer, and the figures are those of the packed model itself. Where a layer does not fit into memory nothing is run: the
same bytes are written expert by expert, and the receipt says that nothing was measured.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from manyhands.checkpoint.files import building, written_in
from manyhands.checkpoint.packed import write_packed
from manyhands.checkpoint.receipt import RECEIPT, hash_files
from manyhands.checkpoint.safetensors.shards import MAX_SHARD_SIZE
from manyhands.checkpoint.sidecars import tokenizer_of, write_beside
from manyhands.checkpoint.source import Source
from manyhands.config import PackedConfig
from manyhands.errors import UserError
from manyhands.quantize.layers import Progress, Quantizer
from manyhands.quantize.receipt import Sample, receipt_of
from manyhands.quantize.room import why_not_measured
from manyhands.quantize.stream import StreamQuantizer

_log = logging.getLogger(__name__)


@torch.no_grad()
def quantize(
    source: Source,
    target_path: str | Path,
    packed: PackedConfig,
    sample: Sample | None = None,
    *,
    measure: bool | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a packed copy of a checkpoint (`open_checkpoint(path)`) and return the receipt.

    `sample` None: random ids, on which routing is compared. `measure` False: nothing is run, and about one expert at a
    time is in memory, not one layer; None: so if a layer does not fit into the memory that is free, which a warning and
    `receipt["not_measured"]` say. The weights are packed to the same bytes either way; only calibration needs layers.

    The directory appears complete, in one rename; `overwrite` replaces one that this program wrote. Raises
    `UserError` for any other target that exists and is not empty, for a model that is packed already, for ids that
    are not in its vocabulary and for a calibration that memory has no room for, `CheckpointError` for a damaged one or
    for weights that are not finite, `StorageError` if the disk refuses.
    """
    config = source.decoder("packing")
    if source.packed is not None:
        raise UserError(f"{source.path} is packed already; rounding twice costs more: start from the original")
    if config.moe is None:
        packed = packed.model_copy(update={"experts": None})
    tokenizer, unread = tokenizer_of(source.path)
    sample = random_ids(source) if sample is None else sample
    not_measured = why_not_measured(source, packed, sample, measure)
    work: Quantizer | StreamQuantizer
    if not_measured is None:
        work = Quantizer(source, packed, sample, progress)
    else:
        if measure is None:
            _log.warning("%s", not_measured)
        sample, work = None, StreamQuantizer(source, packed, progress)
    with building(target_path, overwrite=overwrite, sources=[source.path]) as partial:
        write_packed(
            partial,
            config,
            packed,
            work.dtype_of,
            work.value,
            max_shard_size=max_shard_size,
        )
        if isinstance(work, Quantizer):
            work.finish()
        beside = write_beside(partial, tokenizer, source.path, source.values, unread)
        receipt = receipt_of(source, work.records, work.figures, sample, work.dtype_of, not_measured) | {
            "target": {
                "model_type": "manyhands",
                "packed": packed.model_dump(),
                "files": hash_files(partial, written_in(partial)),
            },
            "beside": {"copied": beside.copied, "left": beside.left},
            "notes": beside.line,
        }
        (partial / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt


def random_ids(source: Source) -> Sample:
    """For a model without a tokenizer: routing can be compared, perplexity cannot."""
    S = min(128, source.decoder("packing").max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return Sample(torch.randint(0, source.config.vocab_size, (4, S + 1), generator=generator), None)
