"""A cache in blocks: sequences that come, grow and go take blocks of one pool, and may share them.

Which block belongs to whom is a table's business (`engine/blocks.py` has one); here are the tensors. The native
kernels read and write the blocks where they lie. A module reads a sequence's blocks gathered into one piece, so that
its attention computes what it does with a contiguous cache, bit for bit.

G heads, S new positions, L all positions, N blocks of P positions, d width.
"""

import sys
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.layers.cache.contiguous import Cache


class BlockTable(Protocol):
    """The blocks of one sequence, in the order of its positions."""

    ids: list[int]
    copies: list[tuple[int, int]]
    """(from, to): blocks to copy before anything is written. The cache empties it."""

    @property
    def block_size(self) -> int:
        """Positions of a block."""

    def grow(self, length: int) -> None:
        """Have blocks for `length` positions."""

    def truncate(self, length: int) -> None:
        """Give back what is behind."""

    def fork(self) -> Self:
        """Another table of the same blocks."""


class Pool:
    """One layer's blocks, [N, G, P, d] for each tensor that is cached; N grows with the blocks in use."""

    def __init__(self, block_size: int, most: int = sys.maxsize, least: int = 0) -> None:
        """N is at most `most`, and from the start `least`: memory that is not written to is the machine's to give."""
        self.block_size, self.most, self.least = block_size, most, least
        self.buffers: list[Tensor] = []

    def write(self, table: BlockTable, first: int, new: Sequence[Tensor]) -> None:
        """Store [1, G, S, d] tensors at the table's positions `first` and following."""
        if any(t.shape[0] != 1 for t in new):
            raise ConfigError("a paged cache holds one sequence")
        self.hold(1 + max(table.ids), [(t.shape[1], t.shape[3]) for t in new], new[0])
        at = torch.arange(first, first + new[0].shape[2])
        blocks, slots = torch.tensor(table.ids)[at // self.block_size], at % self.block_size
        for buffer, t in zip(self.buffers, new, strict=True):
            buffer[blocks.to(buffer.device), :, slots.to(buffer.device)] = t[0].transpose(0, 1)

    def read(self, table: BlockTable, length: int) -> list[Tensor]:
        """The table's first `length` positions in one piece, [1, G, L, d]."""
        ids = torch.tensor(table.ids[: -(-length // self.block_size)])
        blocks = (buffer[ids.to(buffer.device)].transpose(0, 1).flatten(1, 2) for buffer in self.buffers)
        return [joined[None, :, :length] for joined in blocks]

    def copy(self, source: int, to: int) -> None:
        """What one block holds, into another."""
        if self.buffers:
            self._grow(1 + max(source, to))
        for buffer in self.buffers:
            buffer[to] = buffer[source]

    def hold(self, blocks: int, kinds: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
        """Have the blocks 0 … `blocks` − 1, for a tensor of (G, d) each of the dtype and device of `like`; all of them.

        Raises `ConfigError` if there are blocks of other shapes.
        """
        shapes = [(G, self.block_size, d) for G, d in kinds]
        if not self.buffers:
            with torch.inference_mode(False):  # the cache may be continued outside of it
                self.buffers = [like.new_empty(0, *shape) for shape in shapes]
        if [b.shape[1:] for b in self.buffers] != shapes:
            raise ConfigError("the cache was made for another model: make another")
        self._grow(blocks)
        return self.buffers

    def release(self) -> None:
        """Give the memory back: no block holds anything any more."""
        self.buffers = []

    def _grow(self, blocks: int) -> None:
        room = self.buffers[0].shape[0]
        if blocks > room:
            with torch.inference_mode(False):
                room_then = max(blocks, self.least, min(2 * room, self.most))
                grown = [b.new_empty(room_then, *b.shape[1:]) for b in self.buffers]
            for old, new in zip(self.buffers, grown, strict=True):
                new[:room] = old
            self.buffers = grown


class PagedLayer:
    """One layer of one sequence. The table must have blocks for what is appended."""

    def __init__(self, pool: Pool, cache: "PagedCache") -> None:
        self.pool, self.cache = pool, cache
        self._appended = 0

    @property
    def length(self) -> int:
        """Positions stored so far, by this layer's module or by a program for all layers."""
        return max(self._appended, self.cache.written)

    def append(self, *new: Tensor) -> list[Tensor]:
        """Add [1, G, S, d] tensors at the end; returns a copy of everything so far, [1, G, length, d]."""
        self.pool.write(self.cache.table, self.length, new)
        self._appended = self.length + new[0].shape[2]
        return self.read()

    def read(self) -> list[Tensor]:
        """A copy of everything so far, [1, G, length, d]."""
        return self.pool.read(self.cache.table, self.length)

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions; their blocks stay with the table."""
        self._appended = min(self._appended, length)

    def fork(self, cache: "PagedCache | None" = None) -> Self:
        """The same positions of another cache: all layers of a sequence have one table, so that `PagedCache` forks."""
        twin = type(self)(self.pool, self.cache.fork() if cache is None else cache)
        twin._appended = self._appended
        return twin

    @property
    def dtype(self) -> torch.dtype | None:
        """Of what is cached; None while nothing ever was."""
        return self.pool.buffers[0].dtype if self.pool.buffers else None

    @property
    def rows(self) -> int | None:
        """1: a table is one sequence's. None while nothing is cached."""
        return 1 if self.length else None

    @property
    def values_per_token(self) -> int:
        """How many numbers one token takes in this layer."""
        return sum(b.shape[1] * b.shape[3] for b in self.pool.buffers)


class PagedCache(Cache):
    """All layers of one sequence, in blocks of pools that are shared with other sequences."""

    def __init__(self, pools: Sequence[Pool], table: BlockTable) -> None:
        super().__init__(0)
        self.pools, self.table = pools, table
        self.written = 0
        """Positions that every layer holds, where a program wrote them and no layer's module."""
        self.layers = [PagedLayer(pool, self) for pool in pools]

    def extend(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor | None:
        """Make room for new positions of the one sequence, which has no padding."""
        if ids_BS.shape[0] != 1 or mask_BS is not None:
            raise ConfigError("a paged cache holds one sequence without padding")
        self.take(ids_BS.shape[1])
        return None

    def take(self, count: int) -> None:
        """Make room for `count` positions more."""
        self.length += count
        self.table.grow(self.length)
        if self.table.copies:
            for source, to in self.table.copies:
                for pool in self.pools:
                    pool.copy(source, to)
            self.table.copies.clear()

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions, and give their blocks back."""
        super().truncate(length)
        self.written = min(self.written, length)
        self.table.truncate(self.length)

    def fork(self) -> "PagedCache":
        """The same positions in the same blocks, to be continued differently."""
        twin = PagedCache(self.pools, self.table.fork())
        twin.length, twin.written = self.length, self.written
        twin.layers = [layer.fork(twin) for layer in self.layers if isinstance(layer, PagedLayer)]
        return twin
