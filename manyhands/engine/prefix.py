"""What a conversation has already run through the model, so that the next turn runs only what is new.

B = 1 sequence. Position p of the cache holds what the model made of `ids[p]` and those before it: a causal model's
cache is right for any text that begins with the same ids.
"""

from collections.abc import Callable, Sequence

from manyhands.engine.blocks import OutOfBlocks, Table
from manyhands.errors import ConfigError
from manyhands.layers.cache import Cache, PagedCache


class Prefix:
    """The cache of one sequence and the ids in it. Empty at first; give it to one `generate` after the other."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        """What has gone through the model."""
        self.cache: Cache | None = None

    def begin(self, ids: Sequence[int], new: Callable[[], Cache]) -> Cache:
        """The cache for a sequence that begins with `ids`: what they share with the last one is kept.

        At least the last id is left to run, because the next token is drawn from what the model makes of it. `new`
        makes an empty cache. Blocks of the same pools become the new cache's, all else is copied into it; where there
        is no room for a copy nothing is kept.
        """
        shared = 0
        for old_id, new_id in zip(self.ids, ids[:-1], strict=False):
            if old_id != new_id:
                break
            shared += 1
        old, cache = self.cache, new()
        if old is not None:
            old.truncate(shared)
            try:
                cache = _hand_over(old, cache) if shared else cache
            except OutOfBlocks:
                shared, cache = 0, new()
            if cache is not old:
                _free(old)
        self.ids, self.cache = self.ids[:shared], cache
        return cache

    def keep(self) -> None:
        """Its request has ended: what is in the request's blocks is this one's from now on."""
        cache = self.cache
        if isinstance(cache, PagedCache) and isinstance(cache.table, Table):
            cache.truncate(len(self.ids))
            kept = cache.table.blocks.new_table()
            cache.table.move(kept)
            cache.table = kept

    def clear(self) -> None:
        """Forget all of it: a forward pass was cut short, and the layers hold different lengths."""
        if self.cache is not None:
            _free(self.cache)
        self.ids, self.cache = [], None

    def __del__(self) -> None:
        self.clear()


def _hand_over(old: Cache, new: Cache) -> Cache:
    """What to go on with: the old one in the new one's table, or the new one with a copy of all that is in the old."""
    if len(old.layers) != len(new.layers):
        raise ConfigError("the prefix was made with another model: make another")
    if isinstance(new, PagedCache):
        if isinstance(old, PagedCache) and old.pools is new.pools:
            assert isinstance(old.table, Table) and isinstance(new.table, Table)
            old.table.move(new.table)
            old.table = new.table
            return old
        new.take(old.length)
    elif isinstance(old, PagedCache):
        new.length = old.length
    else:
        return old
    for source, to in zip(old.layers, new.layers, strict=True):
        to.append(*source.read())
    return new


def _free(cache: Cache) -> None:
    if isinstance(cache, PagedCache):
        cache.table.truncate(0)
