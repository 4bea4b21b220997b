"""Where the rows of a step are: their sequences' blocks, their positions' cos and sin.

T rows of R sequences, r the rotated width.
"""

from array import array
from collections.abc import Sequence
from ctypes import memmove
from itertools import accumulate

import torch
from torch import Tensor

from manyhands.config import ModelConfig
from manyhands.kernels.native.library import CSequences
from manyhands.layers.cache import PagedCache
from manyhands.layers.rope import rope_tables

FEW_PIECES = 8
"""So many are copied one by one sooner than gathered."""


class Sequences:
    """Fills the structure that every native call of a program reads."""

    def __init__(self, struct: CSequences) -> None:
        self._struct = struct
        self._arrays: list[array[int]] = []
        self.blocks = 0
        """One more than the largest number of a block in use."""

    def bind(self, counts: Sequence[int], firsts: Sequence[int], caches: Sequence[PagedCache]) -> None:
        """Sequence s has the next `counts[s]` rows, at positions `firsts[s]` and following, in its cache's blocks."""
        blocks, table = array("q"), array("q")
        for cache in caches:
            table.append(len(blocks))
            blocks.extend(cache.table.ids)
        self._arrays = [array("q", accumulate(counts, initial=0)), array("q", firsts), table, blocks]
        self.blocks = 1 + max(blocks)
        s = self._struct
        s.count, s.entries = len(counts), len(blocks)
        s.begin, s.first, s.table, s.blocks = (a.buffer_info()[0] for a in self._arrays)


class Rotations:
    """cos and sin of every position so far, [P, r / 2] float32, so that a step copies them. They grow."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: tuple[Tensor, Tensor] = (torch.empty(0, 0), torch.empty(0, 0))

    def fill(self, cos: Tensor, sin: Tensor, counts: Sequence[int], firsts: Sequence[int]) -> None:
        """Rows [T, r / 2]: `counts[s]` positions from `firsts[s]` on, one sequence behind the other."""
        last = max(map(int.__add__, counts, firsts))
        if last > self._tables[0].shape[0]:
            self._grow(last)
        if len(counts) <= FEW_PIECES:
            at, size = 0, 4 * cos.shape[1]  # float32: bytes of a position
            for first, count in zip(firsts, counts, strict=True):
                for table, to in zip(self._tables, (cos, sin), strict=True):
                    memmove(to.data_ptr() + at * size, table.data_ptr() + first * size, count * size)
                at += count
            return
        positions = torch.tensor([first + i for first, count in zip(firsts, counts, strict=True) for i in range(count)])
        for table, to in zip(self._tables, (cos, sin), strict=True):
            torch.index_select(table, 0, positions, out=to[: len(positions)])

    @torch.inference_mode(False)  # what is kept may be read outside of it
    def _grow(self, length: int) -> None:
        config = self._config
        most = max(length, min(config.max_position_embeddings, max(256, 1 << length.bit_length())))
        found = rope_tables(config.rope, config.rope_dim, torch.arange(most)[None])
        cos, sin = (table.view(most, -1).contiguous() for table in found)
        self._tables = cos, sin
