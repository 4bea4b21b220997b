"""Which blocks of the cache belong to whom. Needs no torch: the numbers only; the tensors are the cache's.

A block holds `block_size` positions of one sequence, in every layer. A sequence's table lists its blocks in order.
Several tables may hold a block; who then writes into it gets a copy of it first. A full block that was computed has a
key (`chain.py`), and whoever has the same tokens finds it by that. A block that nobody holds any more is free. One with
a key stays findable until its room is needed: the one that was not used for longest goes first.
"""

import sys
from collections.abc import Iterable

from manyhands.errors import ManyhandsError

BLOCK_SIZE = 32


class OutOfBlocks(ManyhandsError):
    """All blocks are in use. The scheduler asks before it grows a table, so nobody meets this by way of it."""


class Blocks:
    """A pool of blocks 0 … num_blocks − 1, with the number of tables that hold each."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE, most_idle: int = sys.maxsize) -> None:
        """`most_idle` free blocks at most stay findable: for a pool so large that its room is never needed."""
        assert num_blocks > 0 and block_size > 0
        self.num_blocks, self.block_size, self.most_idle = num_blocks, block_size, most_idle
        self._holders: dict[int, int] = {}
        self._returned: list[int] = []  # a stack, so that few blocks are touched as long as few are in use
        self._untouched = 0  # this block and those behind it were never used
        self._idle: dict[int, None] = {}  # free blocks with a key, the one not used for longest first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_used(self) -> int:
        """Blocks that some table holds."""
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """All others."""
        return len(self._returned) + len(self._idle) + self.num_blocks - self._untouched

    @property
    def num_idle(self) -> int:
        """Of the free ones, those that can be found."""
        return len(self._idle)

    def holders(self, block: int) -> int:
        """How many tables hold it; 0 if it is free."""
        return self._holders.get(block, 0)

    def needed(self, length: int) -> int:
        """Blocks for `length` positions."""
        return -(-length // self.block_size)

    def new_table(self) -> "Table":
        """An empty one."""
        return Table(self)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks with the first of these keys, up to the first that no block has."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def forget(self) -> None:
        """Begin again with block 0, and nothing to be found. No table may hold one."""
        assert not self._holders
        self._returned, self._untouched = [], 0
        self._idle, self._key_of, self._block_of = {}, {}, {}

    def _take(self) -> int:
        if self._returned:
            block = self._returned.pop()
        elif self._untouched < self.num_blocks:
            block, self._untouched = self._untouched, self._untouched + 1
        elif self._idle:
            block = self._evict()
        else:
            raise OutOfBlocks(f"all {self.num_blocks} blocks of the cache are in use")
        self._holders[block] = 1
        return block

    def _share(self, block: int) -> None:
        self._idle.pop(block, None)
        self._holders[block] = self._holders.get(block, 0) + 1

    def _release(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block]:
            return
        del self._holders[block]
        if block not in self._key_of:
            self._returned.append(block)
            return
        self._idle[block] = None
        while len(self._idle) > self.most_idle:
            self._returned.append(self._evict())

    def _publish(self, block: int, key: bytes) -> None:
        """It may be found by its key, unless another with the same contents is."""
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block], self._block_of[key] = key, block

    def _withdraw(self, block: int) -> None:
        """It is not to be found any more: it gets other contents."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        self._withdraw(block)
        return block


class Table:
    """The blocks of one sequence, in the order of its positions."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        """The pool they are of."""
        self.ids: list[int] = []
        self.length = 0
        """Positions the blocks are taken for: the last one may have room for more."""
        self.num_published = 0
        """So many of the first blocks were full and computed when somebody said so."""
        self.copies: list[tuple[int, int]] = []
        """(from, to): what a cache has to copy, in every layer, before it writes. It empties the list."""

    @property
    def block_size(self) -> int:
        """Positions of a block."""
        return self.blocks.block_size

    def missing(self, length: int) -> int:
        """Free blocks that `grow(length)` takes: those for new positions, and one for a shared block it writes to."""
        if length <= self.length:
            return 0
        return self.blocks.needed(length) - len(self.ids) + self._writes_shared()

    def reserve(self, length: int) -> bool:
        """Have blocks for `length` positions, if there are any to have; whether it has."""
        missing = self.missing(length)
        if missing > self.blocks.num_free:
            return False
        if length > self.length and self.length % self.block_size:
            self._open_last()
        while len(self.ids) < self.blocks.needed(length):
            self.ids.append(self.blocks._take())
        self.length = max(self.length, length)
        return True

    def grow(self, length: int) -> None:
        """The same. Raises `OutOfBlocks`, with nothing changed, if there is none."""
        if not self.reserve(length):
            missing, free = self.missing(length), self.blocks.num_free
            raise OutOfBlocks(f"{missing} blocks are needed and {free} are free")

    def adopt(self, found: list[int]) -> None:
        """An empty table begins with these blocks, which `Blocks.find` gave: all their positions are computed."""
        assert not self.ids
        for block in found:
            self.blocks._share(block)
        self.ids, self.length, self.num_published = list(found), len(found) * self.block_size, len(found)

    def publish(self, keys: list[bytes], computed: int) -> None:
        """`computed` positions are in the cache: the full blocks among them may be found by their keys."""
        for i in range(self.num_published, min(computed // self.block_size, len(keys))):
            self.blocks._publish(self.ids[i], keys[i])
            self.num_published = i + 1

    def truncate(self, length: int) -> None:
        """Give back what is behind the first `length` positions."""
        self.length = min(self.length, length)
        while len(self.ids) > self.blocks.needed(self.length):  # the last first: it is of use only with those before it
            self.blocks._release(self.ids.pop())
        self.num_published = min(self.num_published, self.length // self.block_size)
        self.copies = [copy for copy in self.copies if copy[1] in self.ids]

    def free(self) -> None:
        """Give back all of it."""
        self.truncate(0)

    def move(self, to: "Table") -> None:
        """All of it becomes another table's, which had nothing: who ends leaves it to who goes on."""
        assert not to.ids and to.blocks is self.blocks
        to.ids, to.length, to.copies, to.num_published = self.ids, self.length, self.copies, self.num_published
        self.ids, self.length, self.copies, self.num_published = [], 0, [], 0

    def fork(self) -> "Table":
        """Another table of the same blocks, for a sequence that goes on differently."""
        assert not self.copies, "the cache has to copy first"
        twin = Table(self.blocks)
        twin.ids, twin.length, twin.num_published = list(self.ids), self.length, self.num_published
        for block in twin.ids:
            self.blocks._share(block)
        return twin

    def _writes_shared(self) -> bool:
        """Whether the next position lies in a block that others hold too."""
        return self.length % self.block_size > 0 and self.blocks.holders(self.ids[-1]) > 1

    def _open_last(self) -> None:
        """The last block is about to be written to: nobody else may hold it, or find it."""
        if not self._writes_shared():
            self.blocks._withdraw(self.ids[-1])
            return
        shared, self.ids[-1] = self.ids[-1], self.blocks._take()
        self.copies.append((shared, self.ids[-1]))
        self.blocks._release(shared)
