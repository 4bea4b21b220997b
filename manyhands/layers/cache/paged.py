"""A cache in blocks: sequences that come, grow and go take blocks of one pool, and may share them.

Which block belongs to whom is a table's business (`engine/blocks.py` has one); here are the tensors. Reading gathers
a sequence's blocks into one piece, so that attention computes what it does with a contiguous cache, bit for bit.

G heads, S new positions, L all positions, N blocks of P positions.
"""

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

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.buffers: list[Tensor] = []

    def write(self, table: BlockTable, first: int, new: Sequence[Tensor]) -> None:
        """Store [1, G, S, d] tensors at the table's positions `first` and following."""
        shapes = [(t.shape[1], self.block_size, t.shape[3]) for t in new]
        if not self.buffers:
            with torch.inference_mode(False):  # the cache may be continued outside of it
                self.buffers = [t.new_empty(0, *shape) for t, shape in zip(new, shapes, strict=True)]
        if any(t.shape[0] != 1 for t in new) or [b.shape[1:] for b in self.buffers] != shapes:
            raise ConfigError("the cache was made for another model, or for one sequence alone")
        self._reserve(max(table.ids))
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
        self._reserve(max(source, to))
        for buffer in self.buffers:
            buffer[to] = buffer[source]

    def _reserve(self, block: int) -> None:
        """Have this block."""
        room = self.buffers[0].shape[0] if self.buffers else 0
        if self.buffers and block >= room:
            with torch.inference_mode(False):
                grown = [b.new_empty(max(block + 1, 2 * room), *b.shape[1:]) for b in self.buffers]
            for old, new in zip(self.buffers, grown, strict=True):
                new[:room] = old
            self.buffers = grown


class PagedLayer:
    """One layer of one sequence. The table must have blocks for what is appended."""

    def __init__(self, pool: Pool, table: BlockTable) -> None:
        self.pool, self.table = pool, table
        self.length = 0

    def append(self, *new: Tensor) -> list[Tensor]:
        """Add [1, G, S, d] tensors at the end; returns a copy of everything so far, [1, G, length, d]."""
        self.pool.write(self.table, self.length, new)
        self.length += new[0].shape[2]
        return self.pool.read(self.table, self.length)

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions; their blocks stay with the table."""
        self.length = min(self.length, length)

    def fork(self, table: BlockTable | None = None) -> Self:
        """The same positions by another table: all layers of a sequence have one, so that `PagedCache` makes it."""
        twin = type(self)(self.pool, self.table.fork() if table is None else table)
        twin.length = self.length
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
        self.layers = [PagedLayer(pool, table) for pool in pools]

    def extend(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor | None:
        """Make room for new positions of the one sequence, which has no padding."""
        if ids_BS.shape[0] != 1 or mask_BS is not None:
            raise ConfigError("a paged cache holds one sequence without padding")
        self.length += ids_BS.shape[1]
        self.table.grow(self.length)
        for source, to in self.table.copies:
            for pool in self.pools:
                pool.copy(source, to)
        self.table.copies.clear()
        return None

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions, and give their blocks back."""
        super().truncate(length)
        self.table.truncate(self.length)

    def fork(self) -> "PagedCache":
        """The same positions in the same blocks, to be continued differently."""
        twin = PagedCache(self.pools, self.table.fork())
        twin.length = self.length
        twin.layers = [layer.fork(twin.table) for layer in self.layers if isinstance(layer, PagedLayer)]
        return twin
