"""Which blocks of the cache belong to whom. Needs no torch: the numbers only; the tensors are the cache's.

A block holds `block_size` positions of one sequence, in every layer. A sequence's table lists its blocks in order. A
fork shares them; who then writes into a shared block gets a copy of it first. A block that nobody holds any more is
free; finding it again by what it holds is for a prefix cache, whose place is between `_release` and `_take`.
"""

from manyhands.errors import ManyhandsError

BLOCK_SIZE = 32


class OutOfBlocks(ManyhandsError):
    """All blocks are in use. The scheduler asks before it grows a table, so nobody meets this by way of it."""


class Blocks:
    """A pool of blocks 0 … num_blocks − 1, with the number of tables that hold each."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks, self.block_size = num_blocks, block_size
        self._holders: dict[int, int] = {}
        self._returned: list[int] = []  # a stack, so that few blocks are touched as long as few are in use
        self._untouched = 0  # this block and those behind it were never used

    @property
    def num_used(self) -> int:
        """Blocks that some table holds."""
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """All others."""
        return len(self._returned) + self.num_blocks - self._untouched

    def holders(self, block: int) -> int:
        """How many tables hold it; 0 if it is free."""
        return self._holders.get(block, 0)

    def needed(self, length: int) -> int:
        """Blocks for `length` positions."""
        return -(-length // self.block_size)

    def new_table(self) -> "Table":
        """An empty one."""
        return Table(self)

    def forget(self) -> None:
        """Begin again with block 0. No table may hold one."""
        assert not self._holders
        self._returned, self._untouched = [], 0

    def _take(self) -> int:
        if self._returned:
            block = self._returned.pop()
        elif self._untouched < self.num_blocks:
            block, self._untouched = self._untouched, self._untouched + 1
        else:
            raise OutOfBlocks(f"all {self.num_blocks} blocks of the cache are in use")
        self._holders[block] = 1
        return block

    def _share(self, block: int) -> None:
        self._holders[block] += 1

    def _release(self, block: int) -> None:
        self._holders[block] -= 1
        if not self._holders[block]:
            del self._holders[block]
            self._returned.append(block)


class Table:
    """The blocks of one sequence, in the order of its positions."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        """The pool they are of."""
        self.ids: list[int] = []
        self.length = 0
        """Positions the blocks are taken for: the last one may have room for more."""
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
        if missing and self._writes_shared():
            shared, self.ids[-1] = self.ids[-1], self.blocks._take()
            self.copies.append((shared, self.ids[-1]))
            self.blocks._release(shared)
        while missing and len(self.ids) < self.blocks.needed(length):
            self.ids.append(self.blocks._take())
        self.length = max(self.length, length)
        return True

    def grow(self, length: int) -> None:
        """The same. Raises `OutOfBlocks`, with nothing changed, if there is none."""
        if not self.reserve(length):
            missing, free = self.missing(length), self.blocks.num_free
            raise OutOfBlocks(f"{missing} blocks are needed and {free} are free")

    def truncate(self, length: int) -> None:
        """Give back what is behind the first `length` positions."""
        self.length = min(self.length, length)
        while len(self.ids) > self.blocks.needed(self.length):
            self.blocks._release(self.ids.pop())
        self.copies = [copy for copy in self.copies if copy[1] in self.ids]

    def free(self) -> None:
        """Give back all of it."""
        self.truncate(0)

    def move(self, to: "Table") -> None:
        """All of it becomes another table's, which had nothing: who ends leaves it to who goes on."""
        assert not to.ids and to.blocks is self.blocks
        to.ids, to.length, to.copies = self.ids, self.length, self.copies
        self.ids, self.length, self.copies = [], 0, []

    def fork(self) -> "Table":
        """Another table of the same blocks, for a sequence that goes on differently."""
        assert not self.copies, "the cache has to copy first"
        twin = Table(self.blocks)
        twin.ids, twin.length = list(self.ids), self.length
        for block in twin.ids:
            self.blocks._share(block)
        return twin

    def _writes_shared(self) -> bool:
        """Whether the next position lies in a block that others hold too."""
        return self.length % self.block_size > 0 and self.blocks.holders(self.ids[-1]) > 1
