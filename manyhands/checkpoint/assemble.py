"""Tensors from pieces: ours from a family's files, and theirs from ours. Every byte is copied at most once."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from manyhands.checkpoint.quantized import Header
from manyhands.checkpoint.source import Source
from manyhands.checkpoint.tensor_files import DTYPES
from manyhands.errors import CheckpointError
from manyhands.families import Piece


def our_tensor(
    source: Source,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    """One of our tensors, in `dtype` (None: as stored, the widest if its pieces differ).

    On the CPU a tensor that is stored as it is wanted stays the file itself, mapped.
    """
    pieces = source.pieces[name]
    if dtype is None:
        stored = [DTYPES[source.logical[piece.theirs].header.dtype] for piece in pieces]
        dtype = stored[0]
        for other in stored[1:]:
            dtype = torch.promote_types(dtype, other)
    first = pieces[0]
    whole = len(pieces) == 1 and not first.transpose and not first.ours_index
    if whole and device.type == "cpu" and source.logical[first.theirs].decode is None:
        tensor = source.value(first.theirs)[first.theirs_index]
        if tensor.dtype == dtype:
            return tensor
    try:
        out = torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:  # also torch.OutOfMemoryError
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{source.directory}: no room for {name} {list(shape)} {dtype}: {reason}") from None
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.theirs, []).append(piece)
    for theirs, of_one in by_name.items():
        if source.logical[theirs].decode is None:
            value = source.value(theirs)
            for piece in of_one:
                _part(out, piece).copy_(value[piece.theirs_index])
        else:
            _decode(source, theirs, of_one, out)
        source.release(theirs)
    for theirs in by_name:  # again: to read a page maps its neighbours, so the ends of some came back
        source.release(theirs)
    return out


def _part(out: Tensor, piece: Piece) -> Tensor:
    """Where a piece goes, in the layout of theirs."""
    part = out[piece.ours_index]
    return part.transpose(-2, -1) if piece.transpose else part


def _decode(source: Source, theirs: str, pieces: list[Piece], out: Tensor) -> None:
    """Decode in place where the whole tensor goes to one place; else, if it is a stack, one expert at a time."""
    logical = source.logical[theirs]
    assert logical.decode is not None
    if len(pieces) == 1 and not pieces[0].theirs_index and out.device.type == "cpu":
        source.value(theirs, _part(out, pieces[0]))
        return
    shape = logical.header.shape
    stacked = len(shape) == 3 and all(piece.theirs_index[:1] in ((), (slice(None),)) for piece in pieces)
    parts = [source.files.tensor(part) for part in logical.parts]
    for first, last in [(e, e + 1) for e in range(shape[0])] if stacked else [(0, shape[0])]:
        if pieces[0].transpose:  # decoded in the layout of ours, which the copies then read in order
            value = torch.empty(last - first, shape[2], shape[1], dtype=out.dtype).transpose(1, 2)
        else:
            value = torch.empty(last - first, *shape[1:], dtype=out.dtype)
        logical.decode([part[first:last] for part in parts] if stacked else parts, value)
        for piece in pieces:
            target = _part(out, piece)
            (target[first:last] if stacked else target).copy_(value[piece.theirs_index])


def their_tensor(header: Header, pieces: Iterable[Piece], ours: Mapping[str, Tensor]) -> Tensor:
    """One of a family's tensors, contiguous, from ours."""
    dtype, pieces = DTYPES[header.dtype], list(pieces)
    if len(pieces) == 1 and not pieces[0].theirs_index:
        part = ours[pieces[0].ours].detach()[pieces[0].ours_index]
        part = part.transpose(-2, -1) if pieces[0].transpose else part
        return part.to("cpu", dtype).contiguous()
    out = torch.empty(header.shape, dtype=dtype)
    for piece in pieces:
        part = ours[piece.ours].detach()[piece.ours_index]
        out[piece.theirs_index] = (part.transpose(-2, -1) if piece.transpose else part).to("cpu", dtype)
    return out
