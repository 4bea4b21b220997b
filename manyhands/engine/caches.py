"""The memory of all sequences of one model: blocks, whose numbers are in `blocks.py`, and each layer's pool of them."""

import sys

import torch

from manyhands.config import ModelConfig
from manyhands.engine.blocks import BLOCK_SIZE, Blocks, Table
from manyhands.errors import UserError
from manyhands.layers.cache import PagedCache, Pool


class Caches:
    """Makes caches, and gives the memory back when nobody holds a block and none can be found."""

    def __init__(self, num_layers: int, blocks: Blocks | None = None, at_once: bool = False) -> None:
        """`blocks` None: as many as are asked for. `at_once`: take the memory of all of them when the first is used,
        so that it never has to be copied into a larger piece, and never is more."""
        self.blocks = Blocks(sys.maxsize) if blocks is None else blocks
        most = self.blocks.num_blocks
        self.pools = [Pool(self.blocks.block_size, most, most if at_once else 0) for _ in range(num_layers)]

    def new(self, table: Table | None = None, length: int = 0) -> PagedCache:
        """In the blocks of `table`, or of a table of its own; `length` positions are computed in them."""
        cache = PagedCache(self.pools, self.blocks.new_table() if table is None else table)
        cache.length = cache.written = length
        return cache

    def rest(self) -> bool:
        """Give the memory back, if no block is held and none can be found. Whether that is so."""
        if self.blocks.num_used or self.blocks.num_idle:
            return False
        self.blocks.forget()
        for pool in self.pools:
            pool.release()
        return True


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """What one position takes in all layers' pools: keys and values of every head, or MLA's latents."""
    a = config.attention
    values = a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else 2 * a.kv_heads * a.head_dim
    return config.num_hidden_layers * values * dtype.itemsize


def blocks_of(cache_bytes: int, per_token: int) -> int:
    """How many blocks there are in so many bytes. Raises `UserError` if there is none."""
    block = BLOCK_SIZE * per_token
    if cache_bytes < block:
        raise UserError(
            f"the cache may have {cache_bytes:,} bytes; one block of {BLOCK_SIZE} tokens takes {block:,} "
            f"({per_token:,} a token): give it more"
        )
    return cache_bytes // block
