"""One expert's part of one of our stacked tensors at a time, however a family stores it: never the stack.

E experts.
"""

from collections import defaultdict

import torch
from torch import Tensor

from manyhands.checkpoint.assemble import stored_dtype
from manyhands.checkpoint.source import Source
from manyhands.checkpoint.tensors import DTYPES
from manyhands.config.shapes import Shape
from manyhands.families import Piece
from manyhands.families.base import Index


class ExpertReader:
    """Reads `name` [E, …] expert by expert, in the dtype it is stored in (the widest if its pieces differ)."""

    def __init__(self, source: Source, name: str, shape: Shape) -> None:
        self.source, self.shape = source, shape
        self.dtype = stored_dtype(source, name)
        self._of_one: dict[int, list[Piece]] = defaultdict(list)
        """Pieces that hold something of one expert alone."""
        self._of_all: list[Piece] = []
        for piece in source.pieces[name]:
            first = piece.ours_index[0] if piece.ours_index else slice(None)
            if isinstance(first, int):
                self._of_one[first].append(piece)
            else:
                assert first == slice(None), piece
                self._of_all.append(piece)
        self._stacks: dict[str, Tensor] = {}
        """Stacks that only decode whole."""

    def read(self, expert: int) -> Tensor:
        """[…] of one expert: mapped where it lies in a file as it is."""
        pieces = self._of_one[expert] or self._of_all
        if len(pieces) == 1 and not pieces[0].ours_index[1:] and not pieces[0].transpose:
            part = self._part(pieces[0], expert)
            if part.dtype == self.dtype:
                return part
        out = torch.empty(self.shape[1:], dtype=self.dtype)
        for piece in pieces:
            target = out[piece.ours_index[1:]]
            target = target.transpose(-2, -1) if piece.transpose else target
            target.copy_(self._part(piece, expert))
        return out

    def release(self, expert: int) -> None:
        """Let go of the pages that this expert, and those before it, were read from."""
        for piece in self._of_one[expert]:
            self.source.release(piece.theirs)
        for piece in self._of_all:
            logical = self.source.logical[piece.theirs]
            if len(logical.parts) == logical.header.shape[0] > 1:  # one by one in the file
                self.source.files.release(logical.parts[expert])
            elif logical.decode is None or logical.entry is not None:
                for part in logical.parts:
                    self.source.files.release(part, before=expert + 1)

    def _part(self, piece: Piece, expert: int) -> Tensor:
        """The piece's part of the expert, in the layout of theirs."""
        if piece.ours_index and isinstance(piece.ours_index[0], int):
            return self.source.value(piece.theirs)[piece.theirs_index]
        within: Index = piece.theirs_index[1:]
        logical = self.source.logical[piece.theirs]
        if logical.decode is None:
            return self.source.value(piece.theirs)[expert][within]
        if logical.entry is not None:
            out = torch.empty(logical.header.shape[1:], dtype=DTYPES[logical.header.dtype])
            logical.entry([self.source.files.tensor(name) for name in logical.parts], expert, out)
            return out[within]
        if piece.theirs not in self._stacks:
            self._stacks[piece.theirs] = self.source.value(piece.theirs)
        return self._stacks[piece.theirs][expert][within]
