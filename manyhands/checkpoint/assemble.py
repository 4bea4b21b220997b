"""Tensors from pieces: ours from a family's files, and theirs from ours. Every byte is copied at most once."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from manyhands.checkpoint.source import Source
from manyhands.checkpoint.tensors import DTYPES, Header
from manyhands.errors import CheckpointError
from manyhands.families import Piece


def our_tensor(
    source: Source,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    device: torch.device,
    own: slice | None = None,
) -> Tensor:
    """One of our tensors, in `dtype` (None: as stored, the widest if its pieces differ).

    On the CPU a tensor that is stored as it is wanted stays the file itself, mapped. Of `own` entries along dimension 0
    only those are kept, and read where they are stored one by one.
    """
    pieces, stored = source.pieces[name], stored_dtype(source, name)
    dtype = stored if dtype is None else dtype
    if is_whole(source, name) and device.type == "cpu" and dtype == stored:
        mapped = source.value(pieces[0].theirs)[pieces[0].theirs_index]
        return mapped if own is None else mapped[own]
    if own is not None:
        if not all(piece.ours_index and isinstance(piece.ours_index[0], int) for piece in pieces):
            return our_tensor(source, name, shape, dtype, device)[own].clone()
        pieces = [_moved(piece, own.start) for piece in pieces if piece.ours_index[0] in range(own.start, own.stop)]
        shape = (own.stop - own.start, *shape[1:])
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


def _moved(piece: Piece, start: int) -> Piece:
    """Its place in our tensor from entry `start` on."""
    first, *rest = piece.ours_index
    assert isinstance(first, int)
    return replace(piece, ours_index=(first - start, *rest))


def stored_dtype(source: Source, name: str) -> torch.dtype:
    """What one of our tensors is stored as: the widest if its pieces differ."""
    found = [DTYPES[source.logical[piece.theirs].header.dtype] for piece in source.pieces[name]]
    dtype = found[0]
    for other in found[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def is_whole(source: Source, name: str) -> bool:
    """Whether one of our tensors lies in the files as it is: then it is mapped, and takes no memory of its own."""
    first, *others = source.pieces[name]
    if first.otherwise == first.theirs:  # another of ours may be that one
        return False
    return not others and not first.transpose and not first.ours_index and source.logical[first.theirs].decode is None


def _part(out: Tensor, piece: Piece) -> Tensor:
    """Where a piece goes, in the layout of theirs."""
    part = out[piece.ours_index]
    return part.transpose(-2, -1) if piece.transpose else part


def _decode(source: Source, theirs: str, pieces: list[Piece], out: Tensor) -> None:
    """Decode in place where that can be, and a stack expert by expert, letting go of what was read behind it."""
    logical, files = source.logical[theirs], source.files
    assert logical.decode is not None
    parts = [files.tensor(part) for part in logical.parts]
    if logical.by_rows and out.device.type == "cpu":
        for e in range(logical.header.shape[0]):
            for piece in pieces:
                rows = piece.theirs_index[2] if len(piece.theirs_index) == 3 else slice(None)
                logical.decode([part[e : e + 1, rows] for part in parts], _part(out, piece)[e : e + 1])
            for name in logical.parts:
                files.release(name, before=e + 1)
    elif len(pieces) == 1 and not pieces[0].theirs_index and out.device.type == "cpu":
        logical.decode(parts, _part(out, pieces[0]))
    else:
        value = source.value(theirs, torch.empty(logical.header.shape, dtype=out.dtype))
        for piece in pieces:
            _part(out, piece).copy_(value[piece.theirs_index])


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
