"""The memory of all sequences of one model: blocks, whose numbers are in `blocks.py`, and each layer's pool of them."""

import sys

from manyhands.engine.blocks import Blocks, Table
from manyhands.layers.cache import PagedCache, Pool


class Caches:
    """Makes caches, and gives the memory back when nobody holds a block."""

    def __init__(self, num_layers: int, blocks: Blocks | None = None) -> None:
        """`blocks` None: as many as are asked for."""
        self.blocks = Blocks(sys.maxsize) if blocks is None else blocks
        self.pools = [Pool(self.blocks.block_size) for _ in range(num_layers)]

    def new(self, table: Table | None = None) -> PagedCache:
        """An empty one, in the blocks of `table`, or of a table of its own."""
        return PagedCache(self.pools, self.blocks.new_table() if table is None else table)

    def rest(self) -> None:
        """Give the memory back, if no block is held."""
        if not self.blocks.num_used:
            self.blocks.forget()
            for pool in self.pools:
                pool.release()
