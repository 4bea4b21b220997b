"""Which stored tensors make up which of ours: every piece checked, from names and shapes alone."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from manyhands.checkpoint.tensors import FLOATS, Header, Logical, TensorSource
from manyhands.config.shapes import Shape
from manyhands.errors import CheckpointError
from manyhands.families import Piece
from manyhands.families.base import Index


def match(
    files: TensorSource,
    pieces: Iterable[Piece],
    shapes: Mapping[str, Shape],
    logical: Mapping[str, Logical],
    float32: tuple[str, ...],
    said: str = "config.json",
) -> dict[str, list[Piece]]:
    """Pieces by our name, each checked against what `said` (for people) says.

    Stops at the first that is missing: a hostile config may name millions.
    """
    found: dict[str, list[Piece]] = {name: [] for name in shapes}
    covered = dict.fromkeys(logical, 0)
    for piece in pieces:
        instead = piece.otherwise if piece.theirs not in logical and piece.otherwise in logical else None
        if instead is not None:
            piece = replace(piece, theirs=instead)
        stored = logical.get(piece.theirs)
        if stored is None:
            raise CheckpointError(f"{files.name}: tensor {piece.theirs!r} is missing, which {said} calls for")
        where = files.where(stored.parts[0])
        allowed = ("F32",) if float32 and piece.ours.endswith(float32) else FLOATS
        if stored.header.dtype not in allowed:
            raise CheckpointError(f"{where} is {stored.header.dtype}; expected {' or '.join(allowed)}")
        theirs = indexed_shape(stored.header.shape, piece.theirs_index)
        if theirs is not None and piece.transpose:
            theirs = (*theirs[:-2], theirs[-1], theirs[-2])
        ours = indexed_shape(shapes[piece.ours], piece.ours_index)
        assert ours is not None, piece
        if theirs != ours:
            shape, part = list(stored.header.shape), "" if not piece.theirs_index else " for a part of it"
            right = list(ours if not piece.transpose else (*ours[:-2], ours[-1], ours[-2]))
            raise CheckpointError(f"{where} has shape {shape}; {said} says {right}{part}")
        found[piece.ours].append(piece)
        covered[piece.theirs] += 0 if instead else math.prod(ours)  # others may be read from there as well
    for name, of_one in found.items():
        whole = sum(math.prod(indexed_shape(shapes[name], piece.ours_index) or ()) for piece in of_one)
        assert whole == math.prod(shapes[name]), f"the family's pieces do not make up {name}"
    for name, count in covered.items():
        if count and count != math.prod(logical[name].header.shape):
            where, shape = files.where(logical[name].parts[0]), list(logical[name].header.shape)
            raise CheckpointError(f"{where} has shape {shape}; {said} uses part of it")
    return found


def indexed_shape(shape: Shape, index: Index) -> Shape | None:
    """The shape of `tensor[index]`; None where the index does not fit."""
    if len(index) > len(shape):
        return None
    result: list[int] = []
    for n, i in zip(shape, index, strict=False):
        if isinstance(i, slice):
            if i.stop is not None and i.stop > n:
                return None
            result.append(len(range(*i.indices(n))))
        elif i >= n:
            return None
    return (*result, *shape[len(index) :])


def header_of(piece_shapes: Mapping[str, Shape], pieces: Iterable[Piece], dtype: str) -> Header:
    """The header of one of their tensors, from all the pieces of ours that it holds."""
    extents: list[int] = []
    for piece in pieces:
        ours = indexed_shape(piece_shapes[piece.ours], piece.ours_index)
        assert ours is not None
        left = list((*ours[:-2], ours[-1], ours[-2]) if piece.transpose else ours)
        own: list[int] = []
        for i in piece.theirs_index:
            if isinstance(i, slice):
                own.append((i.start or 0) + (i.step or 1) * (left.pop(0) - 1) + 1)
            else:
                own.append(i + 1)
        own += left
        extents = [max(a, b) for a, b in zip(extents, own, strict=True)] if extents else own
    return Header(dtype, tuple(extents))
